"""Orders of the scan: equal to the public lists, restored after each block, and nothing but another order."""

import copy
import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dis_scale.models import build, public
from dis_scale.models.dis.network import DiS, DiSBlock
from dis_scale.models.dis.orders import orders_of
from dis_scale.models.dis.settings import Dis, Order
from dis_scale.process.errors import UserError
from dis_scale.recipe import LatentShape

SHAPE = LatentShape(2, 4)
HILBERT = [0, 4, 5, 1, 2, 3, 7, 6, 10, 11, 15, 14, 13, 9, 8, 12]
"""The curve of ZigMa's `gilbert_zigzag_path(4)`, which has the places on it by position: its positions in their order."""
LISTS = {
    ("hilbert", 8): "5a9be059cac94c9d",
    ("hilbert", 16): "9568c0ab73007b88",
    ("sweep8", 4): "483ea19d0980c9c0",
    ("sweep8", 16): "250d1c0a9a7fed45",
    ("zigzag8", 4): "a7a0754137618819",
    ("zigzag8", 16): "dfe51cdf56197994",
    ("jpeg8", 4): "b9571359e1dc26b0",
    ("jpeg8", 16): "a7b5aa963198bac1",
}
"""Beginning of the sha256 of DiMSUM's eight paths (ZigMa's for `zigzag8` and `hilbert`), one after the other, as int64, by the
grid's side."""


def dis(**changed: Any) -> DiS:
    settings = Dis(kind="dis", width=16, depth=2, patch=1, drop_path=0.0).model_copy(update=changed)
    model = build(settings, SHAPE, 10, seed=0)
    assert isinstance(model, DiS)
    assert model.position is not None
    with torch.no_grad():
        model.position.normal_(generator=torch.Generator().manual_seed(1))
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    return torch.randn(3, 2, 4, 4, generator=rng), torch.rand(3, generator=rng) * 999, torch.tensor([1, 2, 10])


def test_the_lists_are_the_public_ones() -> None:
    assert orders_of(("raster", "column"), 3, alternate=False)[1].tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert orders_of(("hilbert",), 4, alternate=False)[0].tolist() == HILBERT
    for (name, side), known in LISTS.items():
        paths = np.concatenate(orders_of((name,), side, alternate=False)).astype("<i8")
        assert hashlib.sha256(paths.tobytes()).hexdigest().startswith(known)


@pytest.mark.parametrize("side", [1, 2, 8, 16])
@pytest.mark.parametrize("alternate", [False, True])
def test_each_order_visits_each_patch_once_and_curves_go_to_neighbours(side: int, alternate: bool) -> None:
    rounds = orders_of(("raster", "column", "zigzag", "zigzag8", "hilbert", "jpeg8", "sweep8"), side, alternate=alternate)
    assert len(rounds) == (56 if alternate else 28)
    for number, order in enumerate(rounds):
        assert sorted(order.tolist()) == list(range(side * side))
        rows, columns = (np.abs(np.diff(place)) for place in np.divmod(order, side))
        if 2 <= number % 28 < 12:
            assert (rows + columns == 1).all()
        elif 12 <= number % 28 < 20:
            assert (np.maximum(rows, columns) == 1).all()


def test_alternating_directions_that_would_not_alternate_are_refused() -> None:
    """As blocks change their direction after all of their orders: 5 blocks have 5 of eight, and of 5 with attention in 2
    three scan. Nor are orders that no block has.
    """
    Dis(kind="dis", width=16, depth=6, patch=1, order=("raster", "column"), directions="alternate")
    cases: list[tuple[tuple[Order, ...], int | None]] = [(("zigzag8",), None), (("raster", "column", "hilbert"), 2)]
    for order, attention in cases:
        with pytest.raises(ValidationError, match=r"alternate changes the direction after a round of order, which has \d blocks"):
            Dis(kind="dis", width=16, depth=4, patch=1, order=order, directions="alternate", attention_every=attention)
    with pytest.raises(ValidationError, match="order: 3 blocks scan, and column would be that of a later one"):
        Dis(kind="dis", width=16, depth=2, patch=1, order=("zigzag8", "column"))


def test_a_curve_that_does_not_fit_the_grid_is_refused() -> None:
    with pytest.raises(UserError, match="order hilbert needs a power of two patches on a side, got 6"):
        orders_of(("raster", "hilbert"), 6, alternate=False)


