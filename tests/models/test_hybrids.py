"""Attention among the scans of a DiS: by its definition, where it is, and what it costs."""

from typing import Literal

import pytest
import torch

from dis_scale.models import build, public
from dis_scale.models.cost import price_model
from dis_scale.models.dis.attention import Attention
from dis_scale.models.dis.network import DiS
from dis_scale.models.dis.s6 import Mixer
from dis_scale.models.dis.settings import Dis, head_size
from dis_scale.models.dis.ssd import SsdMixer
from dis_scale.models.tokens import axial_angles
from dis_scale.process.errors import UserError
from dis_scale.recipe import LatentShape, reading
from tests.conftest import TINY

SHAPE = LatentShape(2, 4)


def dis(every: int | None, mixer: Literal["s6", "ssd"] = "s6") -> DiS:
    model = build(Dis(kind="dis", width=16, depth=4, patch=1, mixer=mixer, attention_every=every), SHAPE, 10, seed=0)
    assert isinstance(model, DiS)
    return model


def by_definition(layer: Attention, h_BLD: torch.Tensor) -> torch.Tensor:
    """One head, image and query at a time; pairs are complex numbers, which are turned by their position's angle."""
    size = len(layer.q_norm)
    angles = torch.cat([torch.zeros(2, size // 2), axial_angles(4, size)]).to(h_BLD)
    out = torch.zeros_like(h_BLD)
    for image, h_LD in enumerate(h_BLD):
        qkv_L3HD = (h_LD @ layer.qkv.T).view(len(h_LD), 3, -1, size)
        for head in range(qkv_L3HD.shape[2]):
            q, k, v = qkv_L3HD[:, :, head].unbind(1)
            turned = []
            for x, weight in ((q, layer.q_norm), (k, layer.k_norm)):
                x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight
                turned.append(torch.complex(x[:, ::2], x[:, 1::2]) * torch.polar(torch.ones_like(angles), angles))
            scores = (turned[0] @ turned[1].conj().T).real / size**0.5
            out[image, :, head * size : (head + 1) * size] = scores.softmax(1) @ v
    return out @ layer.out_proj.T


def test_attention_is_that_of_its_definition_with_its_gradients() -> None:
    torch.manual_seed(0)
    layer = Attention(16, 4, extras=2, side=4).double()
    with torch.no_grad():
        layer.q_norm.uniform_(0.5, 2)
        layer.k_norm.uniform_(0.5, 2)
    h = torch.randn(2, 18, 16, dtype=torch.float64, requires_grad=True)
    assert head_size(16) == 16
    assert torch.allclose(layer(h), by_definition(layer, h), atol=1e-6)  # the angles are float32
    weights = torch.randn(2, 18, 16, dtype=torch.float64)
    ours = torch.autograd.grad((layer(h) * weights).sum(), [h, *layer.parameters()])
    theirs = torch.autograd.grad((by_definition(layer, h) * weights).sum(), [h, *layer.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_scores_know_the_distance_of_two_patches_alone() -> None:
    """So they are the same at another place of a larger image."""

    def score(query: int, key: int, side: int) -> torch.Tensor:
        angles = axial_angles(side, 16)[[query, key]]
        return torch.polar(torch.ones(8), angles[0]) * torch.polar(torch.ones(8), angles[1]).conj()

    assert torch.allclose(score(0, 6, 4), score(9, 19, 8), atol=1e-6), "one row and two columns away"
    assert not torch.allclose(score(0, 6, 4), score(0, 9, 4), atol=1e-2), "two rows and one column away"


STANDS: list[tuple[Literal["s6", "ssd"], int | None, list[int]]] = [
    ("s6", None, []), ("s6", 6, []), ("s6", 5, [4]), ("s6", 2, [1, 3]), ("s6", 1, [0, 1, 2, 3, 4]),
    ("ssd", 6, []), ("ssd", 5, [4]), ("ssd", 2, [1, 3]),
]  # fmt: skip


@pytest.mark.parametrize(("mixer", "every", "where"), STANDS)
def test_attention_stands_in_every_kth_block(mixer: Literal["s6", "ssd"], every: int | None, where: list[int]) -> None:
    model = dis(every, mixer)
    assert [i for i, block in enumerate(model.blocks) if isinstance(block.mixer, Attention)] == where
    assert sum(isinstance(block.mixer, Mixer if mixer == "s6" else SsdMixer) for block in model.blocks) == 5 - len(where)
    x, t, y = torch.randn(2, 2, 4, 4), torch.tensor([3.0, 900.0]), torch.tensor([1, 10])
    model(x, t, y).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("mixer", ["s6", "ssd"])
def test_more_blocks_than_there_are_change_no_bit(mixer: Literal["s6", "ssd"]) -> None:
    x, t, y = torch.randn(2, 2, 4, 4), torch.tensor([3.0, 900.0]), torch.tensor([1, 10])
    assert dis(6, mixer).state_dict().keys() == dis(None, mixer).state_dict().keys()
    assert torch.equal(dis(6, mixer)(x, t, y), dis(None, mixer)(x, t, y))
    assert [dis(every).settings.curve for every in (6, 5)] == ["dis", "dis + attention every 5"]


def test_the_cost_of_attention_is_counted() -> None:
    """Four products of the width and two of the tokens; normalisations and rotations count as nothing."""

    def macs(depth: int, every: int | None) -> float:
        settings = Dis(kind="dis", width=16, depth=depth, patch=1, skip="none", attention_every=every)
        return price_model(settings, SHAPE, 10).gmacs_forward * 1e9

    assert (macs(6, 1) - macs(4, 1)) / 2 == pytest.approx(4 * 18 * 16**2 + 2 * 18**2 * 16)
    assert macs(6, 7) - macs(6, None) == pytest.approx((macs(6, 1) - macs(6, None)) / 7), "one block of seven"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="attention_every needs a width that is a multiple of 4, got 18"):
        reading.load(TINY, ["models.a={kind: dis, width: 18, depth: 2, patch: 2, attention_every: 2}"])
    with pytest.raises(UserError, match="the public layout of DiS has no attention_every: 2"):
        public.to_official(dis(2))
    narrow = Dis(kind="dis", width=96, depth=2, patch=2, attention_every=2)
    assert narrow.base_width_refusal(64, {}) == (
        "attention's heads have 48 channels here and 64 at base_width 64: choose multiples of 64"
    )
    assert narrow.model_copy(update={"attention_every": None}).base_width_refusal(64, {}) is None
    assert narrow.model_copy(update={"attention_every": 9}).base_width_refusal(64, {}) is None, "no block is one of attention"
    assert Dis(kind="dis", width=30, depth=2, patch=2).base_width_refusal(64, {}) is None
