"""The ablations of both papers, each compared with its definition. Their cost: test_cost.py."""

from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale.models import build
from dis_scale.models.diffussm.network import DiffuSSM, DiffuSSMBlock
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.dis.network import DiS, DiSBlock
from dis_scale.models.dis.s6 import Mixer, taps_and_bias
from dis_scale.models.dis.settings import Dis
from dis_scale.models.public import to_official
from dis_scale.models.tokens import position_table
from dis_scale.process.errors import UserError
from dis_scale.recipe import LatentShape
from dis_scale.scan import causal_conv_silu, selective_scan

SHAPE = LatentShape(4, 8)
Model = TypeVar("Model", bound=nn.Module)


def moved(built: Model) -> Model:
    """Return a model in float64 without zero weights."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in built.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return built.double().requires_grad_(False)


def dis(**options: Any) -> DiS:
    model = build(Dis(kind="dis", **{"width": 16, "depth": 4, "patch": 2} | options), SHAPE, 10, scan="reference")
    assert isinstance(model, DiS)
    return moved(model)


def diffussm(**options: Any) -> DiffuSSM:
    model = build(DiffuSsm(kind="diffussm", **{"width": 8, "depth": 2, "state_size": 4} | options), SHAPE, 10)
    assert isinstance(model, DiffuSSM)
    return moved(model)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([0.0, 10.5, 999.0]), torch.tensor([0, 3, 10])


@pytest.mark.parametrize("skip", ["concat", "add", "none"])
def test_out_blocks_get_the_branches_of_in_blocks_last_in_first_out(skip: str) -> None:
    model, got, given = dis(skip=skip), list[Tensor | None](), list[Tensor]()

    def note(_: nn.Module, arguments: Any, outputs: Any) -> None:
        got.append(arguments[3])
        given.append(outputs[0])

    for block in model.blocks:
        block.register_forward_hook(note)
    model(*inputs())
    assert [each is None for each in got] == [True, True, True, skip == "none", skip == "none"]
    if skip != "none":
        assert got[3] is given[1]
        assert got[4] is given[0]


@pytest.mark.parametrize("skip", ["concat", "add"])
def test_an_out_block_adds_the_product_or_the_sum_to_the_stream(skip: str) -> None:
    block = dis(skip=skip).blocks[4]
    assert isinstance(block, DiSBlock)
    torch.manual_seed(2)
    h, r, taken = torch.randn(3, 2, 18, 16, dtype=torch.float64)
    _, stream = block(h, r, None, taken, None)
    if skip == "add":
        assert torch.equal(stream, r + (h + taken))
        assert block.skip is None
    else:
        assert block.skip is not None
        product = torch.cat([h, taken], -1) @ block.skip.weight.T + block.skip.bias
        assert torch.allclose(stream, r + product, atol=1e-12)


def test_one_direction_is_the_forward_scan_of_the_forward_convolution() -> None:
    mixer = dis(directions=1).get_submodule("blocks.0.mixer")
    assert isinstance(mixer, Mixer)
    torch.manual_seed(2)
    h = torch.randn(2, 18, 16, dtype=torch.float64)
    x, z = F.linear(h, mixer.in_proj).chunk(2, dim=-1)
    u = causal_conv_silu(x, *taps_and_bias(mixer.conv[0]), backend="reference")
    y = selective_scan(*mixer.directions(mixer.dynamics, u)[0], backend="reference") * F.silu(z)
    assert torch.allclose(mixer(h), F.linear(y, mixer.out_proj), atol=1e-10)
    assert {len(p) for p in (mixer.conv, mixer.x_proj, mixer.dt_proj, mixer.dynamics)} == {1}


@pytest.mark.parametrize("directions", [1, 2])
def test_a_tied_spectrum_is_a_free_one_whose_rates_are_multiples_of_one(directions: int) -> None:
    tied, free = dis(directions=directions, spectrum="tied"), dis(directions=directions)
    weights = tied.state_dict()
    for name, rows in weights.items():
        if name.endswith("dynamics"):
            assert rows.shape[1] == 3
            rates = torch.stack([rows[:, 0].exp() * (n + 1) for n in range(16)], dim=1)
            weights[name] = torch.cat([rates.log(), rows[:, 1:]], dim=1)
    free.load_state_dict(weights)
    assert torch.allclose(tied(*inputs()), free(*inputs()), atol=1e-6), "the rates' logarithms are float32"
    of_tied, of_free = (model.requires_grad_(True) for model in (tied, free))
    for model in (of_tied, of_free):
        model(*inputs()).square().sum().backward()
    grad, whole = (model.get_parameter("blocks.1.mixer.dynamics").grad for model in (of_tied, of_free))
    assert grad is not None
    assert whole is not None
    assert torch.allclose(grad[:, 0], whole[:, :16].sum(1), rtol=1e-4, atol=1e-6)


def test_a_tied_spectrum_starts_as_a_free_one() -> None:
    tied = build(Dis(kind="dis", width=16, depth=2, patch=2, spectrum="tied"), SHAPE, 10)
    free = build(Dis(kind="dis", width=16, depth=2, patch=2), SHAPE, 10)
    for block, whole in zip(*(model.get_submodule("blocks").children() for model in (tied, free)), strict=True):
        assert isinstance(block.mixer, Mixer)
        assert isinstance(whole.mixer, Mixer)
        assert torch.equal(block.mixer.free_dynamics(), whole.mixer.dynamics)


def test_with_one_direction_a_token_changes_later_ones_only() -> None:
    one, both = dis(directions=1), dis()
    x, t, y = inputs()
    changed = x.clone()
    changed[:, :, 4:] += 1  # the last two rows of patches
    for model, same in ((one, True), (both, False)):
        assert torch.allclose(model(changed, t, y)[:, :, :4], model(x, t, y)[:, :, :4], atol=1e-10) == same


@pytest.mark.parametrize("conditioning", ["adaln_zero_alone", "adaln_alone"])
def test_adaptive_norms_alone_have_no_tokens_and_still_see_time_and_class(conditioning: str) -> None:
    model = dis(conditioning=conditioning)
    assert model.length == 16, "the patches"
    assert model.position is not None
    assert model.position.shape == (1, 16, 16)
    x, t, y = inputs()
    assert not torch.allclose(model(x, t, y), model(x, t + 100, y))
    assert not torch.allclose(model(x, t, y), model(x, t, (y + 1) % 10))


def test_an_adaptive_norm_without_gate_is_one_whose_gates_are_one() -> None:
    plain, gated = dis(conditioning="adaln_alone"), dis(conditioning="adaln_zero_alone")
    weights = plain.state_dict()
    for name in gated.state_dict():
        if "blocks" in name and "modulation" in name:
            ones = torch.ones(16, dtype=torch.float64) if name.endswith("bias") else torch.zeros(16, 16, dtype=torch.float64)
            weights[name] = torch.cat([weights[name], ones])
    gated.load_state_dict(weights)
    assert torch.allclose(plain(*inputs()), gated(*inputs()), atol=1e-12)


@pytest.mark.parametrize("depth", [4, 5])
def test_long_skips_of_diffussm_pair_the_last_half_with_the_first(depth: int) -> None:
    """A product that ignores the skip is a model without skips; one that takes only it is a block on the mate's output."""
    plain, long = diffussm(depth=depth), diffussm(depth=depth, skip="concat")
    assert [block.skip is not None for block in long.blocks] == [i >= (depth + 1) // 2 for i in range(depth)]
    long.load_state_dict(plain.state_dict(), strict=False)
    for block in long.blocks[(depth + 1) // 2 :]:
        assert isinstance(block, DiffuSSMBlock)
        assert block.skip is not None
        block.skip.weight.copy_(torch.eye(16, dtype=torch.float64)[:8])
        block.skip.bias.zero_()
    assert torch.allclose(long(*inputs()), plain(*inputs()), atol=1e-12)
    got = list[tuple[Tensor | None, Tensor]]()
    for block in long.blocks:
        block.register_forward_hook(lambda _, arguments, output: got.append((arguments[2], output)))
    long(*inputs())
    for i in range((depth + 1) // 2, depth):
        assert got[i][0] is got[depth - 1 - i][1]


def test_without_a_position_table_the_model_is_one_with_a_table_of_zeros() -> None:
    with_table, without = dis(), dis(position="none")
    weights = with_table.state_dict()
    table = weights.pop("position")
    without.load_state_dict(weights)
    assert with_table.position is not None
    with_table.position.sub_(table)
    assert torch.equal(without(*inputs()), with_table(*inputs()))


@pytest.mark.parametrize(
    "options",
    [{"skip": "add"}, {"directions": 1}, {"position": "none"}, {"spectrum": "tied"}, {"conditioning": "adaln_zero_alone"}],
    ids=str,
)
def test_an_ablation_is_not_exported_as_a_public_dis(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(UserError, match=f"the public layout of DiS has no {name}: {options[name]}"):
        to_official(dis(**options))


def test_a_width_without_a_table_of_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="a width that is a multiple of 4, got 6"):
        DiffuSsm(kind="diffussm", width=6, depth=2, position="sine")


def test_patches_of_diffussm_are_the_pixels_of_a_smaller_latent() -> None:
    """Of patches of 2 x 2: the same as a model without patches on a latent of half the size and four times the channels."""
    patched = diffussm(patch=2)
    plain = build(patched.settings.model_copy(update={"patch": 1}), LatentShape(16, 4), 10).double()
    plain.load_state_dict(patched.state_dict())
    x, t, y = inputs()
    blocks = x.reshape(3, 4, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(3, 16, 4, 4)
    out = plain(blocks, t, y)  # (3, 32, 4, 4): a patch's values are ordered by row, column, channel
    expected = out.reshape(3, 2, 2, 8, 4, 4).permute(0, 3, 4, 1, 5, 2).reshape(3, 8, 8, 8)
    assert torch.allclose(patched(x, t, y), expected, atol=1e-12)


@pytest.mark.parametrize("hourglass", [1, 2, 4])
def test_the_sine_table_is_dits_averaged_over_the_positions_of_a_group(hourglass: int) -> None:
    model = diffussm(position="sine", hourglass=hourglass)
    position, table = model.get_buffer("position"), position_table(8, 8)[0].double()
    expected = torch.stack([table[j * hourglass : (j + 1) * hourglass].mean(0) for j in range(64 // hourglass)])
    assert torch.allclose(position[0], expected, atol=1e-6)
    assert "position" not in model.state_dict()
    plain = diffussm(hourglass=hourglass)
    plain.load_state_dict(model.state_dict())
    plain.embed.register_forward_hook(lambda _, __, out: out + position)
    assert torch.equal(plain(*inputs()), model(*inputs()))
