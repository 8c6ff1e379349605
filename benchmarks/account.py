"""Where the time of a DiS block goes on an H200, by count: `python -m benchmarks.account`. Needs no GPU.

A training pass of each size at 256 pixels, bf16, 32 images, nothing recomputed; the mean of an in-block and of an out-block, which
concatenates its skip. Times are lower bounds, in ns per token: products at 790 TFLOP/s; the scan by its kernels' instructions
and the programs of the busiest multiprocessor; the convolution by its instructions; all other operations by the bytes that they
read and write at 4.8 TB/s, counted on tensors without memory. The MFU is of the whole model, with these times for its blocks.

State-space duality, of the presets DiS2: its launches, with those of the norm behind its gate, are compiled ahead, and each takes
the longest of its instructions, its products at 790 TFLOP/s, and its bytes. Last, the sum of two directions, and fewer images
with more tokens.

`waves` is the time that the scan's programs take relative to what they would if all multiprocessors had the same number: with one
lane per channel, and as the GPU is filled. `kernels` are a block's launches, `us each` the time in which Python must launch
one, or the GPU waits.
"""

import math
import re
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.dit_counts import Counts
from benchmarks.instructions import BYTES_PER_S, CLOCK_HZ, SCHEDULERS, TOTALS, ahead, code, disassembled, launches
from benchmarks.instructions import MULTIPROCESSORS as SMS
from dis_scale.models.cost import price_model
from dis_scale.models.dis import network, s6, ssd
from dis_scale.models.dis.settings import Dis
from dis_scale.models.families import preset
from dis_scale.recipe import LatentShape
from dis_scale.scan import Choice, duality, gated_norm
from dis_scale.scan.triton_fill import Filling, filling
from dis_scale.scan.triton_launch import LANES, WARPS, Launch, flat

SIZE, CLASSES, IMAGES = 32, 1000, 32
PEAK, PRODUCTS = 989e12, 790e12
"""FLOP/s in bf16: of the datasheet, and of large products."""
CONV_NS = 61.9e3 / (32 * 258 * 2048)
"""Per token and channel, both passes: benchmarks/instructions.py."""
SCAN_KERNELS, CONV_KERNELS, NORM_KERNELS = 9, 3, 3
NORM_BYTES = 20
"""Per element of the stream, which is read twice: PyTorch's RMSNorm on a GPU is one kernel forward and two backward."""


class Work(NamedTuple):
    """A block's operations, without scan and convolution; and the launches of state-space duality."""

    launches: int
    flops: float
    bytes: float
    scan: list["Least"]


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


class Least(NamedTuple):
    """Least seconds of launches on an H200, each the longest of three."""

    issued: float
    products: float
    bytes: float


def least(launch: Launch, arguments: tuple[Any, ...], program: Any) -> Least:
    """Count a launch: a loop in its kernel is over the heads of a program, over chunks, or over the norm's rows.

    Each tensor moves once. A group of four warps shares a product's instruction.
    """
    numbers, groups = launch.numbers, math.prod(launch.grid) * launch.numbers["num_warps"] / WARPS
    rounds = numbers.get("HEADS") or numbers.get("K") or numbers.get("ROWS", 1)
    times = [(op, rounds if depth else 1) for op, depth in code(program)]
    issued = WARPS * groups * sum(count for _, count in times)
    flops = groups * sum(count for op, count in times if op == "HGMMA")
    if shape := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", disassembled(program, "-sass")):
        flops *= 2 * math.prod(map(int, shape.groups()))
    moved = {id(x): x.nbytes for x in flat(arguments)}
    return Least(issued / SCHEDULERS / CLOCK_HZ, flops / PRODUCTS, sum(moved.values()) / BYTES_PER_S)


class _Nothing(torch.autograd.Function):
    """In place of scan, convolution and norm: outputs like the first input, gradients like all inputs."""

    @staticmethod
    def forward(ctx: Any, outputs: int, *inputs: Tensor) -> Any:
        ctx.save_for_backward(*inputs)
        return tuple(torch.empty_like(inputs[0]) for _ in range(outputs))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, *[torch.empty_like(x) for x in ctx.saved_tensors]


