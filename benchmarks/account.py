"""Where the time of a DiS block goes on an H200, by count: `python -m benchmarks.account`. Needs no GPU.

A training pass of each size at 256 pixels, bf16, 32 images, nothing recomputed; the mean of an in-block and of an out-block, which
concatenates its skip. Times are lower bounds, in ns per token: products at 790 TFLOP/s or 4.3 TB/s; the scan by its kernels'
instructions and the programs of the busiest multiprocessor; the convolution by its instructions; all other operations by the bytes
that they read and write at 4.8 TB/s, counted on tensors without memory. The MFU is of the whole model, with these times for its
blocks.

State-space duality, of the presets DiS2: its launches, with those of Hydra's convolution and of the norm behind its gate, are
compiled ahead, and each takes the longest of its instructions, its products at 790 TFLOP/s, and its bytes. Last, the sum of two
directions, whose convolutions count as S6's, and fewer images with more tokens.

The presets DiT+, and DiT-L/2 beside them: a block's attention counts as products, of 3.5 forward passes in both.

`waves` is the time that the scan's programs take relative to what they would if all multiprocessors had the same number: with one
lane per channel, and as the GPU is filled. `kernels` are a block's launches. `step MFU` is of a step of 128 images on one GPU, with
the optimizer at 4.3 TB/s; `images` is their number in a pass up to which an H200 waits for Python, as slow as it is and its host.
The bytes of the optimizer and Python's time for a block are those of dis_scale/planning/fleet.py.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.dit_counts import Counts
from benchmarks.instructions import BYTES_PER_S, CLOCK_HZ, SCHEDULERS, TOTALS, ahead, code, disassembled, launches_us
from benchmarks.instructions import MULTIPROCESSORS as SMS
from dis_scale.models.cost import price_model
from dis_scale.models.dis import network, s6, ssd
from dis_scale.models.dis.orders import Orders
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dit.network import DiT
from dis_scale.models.dit.settings import Dit
from dis_scale.models.families import preset
from dis_scale.planning.fleet import HOST_S, OPTIMIZER_BYTES
from dis_scale.recipe import LatentShape
from dis_scale.scan import Choice, duality, norms
from dis_scale.scan.backend import KeepingStates
from dis_scale.scan.triton_fill import Filling, filling
from dis_scale.scan.triton_launch import LANES, WARPS, Launch

SIZE, CLASSES, IMAGES = 32, 1000, 32
PEAK, PRODUCTS, COPIES = 989e12, 790e12, 4.3e12
"""FLOP/s in bf16 of the datasheet and of large products; bytes/s that copies reach."""
STEP_IMAGES = 128
SLOWER = 1.6
"""Times of this count that a block of DiS-L/2 took on an H200: benchmarks/results/kernels.md#a-blocks-time."""
STEP_S = 0.0039
"""Python's time for the optimizer, in which the GPU waits, on a CPU's core with joined weights; on an H200's host it was 25 ms with
a parameter for each weight (benchmarks/results/kernels.md#host-time)."""
CONV_NS = 61.9e3 / (32 * 258 * 2048)
"""Per token and channel, both passes: benchmarks/instructions.py."""
CONV_KERNELS = 3
"""Launches of one convolution in a training pass: forward, backward, and the sums of its weights' gradients."""


class Work(NamedTuple):
    """A block's operations, without scan and convolution; and the launches of state-space duality and of its convolution."""

    launches: int
    products_s: float
    bytes: float
    scan: list["Least"]
    conv: list["Least"]


class Products(Counts):
    """`Counts` that keeps products apart: `seconds` are theirs, of their FLOPs or of their bytes, and `bytes` all others'."""

    seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.bytes
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket.__name__.strip("_") in ("mm", "bmm", "addmm", "baddbmm"):
            moved, self.bytes, a = self.bytes - before, before, args[-2]
            self.seconds += max(2 * a.numel() * args[-1].shape[-1] / PRODUCTS, moved / COPIES)
        return result


class Least(NamedTuple):
    """Least seconds of launches on an H200, each the longest of three."""

    issued: float
    products: float
    bytes: float


