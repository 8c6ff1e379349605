"""Contract of every backbone: shapes, weights from a seed, random numbers from the caller, errors for bad input."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dis_scale import models
from dis_scale.diffusion import build as build_process
from dis_scale.diffusion.generate import generate
from dis_scale.models import build, check_finite
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.dis.network import DiS
from dis_scale.models.dis.s6 import Mixer
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dit.settings import Dit
from dis_scale.models.settings import FamilySettings
from dis_scale.process.errors import UserError
from dis_scale.recipe import Flow, Gaussian, LatentShape, Sampling
from dis_scale.recipe.evaluate import Sampler
from dis_scale.scan.selftest import Case
from tests.support.graphs import stirred

SHAPE = LatentShape(4, 8)
DIS = Dis(kind="dis", width=32, depth=4, patch=2)
DIT = Dit(kind="dit", width=32, depth=2, heads=2, patch=2)
DIFFUSSM = DiffuSsm(kind="diffussm", width=32, depth=2, state_size=8)
SSD = DIS.model_copy(update={"mixer": "ssd", "state_size": 8})
HYDRA = SSD.model_copy(update={"combine": "hydra"})
MODELS = pytest.mark.parametrize("settings", [DIS, SSD, HYDRA, DIT, DIFFUSSM], ids=["dis", "ssd", "hydra", "dit", "diffussm"])


def inputs(batch: int = 3, shape: LatentShape = SHAPE, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x_BCHW = torch.randn(batch, shape.channels, shape.size, shape.size, generator=rng)
    return x_BCHW, torch.rand(batch, generator=rng) * 999, torch.randint(0, 11, (batch,), generator=rng)


@MODELS
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("shape", [LatentShape(4, 8), LatentShape(3, 24)], ids=str)
@pytest.mark.parametrize("num_classes", [None, 10])
def test_output_has_twice_the_channels(settings: FamilySettings, patch: int, shape: LatentShape, num_classes: int | None) -> None:
    size = {"hourglass": patch} if settings.kind == "diffussm" else {"patch": patch}
    model = build(settings.model_copy(update=size), shape, num_classes)
    x, t, y = inputs(2, shape)
    assert model(x, t, y if num_classes else None).shape == (2, 2 * shape.channels, shape.size, shape.size)


@MODELS
def test_initial_weights_are_a_function_of_the_seed_alone(settings: FamilySettings) -> None:
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
def test_forward_is_the_same_in_training_and_uses_no_random_numbers(settings: FamilySettings) -> None:
    model = stirred(build(settings, SHAPE, 10))
    state = torch.random.get_rng_state()
    assert torch.equal(model.train()(*inputs()), model.eval()(*inputs()))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("scan", ["auto", "chunked", "reference"])
@MODELS
def test_recomputed_blocks_give_the_same_gradients(settings: FamilySettings, scan: str) -> None:
    """Also in a second backward pass through the same graph, which PyTorch allows but for `selective`."""
    gradients = []
    for mode in ("none", "block", "every_2", "selective"):
        model = stirred(build(settings, SHAPE, 10, scan=scan, checkpointing=mode))
        drop = torch.ones(len(model.drop_rates), 3)
        drop[1::2, 0] = 0
        loss = model(*inputs(), drop).square().mean()
        if mode != "selective":
            loss.backward(retain_graph=True)
            model.zero_grad()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(p, kept) for kept, *again in zip(*gradients, strict=True) for p in again)
    assert all(gradient is not None and gradient.any() for gradient in gradients[0])


def test_drop_path_takes_its_masks_from_the_caller() -> None:
    model = build(DIS, SHAPE, 10)
    assert model.drop_rates == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1, 0.1])
    x, t, y = inputs()
    kept = model(x, t, y, torch.ones(len(model.drop_rates), 3))
    assert torch.equal(kept, model(x, t, y))
    drop = torch.ones(len(model.drop_rates), 3)
    drop[-1, 1] = 0
    dropped = model(x, t, y, drop)
    assert torch.equal(dropped[0], kept[0])
    assert not torch.allclose(dropped[1], kept[1])


def test_the_null_class_has_its_own_embedding() -> None:
    model = build(DIS, SHAPE, 10)
    x, t, _ = inputs(2)
    out = model(x[:1].expand(2, -1, -1, -1), t[:1].expand(2), torch.tensor([10, 3]))
    assert not torch.allclose(out[0], out[1])


def test_bad_input_is_one_clear_line() -> None:
    x, t, y = inputs()
    model = build(DIS, SHAPE, 10)
    with pytest.raises(UserError, match="size 9 is not divisible by patch 2"):
        build(DIS, LatentShape(4, 9), 10)
    with pytest.raises(UserError, match=r"unknown checkpointing 'blocks' .did you mean 'block'.*known: none, block, every_<k>"):
        build(DIS, SHAPE, 10, checkpointing="blocks")
    with pytest.raises(UserError, match=r"input of shape \(3, 3, 8, 8\): expected \(batch, 4, 8, 8\)"):
        model(x[:, :3], t, y)
    with pytest.raises(UserError, match="label 11 is out of range: expected 0 to 9, or 10 for no label"):
        model(x, t, y.fill_(11))
    with pytest.raises(UserError, match="the model is conditional, pass labels"):
        model(x, t)
    with torch.no_grad():
        model.get_parameter("norm")[3] = float("nan")
    with pytest.raises(UserError, match="weight norm is not finite"):
        check_finite(model)


@MODELS
def test_products_in_bfloat16_give_similar_outputs_and_gradients_of_float32_weights(settings: FamilySettings) -> None:
    exact, near = (stirred(build(settings, SHAPE, 10, precision=precision)) for precision in ("fp32", "bf16"))
    outputs = exact(*inputs()), near(*inputs())
    assert outputs[1].dtype == torch.bfloat16
    assert torch.allclose(outputs[1].float(), outputs[0], atol=min(0.1, 0.02 * float(outputs[0].detach().abs().max())))
    outputs[1].float().square().mean().backward()
    assert {p.grad is not None and p.grad.dtype for p in near.parameters()} == {torch.float32}


@MODELS
def test_weights_in_bfloat16_give_similar_outputs(settings: FamilySettings) -> None:
    model = stirred(build(settings, SHAPE, 10))
    exact = model(*inputs())
    near = model.to(torch.bfloat16)(*inputs())
    assert near.dtype == torch.bfloat16
    assert torch.allclose(near.float(), exact, atol=min(0.1, 0.05 * float(exact.detach().abs().max())))


def test_time_and_decay_are_not_rounded_with_the_weights() -> None:
    """bfloat16 cannot represent 999 nor the decays: both are kept in float32."""
    model = build(DIS, SHAPE, 10).to(torch.bfloat16)
    x, _, y = inputs(1)
    assert not torch.equal(model(x, torch.tensor([998.0]), y), model(x, torch.tensor([999.0]), y))
    u_BLE = torch.zeros(1, 2, 64, dtype=torch.bfloat16)
    mixer = model.get_submodule("blocks.0.mixer")
    assert isinstance(mixer, Mixer)
    assert {direction.A_EN.dtype for direction in mixer.directions(mixer.dynamics, u_BLE, u_BLE)} == {torch.float32}


@torch.no_grad()
def test_initial_weights_of_dis_are_the_public_codes_without_its_defect() -> None:
    model = build(DIS.model_copy(update={"width": 128}), SHAPE, 10)
    assert isinstance(model, DiS)
    assert model.modulation is not None
    assert model.label is not None
    assert model.position is not None
    assert {layer.bias.abs().max().item() for layer in (model.time.up, model.final, model.modulation)} == {0}
    assert float(model.label.weight.std()) == pytest.approx(0.02, rel=0.1)
    assert float(model.position.abs().max()) == 0
    mixer = model.get_submodule("blocks.0.mixer")
    assert isinstance(mixer, Mixer)
    assert float(mixer.out_proj.abs().max()) == pytest.approx((256 * 4) ** -0.5, rel=1e-3)
    assert float(mixer.in_proj.abs().max()) == pytest.approx(128**-0.5, rel=1e-3)
    assert mixer.dynamics[1, :-2, 3].exp().tolist() == pytest.approx(range(1, 17))
    for D_E, bias_E in mixer.dynamics[:, -2:]:
        steps = torch.nn.functional.softplus(bias_E)
        assert 1e-3 * 0.99 < float(steps.min()) < 3e-3
        assert 0.03 < float(steps.max()) < 0.1 * 1.01
        assert float(D_E.min()) == float(D_E.max()) == 1
    forward, backward = build(DIS.model_copy(update={"init": "official"}), SHAPE, 10).get_parameter("blocks.2.mixer.dynamics")
    assert float(backward[-1].abs().max()) == 0
    assert float(forward[-1].abs().min()) > 0


def test_a_block_of_dis_has_seven_parameters() -> None:
    """Each costs 23 to 33 us of Python with DeepSpeed's hooks, a pass."""
    blocks = list(build(DIS, SHAPE, 10).get_submodule("blocks").children())
    assert len(list(blocks[0].parameters())) == 7
    assert len(list(blocks[-1].parameters())) == 9  # the skip's product and its bias


