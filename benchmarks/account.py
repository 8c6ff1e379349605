"""Where the time of a DiS block goes on an H200, by count: `python -m benchmarks.account`. Needs no GPU.

A training pass of each size at 256 pixels, bf16, 32 images, nothing recomputed; the mean of an in-block and of an out-block, which
concatenates its skip. Times are lower bounds, in ns per token: products at 790 TFLOP/s; the scan by its kernels' instructions
and the programs of the busiest multiprocessor; the convolution by its instructions; all other operations by the bytes that they
read and write at 4.8 TB/s, counted on fake tensors. The MFU is of the whole model, with these times for its blocks.

`waves` is the time that the scan's programs take relative to what they would if all multiprocessors had the same number: with one
lane per channel, and as the GPU is filled. `kernels` are a block's launches, `us each` the time in which Python must launch
one, or the GPU waits.
"""

from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.dit_counts import Counts
from benchmarks.instructions import BYTES_PER_S, TOTALS, launches
from benchmarks.instructions import MULTIPROCESSORS as SMS
from dis_scale.models.cost import price_model
from dis_scale.models.dis import network, s6
from dis_scale.models.dis.settings import Dis
from dis_scale.models.families import preset
from dis_scale.recipe import LatentShape
from dis_scale.scan.triton_fill import Filling, filling
from dis_scale.scan.triton_launch import LANES, WARPS

SHAPE, CLASSES, IMAGES = LatentShape(channels=4, size=32), 1000, 32
PEAK, PRODUCTS = 989e12, 790e12
"""FLOP/s in bf16: of the datasheet, and of large products."""
CONV_NS = 61.9e3 / (32 * 258 * 2048)
"""Per token and channel, both passes: benchmarks/instructions.py."""
SCAN_KERNELS, CONV_KERNELS, NORM_KERNELS = 9, 3, 3
NORM_BYTES = 20
"""Per element of the stream, which is read twice: PyTorch's RMSNorm on a GPU is one kernel forward and two backward."""


class Work(NamedTuple):
    """A block's operations, without scan and convolution."""

    launches: int
    flops: float
    bytes: float


class Products(Counts):
    """`Counts` that keeps products apart: `flops` are theirs, `bytes` all others'."""

    flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.bytes
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.bytes, a = before, args[-2]
            self.flops += 2 * a.numel() * args[-1].shape[-1]
        return result


class _Nothing(torch.autograd.Function):
    """In place of scan, convolution and norm: outputs like the first input, gradients like all inputs."""

    @staticmethod
    def forward(ctx: Any, outputs: int, *inputs: Tensor) -> Any:
        ctx.save_for_backward(*inputs)
        return tuple(torch.empty_like(inputs[0]) for _ in range(outputs))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, *[torch.empty_like(x) for x in ctx.saved_tensors]


def operations(settings: Dis, skip: bool) -> Work:
    """Count a block's training pass."""
    norm = patch.object(
        network, "rms_norm", lambda *inputs: _Nothing.apply(1, *inputs)[0]
    )  # on the CPU it is not one kernel
    scans = patch.multiple(
        s6,
        two_way_scan=lambda f, b, z, **_: _Nothing.apply(1, *f, *b, z)[0],
        two_way_conv_silu=lambda *inputs, **_: _Nothing.apply(2, *inputs),
    )
    T, D, half = tokens(settings), settings.width, torch.bfloat16
    block = network.DiSBlock(settings, "auto", skip)
    h_BLD, skip_BLD = (torch.empty(IMAGES, T, D, dtype=half, requires_grad=True) for _ in range(2))
    r_BLD, c_BD = torch.empty(IMAGES, T, D, requires_grad=True), torch.empty(IMAGES, D, dtype=half)
    inputs = [h_BLD, r_BLD, *([skip_BLD] if skip else []), *block.parameters()]
    with norm, scans, Products() as counts:
        outs = block(h_BLD, r_BLD, c_BD, skip_BLD if skip else None, None)
        torch.autograd.grad(outs, inputs, [torch.empty_like(out) for out in outs])
    return Work(counts.launches + NORM_KERNELS, counts.flops, counts.bytes + NORM_BYTES * r_BLD.numel())


def tokens(settings: Dis) -> int:
    return settings.extra_tokens(CLASSES) + (SHAPE.size // settings.patch) ** 2


def waves(programs: int) -> float:
    return -(-programs // SMS) / (programs / SMS)


def scan_ns(fill: Filling, channels: int, length: int) -> float:
    """Per token."""
    return 1e3 * launches(TOTALS["scan, states kept"], fill, IMAGES, length, channels).us / (IMAGES * length)


def main() -> None:
    heads = "products", "scan", "conv", "other", "total", "MFU", "waves", "filled", "kernels", "block us", "us each"
    print(f"{'':10}", *(f"{head:>9}" for head in heads))
    for name in ("DiS-S/2", "DiS-B/2", "DiS-M/2", "DiS-L/2", "DiS-H/2"):
        settings = Dis(**preset(name))
        length, E = tokens(settings), s6.inner_width(settings.width)
        with FakeTensorMode():
            both = [operations(settings, skip) for skip in (False, True)]
        work = Work(*(sum(x) / 2 for x in zip(*both, strict=True)))
        count, programs = IMAGES * length, IMAGES * -(-E // (LANES * WARPS))
        fill = filling(programs, settings.state_size, 2, SMS)
        by_count = 1e9 * work.flops / PRODUCTS / count, 1e9 * work.bytes / BYTES_PER_S / count
        ns = by_count[0], scan_ns(fill, E, length), CONV_NS * E, by_count[1]
        flops = price_model(settings, SHAPE, CLASSES).training_flops(IMAGES)
        seconds = 1e-9 * sum(ns) * length * (settings.depth + 1)
        kernels, us = work.launches + SCAN_KERNELS + CONV_KERNELS, 1e-3 * sum(ns) * count
        row = (
            *ns, sum(ns), flops / seconds / PEAK, waves(programs), waves(programs * fill.backward), kernels, us, us / kernels,
        )  # fmt: skip
        print(f"{name:10}", *(f"{x:9.2f}" for x in row))


if __name__ == "__main__":
    main()
