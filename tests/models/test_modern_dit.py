"""A modern DiT: each of LightningDiT's parts alone, and all, by their definitions."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dis_scale.models import build, public
from dis_scale.models.dit.network import DiT, DiTBlock
from dis_scale.models.dit.settings import MODERN, Dit, Part
from dis_scale.models.families import preset
from dis_scale.models.tokens import axial_angles
from dis_scale.process.errors import UserError
from dis_scale.recipe import LatentShape, reading
from tests.conftest import TINY

SIDE, D, HEADS = 3, 16, 2


def block(*modern: Part) -> DiTBlock:
    torch.manual_seed(0)
    settings = Dit(kind="dit", width=D, depth=1, heads=HEADS, patch=1, modern=modern)
    made = DiTBlock(settings, axial_angles(SIDE, D // HEADS).double() if "rotary" in modern else None).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return made


def normal(x: Tensor, rms: bool, eps: float) -> Tensor:
    centred = x if rms else x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def by_definition(b: DiTBlock, modern: tuple[Part, ...], x_BTD: Tensor, c_BD: Tensor) -> Tensor:
    """One head at a time; pairs of channels are complex numbers, turned by row and column."""
    rms = "rms_norm" in modern
    m = functional.silu(c_BD) @ b.modulation.weight.T + b.modulation.bias
    pieces = list(m[:, None].split(D, -1))
    if "no_shift" in modern:
        pieces = [torch.zeros(()), *pieces[:2], torch.zeros(()), *pieces[2:]]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = pieces
    weights = [torch.ones(()) if norm is None else norm for norm in (b.norm_a, b.norm_m)]
    h = normal(x_BTD, rms, 1e-6) * weights[0] * (1 + scale_a) + shift_a
    qkv = (h @ b.qkv.weight.T + b.qkv.bias).split(D, -1)
    out, size = [], D // HEADS
    for head in range(HEADS):
        q, k, v = (part[..., head * size : (head + 1) * size] for part in qkv)
        if "qk_norm" in modern:
            q, k = (
                normal(part, rms, 1e-6 if rms else 1e-5) * b.get_parameter(f"{name}.weight")
                + (0 if rms else b.get_parameter(f"{name}.bias"))
                for name, part in (("q_norm", q), ("k_norm", k))
            )
        if "rotary" in modern:
            rows, columns = torch.arange(SIDE**2) // SIDE, torch.arange(SIDE**2) % SIDE
            rates = torch.tensor([10000.0 ** (-4 * j / size) for j in range(size // 4)], dtype=torch.float64)
            turn = torch.polar(
                *torch.broadcast_tensors(rates.new_ones(()), torch.cat([rows[:, None] * rates, columns[:, None] * rates], 1))
            )
            q, k = (torch.view_as_real(torch.complex(t[..., ::2], t[..., 1::2]) * turn).flatten(-2) for t in (q, k))
        out.append((q @ k.transpose(1, 2) / math.sqrt(size)).softmax(-1) @ v)
    x_BTD = x_BTD + gate_a * (torch.cat(out, -1) @ b.out.weight.T + b.out.bias)
    h = (normal(x_BTD, rms, 1e-6) * weights[1] * (1 + scale_m) + shift_m) @ b.up.weight.T + b.up.bias
    if "swiglu" in modern:
        gate, value = h.chunk(2, -1)
        h = gate / (1 + (-gate).exp()) * value
    else:
        h = 0.5 * h * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh())
    x_BTD = x_BTD + gate_m * (h @ b.down.weight.T + b.down.bias)
    return x_BTD


@pytest.mark.parametrize("modern", [(), *[(part,) for part in MODERN], MODERN], ids=lambda m: "+".join(m) or "none")
def test_a_block_is_that_of_its_definition_with_its_gradients(modern: tuple[Part, ...]) -> None:
    made = block(*modern)
    x, c = (torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in ((SIDE**2, D), (D,)))
    ours, theirs = made(x, c), by_definition(made, modern, x, c)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)  # the angles are float32
    weights = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), [x, c, *made.parameters()]) for y in (ours, theirs)), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6 * max(1.0, b.abs().max().item()))


def test_a_model_hands_its_blocks_what_they_need_and_ends_by_its_norm() -> None:
    """Patches and their table, blocks that turn by row and column, and the last norm with weights."""
    torch.manual_seed(1)
    settings = Dit(kind="dit", width=D, depth=2, heads=HEADS, patch=1, modern=MODERN)
    model = build(settings, LatentShape(2, SIDE), 10).double()
    assert isinstance(model, DiT)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    image, t, label = torch.randn(2, 2, SIDE, SIDE, dtype=torch.float64), torch.tensor([3.0, 900.0]).double(), torch.tensor([1, 10])
    c = model.condition(t, label)
    x = image.flatten(2).transpose(1, 2) @ model.patches.weight.T + model.patches.bias + model.get_buffer("position")
    for each in model.blocks:
        assert isinstance(each, DiTBlock)
        x = by_definition(each, MODERN, x, c)
    shift, scale = (functional.silu(c) @ model.modulation.weight.T + model.modulation.bias)[:, None].split(D, -1)
    out = (normal(x, True, 1e-6) * model.get_parameter("norm") * (1 + scale) + shift) @ model.final.weight.T + model.final.bias
    assert torch.allclose(model(image, t, label), out.transpose(1, 2).unflatten(2, (SIDE, SIDE)), rtol=1e-6, atol=1e-6)


def test_parts_in_another_order_are_the_same_network() -> None:
    one, other = (
        reading.load(TINY, [f"models={{a: {{kind: dit, width: 16, depth: 2, heads: 2, patch: 2, modern: [{parts}]}}}}"]).models["a"]
        for parts in ("rotary, qk_norm", "qk_norm, rotary")
    )
    assert one == other


def test_without_parts_a_block_is_as_before_them_to_the_bit() -> None:
    """The operations of the block that had no parts, in their order."""
    made = block().float()
    x_BTD, c_BD = torch.randn(2, SIDE**2, D), torch.randn(2, D)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
        part[:, None] for part in made.modulation(functional.silu(c_BD)).chunk(6, 1)
    )
    h = torch.addcmul(shift_a, functional.layer_norm(x_BTD, (D,), eps=1e-6), 1 + scale_a)
    q, k, v = made.qkv(h).reshape(2, SIDE**2, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
    attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, SIDE**2, D)
    by_dit = x_BTD + gate_a * made.out(attended)
    h = torch.addcmul(shift_m, functional.layer_norm(by_dit, (D,), eps=1e-6), 1 + scale_m)
    by_dit = by_dit + gate_m * made.down(functional.gelu(made.up(h), approximate="tanh"))
    assert torch.equal(made(x_BTD, c_BD), by_dit)


@pytest.mark.parametrize("modern", [("qk_norm",), ("qk_norm", "rms_norm", "rotary")])
def test_a_model_in_half_precision_computes_about_the_same(modern: tuple[Part, ...]) -> None:
    torch.manual_seed(0)
    model = build(Dit(kind="dit", width=64, depth=1, heads=2, patch=2, modern=modern), LatentShape(4, 8), 10)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), torch.tensor([1, 2])
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
        expected = model(x, t, y)
        half = model.bfloat16()(x.bfloat16(), t, y)
    assert float((half.float() - expected).norm()) < 0.03 * float(expected.norm())


def test_without_parts_the_weights_are_those_of_dit() -> None:
    """And a modern block has LightningDiT's: two thirds of the MLP's width three times, four vectors of the condition."""
    old, new = (Dit(**preset(name) | {"depth": 1}) for name in ("DiT-S/2", "DiT+-S/2"))
    assert {name.split(".", 2)[2] for name in build(old, LatentShape(4, 8), 10).state_dict() if name.startswith("blocks")} == {
        f"{layer}.{kind}" for layer in ("qkv", "out", "up", "down", "modulation") for kind in ("weight", "bias")
    }
    shapes = {name: tuple(w.shape) for name, w in DiTBlock(new).named_parameters()}
    assert shapes["up.weight"] == (2 * 1024, 384)
    assert shapes["down.weight"] == (384, 1024)
    assert shapes["modulation.weight"] == (4 * 384, 384)
    assert shapes["q_norm.weight"] == (64,)


def test_parts_that_do_not_fit_are_refused() -> None:
    model = build(Dit(kind="dit", width=D, depth=1, heads=2, patch=2, modern=("swiglu",)), LatentShape(4, 8), 10)
    assert isinstance(model, DiT)
    with pytest.raises(UserError, match=r"the public layout of DiT has no modern: \[swiglu\]"):
        public.layout(model)
    for option, message in {
        "heads: 8, modern: [rotary]": "rotary needs heads whose size is a multiple of 4, got 2",
        "heads: 2, modern: [swiglu, swiglu]": "modern names a part twice: swiglu, swiglu",
    }.items():
        with pytest.raises(UserError, match=message):
            reading.load(TINY, [f"models.a={{kind: dit, width: 16, depth: 2, patch: 2, {option}}}"])
