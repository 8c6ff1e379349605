"""DiffuSSM's convolution by count: `python -m benchmarks.s4d_counts`. Needs no GPU.

First, the generation of S4D's kernel for one direction of DiffuSSM-XL: launches and bytes of PyTorch's operations on fake
tensors, and the instructions of the two Triton kernels, compiled ahead for sm_90. Then the convolution of one block's input in
both directions, 32 images at 256 pixels and 8 at 512, forward and backward: what PyTorch's FFT moves, and the operations of
direct forms. A byte counts each time that an operation reads or writes it. An FFT counts as one pass over its input and output,
though cuFFT may make more; copies that it makes within the operation are not seen. Times are of an H200 at its datasheet's
peaks, without latency.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from benchmarks.dit_counts import Counts
from benchmarks.instructions import BYTES_PER_S, CLOCK_HZ, LANES, SCHEDULERS, code, registers
from dis_scale.models.diffussm.s4d import S4D, convolve
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.families import preset
from dis_scale.scan import triton_s4d
from dis_scale.scan.s4d import tile_of

SETTINGS = DiffuSsm(**preset("DiffuSSM-XL"))
H, M = SETTINGS.width, SETTINGS.state_size // 2
SHAPES = (32, 1024), (8, 4096)
"""Images and positions."""
FLOPS_PER_S = {"bf16": 989e12, "tf32": 494e12}
TILE, BLOCK = 16, 64
"""Steps of a tensor core's tile, which the diagonal of a triangular product fills by half; of a chunk of the form with states."""


def compiled(name: str, length: int) -> Any:
    kernel, constants = getattr(triton_s4d, name), {"L": length, "M": M} | tile_of(length)
    warps = constants.pop("num_warps")
    signature = {name: "constexpr" if name in constants else "*fp32" for name in kernel.arg_names}
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
    return compile(source, target=GPUTarget("cuda", 90, LANES), options={"num_warps": warps})


def kernel_us(name: str, length: int) -> float:
    """Least time of a Triton kernel at full issue: a program goes through its loops once per mode."""
    tile, program = tile_of(length), compiled(name, length)
    instructions = sum(depth > 0 for _, depth in code(program))
    tiles = -(-length // (tile["ROWS"] * tile["COLUMNS"])) if name == "s4d_forward" else 1
    return 1e6 * H * tiles * tile["num_warps"] * M * instructions / SCHEDULERS / CLOCK_HZ


def both_passes(job: Callable[[], tuple[Tensor, list[Tensor]]]) -> Counts:
    """Count the forward and the backward pass of a job, which returns its output and the inputs with gradients."""
    with FakeTensorMode(), Counts() as made:
        out, inputs = job()
        torch.autograd.grad(out, inputs, torch.empty_like(out))
    return made


def generation(length: int) -> None:
    """Print a row for PyTorch's generation of a kernel, and one for Triton's."""

    def job() -> tuple[Tensor, list[Tensor]]:
        layer = S4D(H, SETTINGS)
        return layer.kernel_in_chunks(length), [
            getattr(layer, name) for name in ("log_dt", "log_neg_re", "im", "B", "C")
        ]

    with FakeTensorMode():
        own = Counts()
        with own:
            S4D(H, SETTINGS)  # its initial values, which `both_passes` counts too
    made = both_passes(job)
    launches, moved = made.launches - own.launches, made.bytes - own.bytes
    _print("generation by PyTorch", length, launches=launches, gbytes=moved / 1e9, us=1e6 * moved / BYTES_PER_S)
    names = ("s4d_forward", "s4d_backward")
    used = {name: registers(compiled(name, length)) for name in names}
    moved = 4 * (2 * H * length + 2 * 7 * H * M)  # taps and their gradients, parameters and theirs
    least_us = sum(kernel_us(name, length) for name in names)
    facts = {"registers": [x.used for x in used.values()], "spilled_bytes": sum(x.spilled_bytes for x in used.values())}
    _print("generation by Triton", length, launches=2, gbytes=moved / 1e9, us=least_us, **facts)


def convolution(images: int, length: int) -> None:
    """Print a row for the FFT, and one for each direct form, of both directions of a block."""
    shape = images, length, 2 * H
    numbers = images * length * 2 * H

    def job() -> tuple[Tensor, list[Tensor]]:
        u = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
        kernel, skip = (torch.empty(n, requires_grad=True) for n in ((2 * H, length), (2 * H,)))
        return convolve(u, torch.fft.rfft(kernel, n=2 * length).T, skip), [u, kernel, skip]

    made = both_passes(job)
    _print(
        "convolution by FFT", length, launches=made.launches, gbytes=made.bytes / 1e9, us=1e6 * made.bytes / BYTES_PER_S
    )
    # Forward, the input's gradient and the kernel's gradient: three products of the same size.
    moved = 2 * 5 * numbers  # u and y; u, dy and du; bf16
    direct = 3 * numbers * (length + TILE)
    states = 3 * numbers * 2 * (BLOCK + 2 * 2 * M)
    recurrence = 3 * numbers * M * 7 / LANES  # instructions of a warp
    for name, us in {
        "convolution by Toeplitz products, bf16": 1e6 * direct / FLOPS_PER_S["bf16"],
        "convolution by Toeplitz products, the kernel as two bf16": 2e6 * direct / FLOPS_PER_S["bf16"],
        "convolution by chunks with states, tf32": 1e6 * states / FLOPS_PER_S["tf32"],
        "convolution by its recurrence, float32": 1e6 * recurrence / SCHEDULERS / CLOCK_HZ,
    }.items():
        _print(name, length, launches=3, gbytes=moved / 1e9, us=max(us, 1e6 * moved / BYTES_PER_S))


def _print(name: str, length: int, **facts: Any) -> None:
    print(json.dumps({"name": name, "length": length} | facts), flush=True)


def main() -> None:
    for _, length in SHAPES:
        generation(length)
    for images, length in SHAPES:
        convolution(images, length)


if __name__ == "__main__":
    main()
