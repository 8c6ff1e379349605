"""Launches of the Triton kernels, by a driver that compiles and launches nothing."""

import functools
import math
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton comes only with PyTorch's builds for Linux")

from triton.runtime import driver

from benchmarks.account import recorded
from benchmarks.host_time import NoLaunch, conv
from dis_scale.scan import Direction, triton_conv, triton_layout, triton_numbers
from dis_scale.scan import triton as scan_triton
from dis_scale.scan.backend import KeepingStates
from dis_scale.scan.triton_fill import FULL
from dis_scale.scan.triton_launch import ALIGNMENT, Launch
from dis_scale.scan.triton_memory import new_parts


class Recorder(NoLaunch):
    """Records the grid, the number of the compiled kernel and the arguments of each launch."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def launcher_cls(self, *_: Any) -> Any:
        return lambda x, y, z, stream, function, packed, metadata, enter, leave, *arguments: self.launched.append(
            (x, y, z, function, *arguments)
        )

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        self.loaded = getattr(self, "loaded", 0) + 1
        return 1, self.loaded, 0, 0, 1024


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setattr(driver, "_active", recorder := Recorder())
    for cached in ("scan_forward", "scan_backward", "conv_forward", "conv_backward"):  # they keep compiled kernels
        monkeypatch.setattr(triton_numbers, cached, functools.cache(getattr(triton_numbers, cached).__wrapped__))
    layout = triton_layout.by_state, triton_layout.sum_scan, triton_layout.sum_conv
    for kernel in (*layout, triton_conv.conv_forward, triton_conv.conv_backward):  # no other test gets these kernels
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    return recorder


def sum_conv(parts: int) -> Launch:
    return Launch(triton_layout.sum_conv, (1, 1, 1), parts=parts, w_channel=4, w_tap=1, E=6, TAPS=4, SIZE=32)


def test_a_later_launch_passes_what_the_first_one_did(recorder: Recorder) -> None:
    launch, sums, weight, bias = sum_conv(3), torch.empty(3, 5, 6), torch.empty(6, 4), torch.empty(6)
    launch((sums,), (weight,), (bias,))
    launch((sums,), (weight,), (bias,))
    first, again = recorder.launched
    assert first[:5] == again[:5] == (1, 1, 1, 1, (sums,))
    assert first[7:] == again[7:] == (3, 4, 1, 6, 4, 32)


def test_the_number_of_parts_is_no_constant(recorder: Recorder) -> None:
    for parts in (1, 16):
        sum_conv(parts)((torch.empty(parts, 5, 6),), (torch.empty(6, 4),), (torch.empty(6),))
    assert [launch[3] for launch in recorder.launched] == [1, 1]


def test_the_scans_small_kernels_compile(recorder: Recorder) -> None:
    """For types as in a mixer."""
    B, L, E, N = 2, 5, 8, 3
    u, A, ones = torch.ones(B, L, E).bfloat16(), torch.ones(E, N), torch.ones(E)
    b, c = torch.ones(B, L, 2 * N).bfloat16().chunk(2, -1)
    directions = [Direction(u, u, A, b, c, ones, ones)]
    kind = scan_triton._kind(False, None, directions, FULL)
    (BC,) = scan_triton._by_state(triton_numbers.scan_forward(kind, False).by_state, kind, directions)
    operands = scan_triton.Operands(u, u, A, BC, ones, ones)
    launches, parts = triton_numbers.scan_backward(kind, False, E, E, N), new_parts(operands.BC, N, E, 1)
    _, *gradients = scan_triton._new_gradients(operands, [dtype for dtype in kind.types[3:5] if dtype])
    launches.sums[0](parts.dBC, parts.parameters, *gradients)
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in (A, b, c, ones, ones)]
    assert [launch[:3] for launch in recorder.launched] == [(1, B, 2), (1, 2, 1)]


def test_a_convolution_launches_one_kernel_forward_and_two_backward(recorder: Recorder) -> None:
    forward, inputs = conv()
    outputs = forward()
    assert len(recorder.launched) == 1
    torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs])
    assert len(recorder.launched) == 3


def test_b_and_c_may_begin_anywhere(recorder: Recorder) -> None:
    memory, out = torch.empty(50), torch.empty(1, 2, 4, 3, 4)
    for offset in (0, 1):
        b = memory[offset : offset + 15].view(1, 5, 3)
        sizes = {"rows": (3, 3), "L": 5, "N": 3, "LENGTH": 16, "STATES": 4, "SIZE": 32}
        Launch(triton_layout.by_state, (1, 1, 2), **sizes, REVERSE=False)(b, b, b, b, (out,))
    assert [launch[3] for launch in recorder.launched] == [1, 1]


def unaligned(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
    """A tensor that begins `offset` numbers after its memory and needs a gradient."""
    memory = torch.ones(math.prod(shape) + offset, dtype=dtype)
    return memory[offset:].view(shape).requires_grad_()


SEEN = dict[Launch, list[torch.dtype]]()
TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(
    types=st.lists(TYPES, min_size=16, max_size=16), offsets=st.lists(st.sampled_from([0, 0, 1, 8]), min_size=16, max_size=16),
    two=st.booleans(), gated=st.booleans(), keep=st.booleans(), offset=st.sampled_from([0, 3]),
)  # fmt: skip
def test_a_launch_always_gets_tensors_of_one_kind(
    types: list[torch.dtype], offsets: list[int], two: bool, gated: bool, keep: bool, offset: int
) -> None:
    """It takes the kernel of its first call for all calls."""
    B, L, E, N = 2, 3, 8, 2
    shapes = [*[(B, L, E), (B, L, E), (E, N), (B, L, N), (B, L, N), (E,), (E,)] * 2, (B, L, E), (B, L, E)]
    tensors = [unaligned(*each) for each in zip(shapes, types, offsets, strict=True)]
    z, dy = tensors[14] if gated else None, tensors[15].detach()

    with recorded() as launched, KeepingStates() if keep else nullcontext():
        y = scan_triton._Scan.apply(False, z, *tensors[: 14 if two else 7])
        y.backward(dy.to(y.dtype))
        weights = [unaligned(shape, types[0], offset) for shape in ((E, 4), (E,))]
        sum(scan_triton._Conv.apply(tensors[0], *weights, *weights)).backward(dy.to(types[0]))
    for launch, arguments, _ in launched:
        got = [(x.dtype, x.data_ptr() % ALIGNMENT) for x in tree_leaves(arguments)]
        first = 4 if launch.kernel is triton_layout.by_state else 0
        assert not any(remainder for _, remainder in got[first:])
        assert SEEN.setdefault(launch, [dtype for dtype, _ in got]) == [dtype for dtype, _ in got]
