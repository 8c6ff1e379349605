"""Time to compile the Triton kernels before a worker's first step: `python -m benchmarks.compilation`. Needs no GPU.

The kernels of DiS-L/2 at 256 pixels, bf16, by the path of a launch with a driver of an H100 that launches nothing, and those of
DiffuSSM-XL ahead for the same GPU. A row has the seconds of CPU time of one kernel, one after the other and each with an empty
cache, or their sum for what a worker compiles at its start; `again_s` is that of a later start, which reads them from
TRITON_CACHE_DIR. Not included: the launcher of each kernel, which the C compiler makes on a machine with a GPU.
"""

import itertools
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from benchmarks.host_time import NoLaunch
from benchmarks.instructions import E, L, N
from benchmarks.s4d_counts import SHAPES, compiled
from dis_scale.scan import triton as scan_triton
from dis_scale.scan import triton_backward, triton_conv, triton_layout, triton_numbers, triton_scan
from dis_scale.scan.triton_fill import FULL, Filling

FILLINGS = FULL, *(Filling(lanes, lanes, True) for lanes in (1, 2, 4, 8))
"""Lanes of a channel. With FULL the backward pass has a kernel for each direction, otherwise one for both at once."""
PASSES = {
    "sampling": [(False, False)],
    "training": [(True, False)],
    "training, all blocks recomputed": [(False, False), (True, True)],
    "training, some blocks recomputed": [(True, False), (True, True)],
}
"""What a worker compiles: passes, each with or without gradients, with or without kept states."""
S4D = "s4d_forward", "s4d_backward"
KERNELS = (
    triton_scan.scan_forward, triton_backward.scan_backward, triton_conv.conv_forward, triton_conv.conv_backward,
    triton_layout.by_state, triton_layout.sum_scan, triton_layout.sum_conv,
)  # fmt: skip


def inputs() -> tuple[list[Tensor], Tensor, Tensor]:
    """Inputs of both directions of a scan, then x and z, which are halves of a product; without memory, with a mixer's types."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    half = torch.bfloat16
    rows = [empty(1, L, width, dtype=half) for width in (E, E, 2 * N)]
    direction = [*rows[:2], empty(E, N), *rows[2].chunk(2, -1), empty(E), empty(E)]
    x, z = empty(1, L, 2 * E, dtype=half).chunk(2, -1)
    return [*direction, *direction], x, z


def scan(fill: Filling, gradients: bool, keep: bool) -> None:
    """Launch a scan's kernels; without memory they are compiled."""
    inputs_of_both, _, z = inputs()
    kind, directions = scan_triton._kind(False, z, inputs_of_both, fill)
    y, operands, kept = scan_triton._forward(triton_numbers.scan_forward(kind, keep), kind, z, directions, keep)
    if gradients:
        scan_triton._backward(triton_numbers.scan_backward(kind, keep, E), kind, z, operands, y, kept)


def convolution(gradients: bool) -> None:
    """Launch a convolution's kernels likewise."""
    _, x, _ = inputs()
    weights = [torch.empty(shape, device=x.device) for shape in ((E, 4), (E,)) * 2]
    outs, kind = scan_triton._conv_forward(x, weights), scan_triton._conv_kind(x, weights)
    if gradients:
        scan_triton._conv_backward(triton_numbers.conv_backward(kind, E, E), kind, x, weights, outs)  # type: ignore[arg-type]


class Compiled(NamedTuple):
    """A kernel, and the CPU time that it took, that of child processes included."""

    name: str
    seconds: float
    from_cache: bool


class Listener:
    """Notes each compilation."""

    def __init__(self) -> None:
        self.kernels: list[Compiled] = []
        self.began_s = cpu_s()

    def __call__(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        now_s = cpu_s()
        self.kernels.append(Compiled(src.name, now_s - self.began_s, cache_hit))
        self.began_s = now_s


def cpu_s() -> float:
    return sum(os.times()[:4])


def timed(launches: Callable[[], object]) -> list[Compiled]:
    """Return the kernels that launches compile, or load from the cache, in this order."""
    for kernel in KERNELS:
        kernel.device_caches = defaultdict(kernel.create_binder)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = listener = Listener()
        launches()
    return listener.kernels


def cold_and_warm(launches: Callable[[], object]) -> list[list[Compiled]]:
    """`timed` with an empty cache, and again with what it holds then."""
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        return [timed(launches) for _ in range(2)]


def report(name: str, launches: Callable[[], object], **facts: Any) -> None:
    """Print a row for each kernel, and their sums."""
    cold, warm = cold_and_warm(launches)
    for kernel in cold:
        print(json.dumps({"name": name, "kernel": kernel.name, "s": round(kernel.seconds, 2)} | facts), flush=True)
    total_s, again_s = (sum(kernel.seconds for kernel in kernels) for kernels in (cold, warm))
    slowest_s = max(kernel.seconds for kernel in cold)
    sums = {"s": round(total_s, 1), "slowest_s": round(slowest_s, 1), "again_s": round(again_s, 2)}
    print(json.dumps({"name": name, "kernels": len(cold)} | sums | facts), flush=True)


def main() -> None:
    driver.set_active(NoLaunch())
    cold_and_warm(lambda: convolution(gradients=False))  # loads the compiler
    for fill, (name, passes) in itertools.product(FILLINGS, PASSES.items()):

        def launches(fill: Filling = fill, passes: list[tuple[bool, bool]] = passes) -> None:
            for gradients, keep in passes:
                scan(fill, gradients, keep)

        report(name, launches, **fill._asdict())
    report("convolution", lambda: convolution(gradients=True))
    for _, length in SHAPES:
        report("S4D's kernel", lambda n=length: [compiled(each, n) for each in S4D], taps=length)


if __name__ == "__main__":
    main()
