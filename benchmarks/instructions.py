"""Cost of the Triton kernels by counting their instructions: `python -m benchmarks.instructions`. Needs no GPU.

The kernels are compiled ahead for sm_90, bf16, L258 E2048 N16 (DiS-L/2 at 256 pixels). Counts are per step and warp of 32
channels, for the scan also per state, from the machine code. An instruction of a warp takes one cycle of its scheduler, 8 on
the special-function units (MUFU), and 4 in the load-store unit (LSU), which four schedulers share. The largest of the three
sums is a lower bound of the time; the bytes at 4.8 TB/s are another. Both are given for B32 on an H200. Neither includes
latency.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dis_scale.scan import triton_conv, triton_scan
from dis_scale.scan.triton import CHUNK, LANES, ROWS, SEGMENT, WARPS

B, L, E, N = 32, 258, 2048, 16
SCHEDULERS, CLOCK_HZ, BYTES_PER_S = 132 * 4, 1.98e9, 4.8e12
"""An H200 at its highest clock; its copies reach 4.3 of the datasheet's 4.8 TB/s."""
CYCLES = {"MUFU": 8, "LSU": 4}
UNITS = {"MUFU": "MUFU", **dict.fromkeys(("LDG", "STG", "LDS", "STS", "LDL", "STL", "SHFL"), "LSU")}
SCAN = {"LANES": LANES, "WARPS": WARPS, "CHUNK": CHUNK, "E": E, "L": L, "N": N, "GATED": True, "STATE_ROWS": CHUNK}
SCAN |= {"u_row": E, "delta_row": E, "z_row": 2 * E, "dy_row": E}  # z is half of a product
CONV = {"LANES": LANES * WARPS, "ROWS": ROWS, "TAPS": 4, "E": E, "L": L, "FORWARD": True, "BACKWARD": True}
CONV |= {"x_row": 2 * E}
FLOAT32 = {"warp_sums", "dBC", "parameters"}
FLOAT32_PAIR = "*fp32", "*fp32"


def forward(second: bool, for_backward: bool, keep: bool = False) -> dict[str, Any]:
    order = {"REVERSE": second, "FIRST": not second, "SECOND": second}
    return SCAN | order | {"FOR_BACKWARD": for_backward, "KEEP": keep}


KERNELS: dict[str, dict[str, Any]] = {
    "scan_forward, first": forward(False, False),
    "scan_forward, second": forward(True, False),
    "scan_forward, first, for backward": forward(False, True),
    "scan_forward, second, for backward": forward(True, True),
    "scan_forward, first, keeps": forward(False, False, keep=True),
    "scan_forward, second, keeps": forward(True, False, keep=True),
    "scan_backward": SCAN | {"REVERSE": True, "STATES": N, "GATE_GRADIENT": False},
    "scan_backward, of the gate, too": SCAN | {"REVERSE": True, "STATES": N, "GATE_GRADIENT": True},
    "conv_forward": CONV,
    "conv_backward": CONV | {"SEGMENT": SEGMENT, "dy0_row": E, "dy1_row": E},
}
"""Compile-time constants of each kernel."""
BYTES = {
    "scan_forward, first": 8,  # u, delta; y for the second
    "scan_forward, second": 12,  # u, delta, z; y of the first, out
    "scan_forward, first, for backward": 12,  # u, delta; y; states
    "scan_forward, second, for backward": 18,  # u, delta, z, dy; y of the first, dz; states
    "scan_forward, first, keeps": 12,  # u, delta; y for the second; states
    "scan_forward, second, keeps": 18,  # u, delta, z; y of the first, out; states, y
    "scan_backward": 18,  # u, delta, z, dy; states, du, ddelta; parts of dB and dC, 128 channels in one
    "scan_backward, of the gate, too": 22,  # also y, dz
    "conv_forward": 6,  # x; both outputs
    "conv_backward": 8,  # x, both gradients; dx
}
"""Bytes read and written per element of (B, L, E). A second read within a chunk comes from a cache and does not count."""
FORWARD = ("scan_forward, first", "scan_forward, second")
TOTALS = {
    "scan, forward and backward": (
        *FORWARD, *(f"{name}, for backward" for name in FORWARD), "scan_backward", "scan_backward",
    ),
    "scan, recomputed forward and backward": (
        *(f"{name}, keeps" for name in FORWARD), "scan_backward", "scan_backward, of the gate, too",
    ),
    "convolution, forward and backward": ("conv_forward", "conv_backward"),
}  # fmt: skip
"""Launches of both directions."""
WORK = {
    **{name: {1: CHUNK * N, 2: 4 * N} for name in KERNELS if name.startswith("scan_forward")},
    **{name: {1: CHUNK * N, 2: CHUNK} for name in KERNELS if name.startswith("scan_backward")},
    "conv_forward": {0: ROWS},
    "conv_backward": {0: SEGMENT, 1: ROWS},
}
"""Units of work of a pass through the code at each depth of loops: a step and state of the scan, a step of the convolution.
Code that a program runs once is left out if it is much shorter than its loops."""


