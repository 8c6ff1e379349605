"""Scans and convolutions."""

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl

from dis_scale.models.checkpointing import run_block
from dis_scale.scan import choose, triton_backward, triton_layout, triton_numbers
from dis_scale.scan.backend import KeepingStates, keeps_states
from dis_scale.scan.triton_fill import Filling
from tests.support.scans import (
    CALLS,
    TOLERANCE,
    check_extreme_gates,
    check_results,
    check_views_are_bit_equal,
    fill_by,
    outputs_and_gradients,
    random_tensors,
    views,
)

# B, L, E, N: two chunks of 16 steps and two warps of 32 channels, the second of each incomplete; N is not a power of 2.
ODD = (1, 18, 33, 3)
# The interpreter truncates float32 to bfloat16, a GPU rounds: the error is one unit in the last place instead of half of one.
INTERPRETER_TOLERANCE = TOLERANCE | {torch.bfloat16: 2**-7 + 1e-5}


def test_on_a_cpu_triton_is_selected_only_by_name() -> None:
    assert str(choose("triton", "cpu")) == "triton (as asked)"
    assert choose("auto", "cpu").name != "triton"


@pytest.mark.parametrize("call", [call for call in CALLS if "conv" in call])
def test_outputs_and_gradients_equal_the_reference(call: str) -> None:
    """Those of scans: `test_kept_states_give_the_same_gradients`."""
    check_results(call, ODD, torch.float32, outputs_and_gradients(call, random_tensors(ODD), "triton"))


# A chunk without a remainder in two batch rows; more states than a chunk has steps; a second program of channels.
BORDERS = [(2, 16, 2, 2), (1, 17, 1, 17), (1, 2, 130, 2)]
# A single step; a chunk between two others.
OTHERS = [pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(1, 1, 1, 4), (1, 33, 3, 1)]]


@pytest.mark.parametrize("call", ["two-way scan", "two-way conv"])
@pytest.mark.parametrize("sizes", [*BORDERS, *OTHERS], ids=str)
def test_other_sizes(sizes: tuple[int, int, int, int], call: str) -> None:
    check_results(call, sizes, torch.float32, outputs_and_gradients(call, random_tensors(sizes), "triton"))


@pytest.mark.parametrize("call", [call for call in CALLS if "scan" in call])
@pytest.mark.parametrize("sizes", [ODD, *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in BORDERS)], ids=str)
def test_kept_states_give_the_same_gradients(sizes: tuple[int, int, int, int], call: str) -> None:
    """As when they are computed again, to the bit: in float32, in which y before the gate is kept without rounding."""
    if call != "two-way scan" and sizes != ODD:
        pytest.skip("the same kernels")
    tensors = random_tensors(sizes)
    with KeepingStates():
        kept = outputs_and_gradients(call, tensors, "triton")
    check_results(call, sizes, torch.float32, kept)
    for x, y in zip(kept, outputs_and_gradients(call, tensors, "triton"), strict=True):
        assert torch.equal(x, y)


def test_a_recomputed_scan_keeps_its_states() -> None:
    """Only in its second forward pass: the first one stores nothing. Two chunks."""
    sizes = (1, 17, 2, 2)
    tensors, kept = random_tensors(sizes), list[bool]()

    def block(*inputs: torch.Tensor) -> torch.Tensor:
        kept.append(keeps_states())
        (y,) = CALLS["two-way scan"](list(inputs), "triton")
        return y

    ways = ("block", "none")
    grads = [torch.autograd.grad(run_block(way, 0, block, *tensors), tensors, torch.ones(sizes[:3])) for way in ways]
    assert kept == [False, True, False]
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