def least(launch: Launch, arguments: tuple[Any, ...], program: Any) -> Least:
    """Count a launch: a loop in its kernel is over the heads of a program, over chunks, over a segment, or over the norm's rows.

    Each tensor moves once. A group of four warps shares a product's instruction.
    """
    numbers, groups = launch.numbers, math.prod(launch.grid) * launch.numbers.get("num_warps", WARPS) / WARPS
    rows = numbers.get("ROWS", 1)
    rounds = numbers.get("HEADS") or numbers.get("K") or -(-numbers.get("SEGMENT", 0) // rows) or rows
    times = [(op, rounds if depth else 1) for op, depth in code(program)]
    issued = WARPS * groups * sum(count for _, count in times)
    flops = groups * sum(count for op, count in times if op == "HGMMA")
    if shape := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", disassembled(program, "-sass")):
        flops *= 2 * math.prod(map(int, shape.groups()))
    return Least(issued / SCHEDULERS / CLOCK_HZ, flops / PRODUCTS, moved_bytes(arguments) / BYTES_PER_S)


def moved_bytes(arguments: tuple[Any, ...]) -> int:
    """Bytes of a launch's tensors, each once."""
    return sum({id(x): x.nbytes for x in tree_leaves(arguments) if x is not None}.values())


class _Nothing(torch.autograd.Function):
    """In place of a convolution or of attention: outputs like the first input, gradients like all inputs."""

    @staticmethod
    def forward(ctx: Any, outputs: int, *inputs: Tensor) -> Any:
        ctx.save_for_backward(*inputs)
        return tuple(torch.empty_like(inputs[0]) for _ in range(outputs))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, *[torch.empty_like(x) for x in ctx.saved_tensors]


@contextmanager
def recorded() -> Iterator[list[tuple[Launch, tuple[Any, ...], Any]]]:
    """Launches and their arguments, as `ahead` gives them; nothing is compiled."""
    found = list[tuple[Launch, tuple[Any, ...], Any]]()
    with patch.object(Launch, "__call__", lambda launch, *arguments: found.append((launch, arguments, None))):
        yield found


def operations(settings: Dis, *, skip: bool, images: int, T: int, orders: Orders = Orders()) -> Work:
    """Count a block's training pass. Launches of the selective scan and its convolution are not compiled: `row` has their time."""
    conv = patch.object(ssd, "causal_conv_silu", lambda *inputs, **_: _Nothing.apply(1, *inputs)[0])
    triton = [patch.object(x, "choose", lambda *_: Choice("triton", "by count")) for x in (duality, norms)]
    D, half = settings.width, torch.bfloat16
    with torch.device("meta"):
        block = network.DiSBlock(settings, "triton", skip=skip, orders=orders)
        h_BLD, skip_BLD = (torch.empty(images, T, D, dtype=half, requires_grad=True) for _ in range(2))
        r_BLD, c_BD = torch.empty(images, T, D, requires_grad=True), torch.empty(images, D, dtype=half)
        inputs = [h_BLD, r_BLD, *([skip_BLD] if skip else []), *block.parameters()]
        seen = ahead() if settings.mixer == "ssd" else recorded()
        with conv, triton[0], triton[1], seen as launched, KeepingStates(), Products() as counts:
            outs = block(h_BLD, r_BLD, c_BD, skip_BLD if skip else None, None)
            torch.autograd.grad(outs, inputs, [torch.empty_like(out) for out in outs])
    named = [(launch.kernel.fn.__name__, launch, arguments, program) for launch, arguments, program in launched]
    moved = sum(moved_bytes(arguments) for name, _, arguments, _ in named if name.startswith("added_norm"))
    scan = [least(*each) for name, *each in named if name.startswith(("ssd_", "gated_norm"))]
    convolution = [least(*each) for name, *each in named if settings.mixer == "ssd" and "conv" in name]
    replaced = CONV_KERNELS * settings.ways if (settings.mixer, settings.combine) == ("ssd", "sum") else 0
    return Work(counts.launches + len(launched) + replaced, counts.seconds, counts.bytes + moved, scan, convolution)


def tokens(settings: Dis, size: int) -> int:
    return settings.extra_tokens(CLASSES) + (size // settings.patch) ** 2


def waves(programs: int) -> float:
    return -(-programs // SMS) / (programs / SMS)


def scan_ns(fill: Filling, images: int, channels: int, length: int) -> float:
    """Per token."""
    return 1e3 * launches_us(TOTALS["scan, states kept"], fill, images, length, channels) / (images * length)


def conv_ns(settings: Dis) -> float:
    """Per token, of two directions with 4 taps each."""
    return CONV_NS * (s6.inner_width(settings.width) + (2 * settings.state_size if settings.mixer == "ssd" else 0))


def row(name: str, settings: Dis, images: int, size: int) -> None:
    """Print a size's time per token."""
    length, E, shape = tokens(settings, size), s6.inner_width(settings.width), LatentShape(4, size)
    both = [operations(settings, skip=skip, images=images, T=length) for skip in (False, True)]
    kernels, products_s, moved = (sum(x) / 2 for x in zip(*[work[:3] for work in both], strict=True))
    count, programs = images * length, images * -(-E // (LANES * WARPS))
    if settings.mixer == "ssd":
        ns, waved = 1e9 * sum(map(max, both[0].scan)) / count, (1.0, 1.0)
    else:
        fill = filling(programs, settings.state_size, 2, SMS)
        ns, waved = scan_ns(fill, images, E, length), (waves(programs), waves(programs * fill.backward))
    conv = 1e9 * sum(map(max, both[0].conv)) / count or conv_ns(settings)
    times = 1e9 * products_s / count, ns, conv, 1e9 * moved / BYTES_PER_S / count
    seconds = 1e-9 * sum(times) * length * (settings.depth + 1)
    cost = price_model(settings, shape, CLASSES)
    mfu = cost.training_flops(images) / seconds / PEAK
    step_s = STEP_IMAGES * seconds + STEP_S + OPTIMIZER_BYTES * cost.parameters / COPIES
    mfu_of_step = STEP_IMAGES * cost.training_flops(images) / step_s / PEAK
    paced = HOST_S / (SLOWER * 1e-9 * sum(times) * length)
    us = 1e-3 * sum(times) * count
    cells = *times, sum(times), mfu, mfu_of_step, paced, *waved, kernels, us
    print(f"{name:22}", *(f"{x:9.2f}" for x in cells))


def dit_row(name: str) -> None:
    """Print the time per token of a block of attention and MLP, in the columns that it has."""
    settings, shape = Dit(**preset(name)), LatentShape(4, SIZE)
    T, D, half = (SIZE // settings.patch) ** 2, settings.width, torch.bfloat16
    with torch.device("meta"):
        block = DiT(settings, shape, CLASSES).blocks[0]
        x_BTD, c_BD = torch.empty(IMAGES, T, D, requires_grad=True), torch.empty(IMAGES, D, dtype=half, requires_grad=True)
        with patch.object(F, "scaled_dot_product_attention", lambda q, k, v: _Nothing.apply(1, q, k, v)[0]), Products() as counts:
            out = block(x_BTD, c_BD)
            torch.autograd.grad(out, [x_BTD, c_BD, *block.parameters()], torch.empty_like(out))
    count, attention = IMAGES * T, 3.5 * 4 * IMAGES * T * T * D
    times = 1e9 * (counts.seconds + attention / PRODUCTS) / count, 1e9 * counts.bytes / BYTES_PER_S / count
    mfu = price_model(settings, shape, CLASSES).training_flops(IMAGES) / (1e-9 * sum(times) * T * settings.depth) / PEAK
    print(f"{name:22}", f"{times[0]:9.2f}", " " * 19, *(f"{x:9.2f}" for x in (times[1], sum(times), mfu)))


def main() -> None:
    heads = ("products", "scan", "conv", "other", "total", "MFU", "step MFU", "images", "waves", "filled", "kernels", "block us")
    print(f"{'':22}", *(f"{head:>9}" for head in heads))
    for name in (f"{family}-{size}/2" for family in ("DiS", "DiS2") for size in "SBMLH"):
        row(name, Dis(**preset(name)), IMAGES, SIZE)
    large = Dis(**preset("DiS2-L/2"))
    row("DiS2-L/2, sum", large.model_copy(update={"combine": "sum"}), IMAGES, SIZE)
    for name in ("DiT-L/2", "DiT+-S/2", "DiT+-B/2", "DiT+-L/2", "DiT+-XL/2"):
        dit_row(name)
    for images, size in ((8, 64), (2, 128)):
        row(f"DiS2-L/2, {tokens(large, size):,} tokens", large, images, size)
    print_orders(Dis(**preset("DiS-L/2")))


def print_orders(settings: Dis) -> None:
    """Print what else than products and scans a block with a long skip moves, by the orders that its ends have."""
    T = tokens(settings, SIZE)
    ours, theirs = np.arange(T)[::-1].copy(), np.roll(np.arange(T), 1)
    for name, orders in (
        ("no order", Orders()),
        ("one order", Orders(ours, ours, ours)),
        ("two orders", Orders(ours, theirs, ours)),
    ):
        each = [
            operations(settings, skip=skip, images=IMAGES, T=T, orders=orders).bytes / (IMAGES * T * settings.width)
            for skip in (False, True)
        ]
        print(f"DiS-L/2, {name:13} bytes a channel and token: {each[0]:.3f}, with a skip {each[1]:.3f}")


if __name__ == "__main__":
    main()
