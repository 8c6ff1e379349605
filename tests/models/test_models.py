"""What every backbone promises: shapes, weights from a seed, randomness from the caller, one line for bad input."""

import pytest
import torch

from dis_scale.errors import UserError
from dis_scale.models import build, check_finite
from dis_scale.recipe import DiffuSsm, Dis, Dit, LatentShape

SHAPE = LatentShape(4, 8)
DIS = Dis(kind="dis", width=32, depth=4, patch=2)
DIT = Dit(kind="dit", width=32, depth=2, heads=2, patch=2)
DIFFUSSM = DiffuSsm(kind="diffussm", width=32, depth=2, state_size=8)
MODELS = pytest.mark.parametrize("settings", [DIS, DIT, DIFFUSSM], ids=["dis", "dit", "diffussm"])


def inputs(batch=3, shape=SHAPE, seed=1):
    rng = torch.Generator().manual_seed(seed)
    x_BCHW = torch.randn(batch, shape.channels, shape.size, shape.size, generator=rng)
    return x_BCHW, torch.rand(batch, generator=rng) * 999, torch.randint(0, 11, (batch,), generator=rng)


@MODELS
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("shape", [LatentShape(4, 8), LatentShape(3, 24)], ids=str)
@pytest.mark.parametrize("num_classes", [None, 10])
def test_output_has_twice_the_channels(settings, patch, shape, num_classes):
    size = {"hourglass": patch} if settings.kind == "diffussm" else {"patch": patch}
    model = build(settings.model_copy(update=size), shape, num_classes)
    x, t, y = inputs(2, shape)
    assert model(x, t, y if num_classes else None).shape == (2, 2 * shape.channels, shape.size, shape.size)


@MODELS
def test_initial_weights_are_a_function_of_the_seed_alone(settings):
    torch.manual_seed(1)
    first = build(settings, SHAPE, 10, seed=3).state_dict()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = build(settings, SHAPE, 10, seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build(settings, SHAPE, 10, seed=4).state_dict()
    assert not torch.equal(other["time.up.weight"], first["time.up.weight"])


@MODELS
def test_forward_is_the_same_in_training_and_draws_nothing(settings):
    model = build(settings, SHAPE, 10)
    state = torch.random.get_rng_state()
    assert torch.equal(model.train()(*inputs()), model.eval()(*inputs()))
    assert torch.equal(torch.random.get_rng_state(), state)


@MODELS
def test_recomputed_blocks_give_the_same_gradients(settings):
    gradients = []
    for mode in ("none", "block"):
        model = build(settings, SHAPE, 10, checkpointing=mode)
        drop = torch.ones(model.drop_branches, 3)
        drop[1::2, 0] = 0
        model(*inputs(), drop).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_drop_path_takes_its_masks_from_the_caller():
    model = build(DIS, SHAPE, 10)
    assert model.drop_rates == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1, 0.1])
    x, t, y = inputs()
    kept = model(x, t, y, torch.ones(model.drop_branches, 3))
    assert torch.equal(kept, model(x, t, y))
    drop = torch.ones(model.drop_branches, 3)
    drop[-1, 1] = 0
    dropped = model(x, t, y, drop)
    assert torch.equal(dropped[0], kept[0])
    assert not torch.allclose(dropped[1], kept[1])


def test_the_null_class_has_a_row_of_its_own():
    model = build(DIS, SHAPE, 10)
    x, t, _ = inputs(2)
    out = model(x[:1].expand(2, -1, -1, -1), t[:1].expand(2), torch.tensor([10, 3]))
    assert not torch.allclose(out[0], out[1])


def test_bad_input_is_one_clear_line():
    x, t, y = inputs()
    model = build(DIS, SHAPE, 10)
    with pytest.raises(UserError, match="size 9 is not divisible by patch 2"):
        build(DIS, LatentShape(4, 9), 10)
    with pytest.raises(UserError, match=r"unknown checkpointing 'blocks' .did you mean 'block'"):
        build(DIS, SHAPE, 10, checkpointing="blocks")
    with pytest.raises(UserError, match=r"input of shape \(3, 3, 8, 8\): expected \(batch, 4, 8, 8\)"):
        model(x[:, :3], t, y)
    with pytest.raises(UserError, match="label 11 is out of range: expected 0 to 9, or 10 for none"):
        model(x, t, y.fill_(11))
    with pytest.raises(UserError, match="the model is conditional, pass labels"):
        model(x, t)
    with torch.no_grad():
        model.norm[3] = float("nan")
    with pytest.raises(UserError, match="weight norm is not finite"):
        check_finite(model)


@MODELS
def test_bfloat16_weights_run_and_stay_near(settings):
    model = build(settings, SHAPE, 10)
    exact = model(*inputs())
    near = model.to(torch.bfloat16)(*inputs())
    assert near.dtype == torch.bfloat16
    assert torch.allclose(near.float(), exact, atol=0.1)