def test_adaln_zero_blocks_add_nothing_at_first_and_learn() -> None:
    model = build(DIS.model_copy(update={"conditioning": "adaln_zero"}), SHAPE, 10)
    h_BLD, c_BD = torch.randn(2, 18, 32), torch.randn(2, 32)
    branch, stream = model.get_submodule("blocks.0")(h_BLD, None, c_BD, None, None)
    assert not branch.detach().any()
    assert torch.equal(stream, h_BLD)
    model(*inputs()).square().mean().backward()
    grad = model.get_parameter("blocks.0.modulation.weight").grad
    assert grad is not None
    assert float(grad.abs().max()) > 0


@MODELS
@pytest.mark.parametrize(("process", "sampler"), [(Gaussian(kind="gaussian"), "ddpm"), (Flow(kind="flow"), "heun")])
def test_samples_are_the_same_pixels_at_any_split(settings: FamilySettings, process: Gaussian | Flow, sampler: Sampler) -> None:
    """Noise is bit-equal. Sums inside a model may differ in the last digits, far below 1/255."""
    model = stirred(build(settings, SHAPE, 10)).eval()

    def sample(numbers: Sequence[int]) -> Tensor:
        labels = [number % 10 for number in numbers]
        settings = Sampling(sampler=sampler, steps=10, guidance=1.5)
        return generate(model, build_process(process, model.shape), labels, numbers, settings, seed=1).clamp(-1, 1)

    whole, parts = sample(range(5)), torch.cat([sample([0, 1]), sample([2]), sample([3, 4])])
    assert float((whole - parts).abs().max()) < 1 / 255


