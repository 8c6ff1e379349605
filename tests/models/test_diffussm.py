"""DiffuSSM compared with its specification: parameters, multiply-adds, and its block written out index by index."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dis_scale.models import build
from dis_scale.models.cost import price_model
from dis_scale.models.diffussm.network import DiffuSSM, DiffuSSMBlock
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.families import preset
from dis_scale.process.errors import UserError
from dis_scale.recipe import LatentShape

SHAPE = LatentShape(4, 8)


def model(**options: Any) -> DiffuSSM:
    """A small model without zero weights."""
    built = build(DiffuSsm(kind="diffussm", **{"width": 8, "depth": 2, "state_size": 4} | options), SHAPE, 10)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in built.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    assert isinstance(built, DiffuSSM)
    return built.double()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([0.0, 10.5, 999.0]), torch.tensor([0, 3, 10])


def test_parameters_and_multiply_adds_of_xl() -> None:
    xl = DiffuSsm(**preset("DiffuSSM-XL"))
    small, large = price_model(xl, LatentShape(4, 32), 1000), price_model(xl, LatentShape(4, 64), 1000)
    assert small.parameters == 673_155_088
    assert small.gmacs_forward == pytest.approx(280.04, rel=1e-4)
    assert large.gmacs_forward == pytest.approx(1122.5, rel=1e-3)
    assert small.kernel_gmacs > 0


@pytest.mark.parametrize("M", [1, 2, 4])
def test_block_equals_the_specification_index_by_index(M: int) -> None:
    built = model(hourglass=M)
    block, D = built.blocks[0], 8
    assert isinstance(block, DiffuSSMBlock)
    torch.manual_seed(2)
    I_BGD, c_BD = torch.randn(2, 6, D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)
    shift, scale, gate = block.modulation(F.silu(c_BD)).chunk(3, dim=1)
    h = F.layer_norm(I_BGD, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    U = torch.zeros(2, 6 * M, 2 * D, dtype=torch.float64)
    for position in range(6 * M):
        j, k = divmod(position, M)
        slot = slice(k * 2 * D, (k + 1) * 2 * D)
        up = F.linear(F.gelu(block.W0(h[:, j])), block.W_up.weight[slot], block.W_up.bias[slot])
        U[:, position] = F.gelu(up)
    assert block.scan.leftward is not None
    forward = block.scan.rightward.recurrence(U[:, :, :D])
    backward = block.scan.leftward.recurrence(U[:, :, D:].flip(1)).flip(1)
    Y = torch.cat([forward, backward], dim=2)
    W_down = block.W_down
    down = torch.cat([F.gelu(Y[:, k::M] @ W_down.weight[k] + W_down.bias[k]) for k in range(M)], dim=2)
    expected = I_BGD + gate[:, None] * block.W4(block.W3(F.gelu(block.W2(down)) * F.gelu(block.W1(h))))
    assert torch.allclose(block(I_BGD, c_BD), expected, atol=1e-12)


def test_pixels_are_grouped_in_raster_order() -> None:
    built = model(depth=1, hourglass=4)
    block = built.blocks[0]
    assert isinstance(block, DiffuSSMBlock)
    torch.nn.init.zeros_(block.W4.weight)
    torch.nn.init.zeros_(block.W4.bias)
    x, t, y = inputs()
    changed = x.clone()
    changed[:, :, 2, 5] += 1
    moved = (built(changed, t, y) - built(x, t, y)).abs().sum(dim=(0, 1)).nonzero().tolist()
    assert moved == [[2, 4], [2, 5], [2, 6], [2, 7]]


@pytest.mark.parametrize("options", [{"bidirectional": False}, {"init": "legs"}, {"init": "inv"}], ids=str)
def test_options_run_and_change_the_parameters(options: dict[str, Any]) -> None:
    plain, optional = model(), model(**options)
    x, t, y = inputs()
    assert optional(x, t, y).shape == (3, 8, 8, 8)
    counts = [sum(p.numel() for p in built.parameters()) for built in (optional, plain)]
    assert (counts[0] < counts[1]) == ("init" not in options)


def test_a_unidirectional_model_is_causal() -> None:
    built = model(bidirectional=False)
    x, t, y = inputs()
    changed = x.clone()
    changed[:, :, 4:] += 1
    before = built(x, t, y)
    assert torch.allclose(built(changed, t, y)[:, :, :4], before[:, :, :4], atol=1e-12)
    two_way = model()
    assert not torch.allclose(two_way(changed, t, y)[:, :, :4], two_way(x, t, y)[:, :, :4], atol=1e-6)


def test_a_base_width_without_a_table_of_positions_is_refused() -> None:
    """Else the recipe is taken, and its rates fail after prepare, or are those of a table in another layout."""
    model = DiffuSsm(kind="diffussm", width=8, depth=1, position="sine")
    assert "position: sine needs widths that are multiples of 4" in str(model.base_width_refusal(6, {}))
    assert model.base_width_refusal(12, {}) is None


def test_an_hourglass_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="hourglass 3 must divide both"):
        model(hourglass=3)