# Lanes of a channel in both passes; chunks, warps and programs are incomplete; two programs of images.
FILLINGS = [
    ((1, 18, 33, 4), Filling(4, 2, True)),
    ((2, 17, 9, 8), Filling(8, 8, False)),
    pytest.param((1, 33, 19, 4), Filling(2, 4, True), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sizes", "fill"), FILLINGS, ids=str)
def test_a_channel_on_several_lanes(sizes: tuple[int, int, int, int], fill: Filling, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU with too few programs is filled. In float32 kept states give the same gradients, to the bit."""
    fill_by(fill, monkeypatch)
    tensors = random_tensors(sizes)
    got = outputs_and_gradients("two-way scan", tensors, "triton")
    check_results("two-way scan", sizes, torch.float32, got)
    with KeepingStates():
        kept = outputs_and_gradients("two-way scan", tensors, "triton")
    assert all(torch.equal(x, y) for x, y in zip(kept, got, strict=True))


def test_saved_tensors_may_return_with_other_strides() -> None:
    """As from a hook that moves them away and back. The inputs are views, which such a hook returns contiguous."""
    tensors = next(views((2, 5, 8, 2)))
    expected = outputs_and_gradients("two-way scan", tensors, "triton")
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)):
        got = outputs_and_gradients("two-way scan", tensors, "triton")
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def add_product(*fragments: Any) -> list[Any]:
    """c + a b of each warp for the fragments of PTX's mma.m16n8k8, without its truncation."""
    a0, a1, a2, a3, b0, b1, c0, c1, c2, c3 = (x.handle.data for x in fragments)
    outs = [tl.zeros_like(fragments[0]) for _ in range(4)]
    for warp in range(a0.shape[1]):
        low, high = np.hstack([rows(a0, warp), rows(a2, warp)]), np.hstack([rows(a1, warp), rows(a3, warp)])
        b = np.vstack([rows(b0, warp).T, rows(b1, warp).T])
        for out, a, c, odd in ((0, low, c0, 0), (1, low, c1, 1), (2, high, c2, 0), (3, high, c3, 1)):
            outs[out].handle.data[:, warp] = c[:, warp] + (a @ b)[:, odd::2].reshape(-1)
    return outs


def rows(fragment: Any, warp: int) -> Any:
    """Lane 4 g + t has row g, column t."""
    return fragment[:, warp].reshape(8, 4)


@pytest.mark.parametrize(
    ("lanes", "sizes"), [(4, (1, 18, 9, 4)), *[pytest.param(n, (1, 17, 5, n), marks=pytest.mark.slow) for n in (1, 2, 8)]]
)
def test_sums_by_products(lanes: int, sizes: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As for bfloat16 on a GPU, here in float32: the layout of the products, not their truncation."""
    monkeypatch.setattr(triton_backward, "add_product", add_product)
    monkeypatch.setattr(triton_numbers.ScanKind, "products", True)
    fill_by(Filling(1, lanes, False), monkeypatch)
    got = outputs_and_gradients("two-way scan", random_tensors(sizes), "triton")
    check_results("two-way scan", sizes, torch.float32, got)


def test_a_convolution_over_several_segments() -> None:
    """A program of its backward pass computes one segment; the second of these has an incomplete group of steps."""
    sizes = (2, triton_numbers.SEGMENT + 18, 2, 4)
    check_results("two-way conv", sizes, torch.float32, outputs_and_gradients("two-way conv", random_tensors(sizes), "triton"))


def test_sums_of_more_parts_than_are_loaded_together() -> None:
    parts, taps, E = 2 * triton_layout.TOGETHER.value + 1, 4, 30
    sums, weight, bias = torch.randn(parts, taps + 1, E), torch.empty(E, taps), torch.empty(E, dtype=torch.bfloat16)
    triton_layout.sum_conv[3, 1, 1]((sums,), (weight,), (bias,), parts, w_channel=taps, w_tap=1, E=E, TAPS=taps, SIZE=64)
    torch.testing.assert_close(weight, sums.sum(0)[:taps].t())
    torch.testing.assert_close(bias, sums.sum(0)[taps].bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("call", ["two-way scan", "two-way conv"])
def test_half_precision_is_rounded_once(call: str, dtype: torch.dtype) -> None:
    sizes = (1, 6, 3, 2)
    check_results(call, sizes, dtype, outputs_and_gradients(call, random_tensors(sizes, dtype), "triton"), INTERPRETER_TOLERANCE)


@pytest.mark.parametrize("call", [pytest.param("two-way scan", marks=pytest.mark.slow), "two-way conv"])
def test_views_and_contiguous_tensors_are_bit_equal(call: str) -> None:
    check_views_are_bit_equal(call, (2, 5, 3, 1), "triton")


def test_a_gated_scan_without_gradients_is_bit_equal() -> None:
    with torch.no_grad():
        (alone,) = CALLS["two-way scan"](random_tensors(ODD), "triton")
    assert torch.equal(alone, CALLS["two-way scan"](random_tensors(ODD), "triton")[0])


def test_gradients_twice_on_one_graph_are_the_same() -> None:
    """The states are stored in the gradients' memory until these are written; it must be allocated for each pass."""
    tensors = random_tensors((1, 17, 1, 1))
    (y,) = CALLS["two-way scan"](tensors, "triton")
    first, again = (torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, z) for x, z in zip(first, again, strict=True))


def test_extreme_gates() -> None:
    check_extreme_gates("triton")