@pytest.mark.slow
@MODELS
def test_compiled_blocks_agree_within_rounding(settings: FamilySettings) -> None:
    models = [stirred(build(settings, SHAPE, 10)) for _ in range(2)]
    models[1].compile_blocks()
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    for _ in range(2):
        losses = [model(*inputs()).square().mean() for model in models]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)


def test_a_gpus_kernels_are_compared_at_the_models_sizes() -> None:
    """And in its precision. A DiT has none of its own."""
    gpu, settings = torch.device("cuda"), Dis(kind="dis", width=16, depth=2, patch=2)
    dis = build(settings, SHAPE, 10, scan="chunked")
    one_way = build(
        settings.model_copy(update={"directions": 1}), SHAPE, 10, scan="chunked", checkpointing="block", precision="bf16"
    )
    assert isinstance(dis, DiS)
    assert isinstance(one_way, DiS)
    assert dis.kernel_cases(gpu, {4, 8}, training=True) == [("chunked", torch.float32, Case(18, 32, 16, 8), False)]
    case = Case(18, 32, 16, 4, directions=1, gradients=False)
    assert one_way.kernel_cases(gpu, {4}, training=False) == [("chunked", torch.bfloat16, case, False)]
    models.verify_kernels(build(DIT, SHAPE, 10), gpu, {4}, training=True)