def operations(settings: Dis, skip: bool, images: int, T: int) -> Work:
    """Count a block's training pass."""
    norm = patch.object(
        network, "rms_norm", lambda *inputs: _Nothing.apply(1, *inputs)[0]
    )  # on the CPU it is not one kernel
    scans = patch.multiple(
        s6,
        two_way_scan=lambda f, b, z, **_: _Nothing.apply(1, *f, *b, z)[0],
        two_way_conv_silu=lambda *inputs, **_: _Nothing.apply(2, *inputs),
    )
    conv = patch.object(ssd, "causal_conv_silu", lambda *inputs, **_: _Nothing.apply(1, *inputs)[0])
    chosen, norm_chosen = (
        patch.object(x, "choose", lambda *_: Choice("triton", "by count")) for x in (duality, gated_norm)
    )
    D, half = settings.width, torch.bfloat16
    with torch.device("meta"):
        block = network.DiSBlock(settings, "auto", skip)
        h_BLD, skip_BLD = (torch.empty(images, T, D, dtype=half, requires_grad=True) for _ in range(2))
        r_BLD, c_BD = torch.empty(images, T, D, requires_grad=True), torch.empty(images, D, dtype=half)
        inputs = [h_BLD, r_BLD, *([skip_BLD] if skip else []), *block.parameters()]
        with norm, scans, conv, chosen, norm_chosen, ahead() as launched, Products() as counts:
            outs = block(h_BLD, r_BLD, c_BD, skip_BLD if skip else None, None)
            torch.autograd.grad(outs, inputs, [torch.empty_like(out) for out in outs])
    scan = [least(*launch) for launch in launched]
    return Work(counts.launches + NORM_KERNELS, counts.flops, counts.bytes + NORM_BYTES * r_BLD.numel(), scan)


def tokens(settings: Dis, size: int) -> int:
    return settings.extra_tokens(CLASSES) + (size // settings.patch) ** 2


def waves(programs: int) -> float:
    return -(-programs // SMS) / (programs / SMS)


def scan_ns(fill: Filling, images: int, channels: int, length: int) -> float:
    """Per token."""
    return 1e3 * launches(TOTALS["scan, states kept"], fill, images, length, channels).us / (images * length)


def conv_ns(settings: Dis) -> float:
    """Per token. Hydra's convolution has 7 taps instead of 4, and one direction."""
    E, N = s6.inner_width(settings.width), settings.state_size
    if settings.mixer == "s6":
        return CONV_NS * E
    return CONV_NS * (7 / 8 * (E + 4 * N) if settings.combine == "hydra" else E + 2 * N)


def row(name: str, settings: Dis, images: int, size: int) -> None:
    """Print a size's time per token."""
    length, E, shape = tokens(settings, size), s6.inner_width(settings.width), LatentShape(4, size)
    both = [operations(settings, skip, images, length) for skip in (False, True)]
    kernels, flops, moved = (sum(x) / 2 for x in zip(*[work[:3] for work in both], strict=True))
    count, programs = images * length, images * -(-E // (LANES * WARPS))
    if settings.mixer == "ssd":
        ns, waved = 1e9 * sum(map(max, both[0].scan)) / count, (1.0, 1.0)
    else:
        fill = filling(programs, settings.state_size, 2, SMS)
        ns, waved = scan_ns(fill, images, E, length), (waves(programs), waves(programs * fill.backward))
    times = 1e9 * flops / PRODUCTS / count, ns, conv_ns(settings), 1e9 * moved / BYTES_PER_S / count
    seconds = 1e-9 * sum(times) * length * (settings.depth + 1)
    mfu = price_model(settings, shape, CLASSES).training_flops(images) / seconds / PEAK
    kernels, us = kernels + (len(both[0].scan) or SCAN_KERNELS) + CONV_KERNELS, 1e-3 * sum(times) * count
    cells = *times, sum(times), mfu, *waved, kernels, us, us / kernels
    print(f"{name:22}", *(f"{x:9.2f}" for x in cells))


def main() -> None:
    heads = "products", "scan", "conv", "other", "total", "MFU", "waves", "filled", "kernels", "block us", "us each"
    print(f"{'':22}", *(f"{head:>9}" for head in heads))
    for name in (f"{family}-{size}/2" for family in ("DiS", "DiS2") for size in "SBMLH"):
        row(name, Dis(**preset(name)), IMAGES, SIZE)
    large = Dis(**preset("DiS2-L/2"))
    row("DiS2-L/2, sum", large.model_copy(update={"combine": "sum"}), IMAGES, SIZE)
    for images, size in ((8, 64), (2, 128)):
        row(f"DiS2-L/2, {tokens(large, size):,} tokens", large, images, size)


if __name__ == "__main__":
    main()
