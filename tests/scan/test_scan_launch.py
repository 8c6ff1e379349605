"""Launches of the Triton kernels, by a driver that compiles and launches nothing."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes only with PyTorch's builds for Linux")

from triton.runtime import driver

from benchmarks.host_time import NoLaunch, conv
from dis_scale.scan import Direction, triton_conv, triton_launch, triton_layout
from dis_scale.scan import triton as scan_triton


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
    monkeypatch.setattr(triton_launch, "_launched", {})
    layout = triton_layout.by_state, triton_layout.sum_scan, triton_layout.sum_conv
    for kernel in (*layout, triton_conv.conv_forward, triton_conv.conv_backward):  # no other test gets these kernels
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    return recorder


def sum_conv(sums: Tensor, parts: int) -> None:
    weight, bias = torch.empty(6, 4), torch.empty(6)
    triton_launch.launch(
        triton_layout.sum_conv, (1, 1, 1), (sums,), (weight,), (bias,), parts=parts, E=6, TAPS=4, SIZE=32
    )


def test_a_later_launch_passes_what_the_first_one_did(recorder: Recorder) -> None:
    sums = torch.empty(3, 5, 6)
    sum_conv(sums, 3)
    sum_conv(sums, 3)
    first, again = recorder.launched
    assert first[:5] == again[:5] == (1, 1, 1, 1, (sums,))
    assert first[7:] == again[7:] == (3, 6, 4, 32)


def test_the_number_of_parts_is_no_constant_and_alignment_and_type_are(recorder: Recorder) -> None:
    memory = torch.empty(1000)
    for sums, parts in ((memory, 1), (memory, 16), (memory[1:], 1), (memory.bfloat16(), 1), (memory[4:], 2)):
        sum_conv(sums, parts)
    assert [launch[3] for launch in recorder.launched] == [1, 1, 2, 3, 1]


def test_the_scans_small_kernels_compile(recorder: Recorder) -> None:
    """For types as in a mixer."""
    B, L, E, N = 2, 5, 8, 3
    u, parameters = torch.ones(B, L, E).bfloat16(), (torch.ones(E, N), torch.ones(E))
    b, c = torch.ones(B, L, 2 * N).bfloat16().chunk(2, -1)
    operands = scan_triton._operands(False, Direction(u, u, parameters[0], b, c, parameters[1], parameters[1]))
    gradients = scan_triton._sum_parts(operands[0], operands[0].parts(lanes=1), reverse=True)
    assert [(g.shape, g.dtype) for g in gradients] == [
        (x.shape, x.dtype) for x in (parameters[0], b, c, *[parameters[1]] * 2)
    ]
    assert [launch[:3] for launch in recorder.launched] == [(1, B, 2), (1, 2, 1)]


def test_a_convolution_launches_one_kernel_forward_and_two_backward(recorder: Recorder) -> None:
    forward, inputs = conv()
    outputs = forward()
    assert len(recorder.launched) == 1
    torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs])
    assert len(recorder.launched) == 3