def compiled(name: str, capability: int, dtype: str) -> Any:
    """Compile a kernel as a launch with DiS-L/2 does: all pointers are multiples of 16 bytes."""
    module = triton_scan if name.startswith("scan") else triton_conv
    kernel, constants = getattr(module, name.split(",")[0]), KERNELS[name]
    pointer, halves = f"*{dtype}", f"*{'fp32' if constants.get('FOR_BACKWARD') is False else dtype}"
    types: dict[str, str | tuple[str, ...]] = dict.fromkeys(kernel.arg_names, pointer)
    types |= dict.fromkeys(FLOAT32, "*fp32") | dict.fromkeys(constants, "constexpr")
    if module is triton_scan:
        types |= {"inputs": (pointer, pointer, *["*fp32"] * 4), "gradients": (pointer, pointer)}
        types |= dict.fromkeys(("y_halves", "h_halves"), (halves, halves))
    else:
        types |= dict.fromkeys(("outs", "dys"), (pointer, pointer)) | dict.fromkeys(
            ("weights", "biases", "sums"), FLOAT32_PAIR
        )
    signature = {name: types[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    aligned: list[tuple[int, ...]] = []
    for i, kind in enumerate(signature.values()):
        aligned += [(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)]
    attributes = {path: [["tt.divisibility", 16]] for path in aligned if path not in values}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})


def disassembled(program: Any, *options: str) -> str:
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(program.asm["cubin"])
        cubin.flush()
        return subprocess.run([tool, *options, cubin.name], capture_output=True, text=True, check=True).stdout


class Registers(NamedTuple):
    used: int
    spilled_bytes: int


def registers(program: Any) -> Registers:
    """Registers of a thread, and spilled bytes."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", disassembled(program, "-res-usage"))
    assert usage
    return Registers(int(usage[1]), int(usage[2]))


def code(program: Any) -> list[tuple[str, int]]:
    """A kernel's instructions in order, and how many loops each one is in."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9]+)(.*?);", disassembled(program, "-sass"))
    operations = [(int(at, 16), op, rest) for at, op, rest in lines if op != "NOP"]
    targets = [(at, re.search(r"0x([0-9a-f]+)", rest)) for at, op, rest in operations if op == "BRA"]
    loops = [(int(to[1], 16), at) for at, to in targets if to and int(to[1], 16) < at]
    return [(op, sum(begin <= at <= end for begin, end in loops)) for at, op, _ in operations]


def counted(program: Any, work: dict[int, int]) -> dict[str, float]:
    """Cycles per unit of work and warp: in total and by unit. `work` has the units of each depth of loops that counts."""
    cycles = {"issued": 0.0, "MUFU": 0.0, "LSU": 0.0}
    for op, depth in code(program):
        if units := work.get(depth):
            cycles["issued"] += 1 / units
            if unit := UNITS.get(op):
                cycles[unit] += CYCLES[unit] / units
    return cycles


def main() -> None:
    times: dict[str, tuple[float, float]] = {}
    table = []
    for name, moved in BYTES.items():
        program = compiled(name, 90, "bf16")
        cycles = counted(program, WORK[name])
        units = N if name.startswith("scan") else 1
        least_us = 1e6 * max(cycles.values()) * units * B * L * E / LANES / SCHEDULERS / CLOCK_HZ
        times[name] = least_us, 1e6 * moved * B * L * E / BYTES_PER_S
        used = registers(program)
        facts = {"cycles": cycles, "us": least_us, "bytes_an_element": moved, "bytes_us": times[name][1]}
        print(json.dumps({"name": name, **used._asdict(), "shared_bytes": program.metadata.shared} | facts))
        table.append((name, *used, *cycles.values(), *times[name]))
    print(f"\n{'':38} {'registers':>9} {'spilled':>8} {'issued':>8} {'MUFU':>8} {'LSU':>8} {'us':>8} {'bytes us':>8}")
    for name, count, spilled, *numbers in table:
        print(f"{name:38} {count:9} {spilled:8}", *(f"{x:8.1f}" for x in numbers))
    for total, launched in TOTALS.items():
        print(f"{total:83}", *(f"{sum(times[name][i] for name in launched):8.1f}" for i in range(2)))


if __name__ == "__main__":
    main()
