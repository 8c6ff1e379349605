"""Generation of S4D's kernel by count: `python -m benchmarks.s4d_counts`. Needs no GPU.

For one direction of DiffuSSM-XL: launches and bytes of PyTorch's operations on fake tensors, and the instructions of the two
Triton kernels, compiled ahead for sm_90. A byte counts each time that an operation reads or writes it. Times are of an H200 at
its datasheet's peaks, without latency.
"""

import json
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from benchmarks.dit_counts import Counts
from benchmarks.instructions import BYTES_PER_S, CLOCK_HZ, LANES, SCHEDULERS, code, registers
from dis_scale.models.diffussm.s4d import S4D
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.families import preset
from dis_scale.scan import triton_s4d
from dis_scale.scan.s4d import tile_of

SETTINGS = DiffuSsm(**preset("DiffuSSM-XL"))
H, M = SETTINGS.width, SETTINGS.state_size // 2
TAPS = 1024, 4096


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


def generation(length: int) -> None:
    """Print a row for PyTorch's generation of a kernel, and one for Triton's; each of a forward and a backward pass."""
    with FakeTensorMode():
        layer = S4D(H, SETTINGS)
        parameters = [getattr(layer, name) for name in ("log_dt", "log_neg_re", "im", "B", "C")]
        with Counts() as made:
            taps = layer.kernel_in_chunks(length)
            torch.autograd.grad(taps, parameters, torch.empty_like(taps))
    us = 1e6 * made.bytes / BYTES_PER_S
    _print("generation by PyTorch", length, launches=made.launches, gbytes=made.bytes / 1e9, us=us)
    names = ("s4d_forward", "s4d_backward")
    used = {name: registers(compiled(name, length)) for name in names}
    moved = 4 * (2 * H * length + 2 * 7 * H * M)  # taps and their gradients, parameters and theirs
    least_us = sum(kernel_us(name, length) for name in names)
    facts = {"registers": [x.used for x in used.values()], "spilled_bytes": sum(x.spilled_bytes for x in used.values())}
    _print("generation by Triton", length, launches=2, gbytes=moved / 1e9, us=least_us, **facts)


def _print(name: str, length: int, **facts: Any) -> None:
    print(json.dumps({"name": name, "length": length} | facts), flush=True)


def main() -> None:
    for length in TAPS:
        generation(length)


if __name__ == "__main__":
    main()