def test_columns_of_an_image_are_rows_of_its_transpose() -> None:
    """So another order changes nothing else, and each block restores the tokens' places for skips, positions and output."""
    rows, columns = dis(), dis(order=("column",))
    columns.load_state_dict(rows.state_dict())
    assert rows.position is not None
    assert columns.position is not None
    with torch.no_grad():
        grid = rows.position[:, 2:].unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
        columns.position.copy_(torch.cat([rows.position[:, :2], grid], dim=1))
    x, t, y = inputs()
    expected = rows(x, t, y)
    assert torch.allclose(columns(x.transpose(2, 3), t, y).transpose(2, 3), expected, atol=1e-6)
    assert not torch.allclose(columns(x, t, y), expected, atol=1e-2)


def test_blocks_take_the_orders_in_turn_and_then_reversed() -> None:
    """A block of one direction gets the last patch first in every second round; label and time stay before the patches."""
    model = dis(depth=4, directions="alternate", order=("raster", "column"))
    plain = torch.arange(16).view(4, 4)
    expected = [plain, plain.T, plain.flip(0, 1), plain.T.flip(0, 1), plain]
    for block, order in zip(model.blocks, expected, strict=True):
        assert isinstance(block, DiSBlock)
        got = torch.arange(18) if block.order is None else block.order
        assert got.tolist() == [0, 1, *(2 + order.flatten()).tolist()]
    assert len(model.get_parameter("blocks.0.mixer.conv")) == 1


def restoring(model: DiS) -> DiS:
    """The model as it is defined: each block gets its tokens by a gather, and restores their places by another one."""
    defined = copy.deepcopy(model)
    defined.place = None
    for block in defined.blocks:
        assert isinstance(block, DiSBlock)
        block.mixer = Restoring(block.mixer, block.order)
        block.order = block.place = block.skip_order = None
    return defined


class Restoring(torch.nn.Module):
    def __init__(self, mixer: torch.nn.Module, order: torch.Tensor | None):
        super().__init__()
        self.mixer, self.order = mixer, order

    def forward(self, n: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.mixer(n if self.order is None else n[:, self.order])
        return mixed if self.order is None else mixed[:, self.order.argsort()]


@pytest.mark.parametrize(
    "changes",
    [
        {"order": ("hilbert",)},
        {"order": ("raster", "column")},
        {"order": ("zigzag8",), "skip": "add", "conditioning": "adaln_zero"},
        {"order": ("jpeg8",), "mixer": "ssd", "combine": "hydra"},
        {"order": ("column", "hilbert"), "directions": "alternate", "skip": "none"},
        {"order": ("column", "zigzag"), "attention_every": 3, "drop_path": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpointing", ["none", "every_2"])
def test_tokens_that_stay_where_a_block_leaves_them_are_the_same(changes: dict[str, Any], checkpointing: str) -> None:
    """The next norm reads them there, a skip is put into the branch's order: outputs and gradients are those of restored places."""
    model = dis(depth=6, **changes)
    model.checkpointing = checkpointing
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)), alpha=0.05)
    x, t, y = inputs()
    drop = torch.tensor([[2.0, 0, 1]]).expand(len(model.drop_rates), 3) if model.drop_rates else None
    results = []
    for each in (model, restoring(model)):
        out = each(x, t, y, drop)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(each.parameters()))])
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("order", [("zigzag8",), ("column", "hilbert"), ("raster", "column")], ids=str)
@pytest.mark.parametrize("directions", [2, "alternate"])
def test_a_model_without_memory_has_an_order_too(order: tuple[str, ...], directions: Any) -> None:
    """Importing, warm starts and transfer build one."""
    with torch.device("meta"):
        model = DiS(dis(order=order, directions=directions).settings, SHAPE, 10)
    assert all(buffer.is_meta for buffer in model.buffers())
    assert [*model.buffers()]


def test_the_self_test_has_each_kind_of_norm() -> None:
    """Blocks in an order of their own, and those behind attention that have the stream's; a model in raster order has one kind."""
    mixed = {"order": ("raster", "column"), "attention_every": 3}
    for changes, expected in (({}, [False]), ({"order": ("hilbert",)}, [True]), (mixed, [False, True])):
        cases = dis(depth=6, **changes).kernel_cases(torch.device("cpu"), [2], training=False)
        assert [ordered for *_, ordered in cases] == expected


def test_the_published_order_adds_nothing_and_others_are_not_exported_as_published() -> None:
    assert list(dis().buffers()) == []
    assert dis().state_dict().keys() == dis(order=("hilbert", "zigzag")).state_dict().keys()
    with pytest.raises(UserError, match=r"the public layout of DiS has no order: \('column',\)"):
        public.to_official(dis(order=("column",)))
