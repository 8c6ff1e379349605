"""Cost of the Triton kernels by counting their instructions: `python -m benchmarks.instructions`. Needs no GPU.

The kernels are compiled ahead for sm_90, bf16, L258 E2048 N16 (DiS-L/2 at 256 pixels). Counts are per step and warp of 32
channels, for the scan also per state, from the machine code. An instruction of a warp takes one cycle of its scheduler, 8 on
the special-function units (MUFU), and 4 in the load-store unit (LSU), which four schedulers share. The largest of the three
sums is a lower bound of the time; the bytes at 4.8 TB/s are another. Both are given for B32 on an H200. Neither includes
latency. The last group of steps runs completely, with masks: L258 takes 260 or 272 steps.
"""

import contextlib
import functools
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from dis_scale.scan import triton_backward, triton_conv, triton_fill, triton_scan
from dis_scale.scan.triton_fill import Filling
from dis_scale.scan.triton_launch import CHUNK, LANES, WARPS, Launch
from dis_scale.scan.triton_numbers import ROWS, SEGMENT

B, L, E, N = 32, 258, 2048, 16
MULTIPROCESSORS, REGISTERS, CLOCK_HZ, BYTES_PER_S = 132, 65536, 1.98e9, 4.8e12
"""An H200 at its highest clock; its copies reach 4.3 of the datasheet's 4.8 TB/s."""
SCHEDULERS = 4 * MULTIPROCESSORS
CYCLES = {"MUFU": 8, "LSU": 4}
TARGET = re.compile("0x([0-9a-f]+)")
UNITS = {"MUFU": "MUFU", **dict.fromkeys(("LDG", "STG", "LDS", "STS", "LDL", "STL", "SHFL"), "LSU")}
SCAN = {"LANES": LANES, "WARPS": WARPS, "SPLIT": 1, "CHUNK": CHUNK, "E": E, "L": L, "N": N, "STATE_ROWS": CHUNK}
SCAN |= {"GATED": True, "u_row": E, "delta_row": E, "z_row": 2 * E, "dy_row": E}  # z is half of a product
SCAN |= {"A_channel": 1, "A_state": E}
CONV = {"LANES": LANES * WARPS, "ROWS": ROWS, "TAPS": 4, "E": E, "L": L, "FORWARD": True, "BACKWARD": True, "AHEAD": 0}
CONV |= {"x_row": 2 * E, "w_channel": 1, "w_tap": E}
FUNCTIONS: dict[str, Any] = {
    "scan_forward": triton_scan.scan_forward,
    "scan_backward": triton_backward.scan_backward,
    "conv_forward": triton_conv.conv_forward,
    "conv_backward": triton_conv.conv_backward,
}
FLOAT32 = {"warp_sums", "dBC", "parameters"}
FLOAT32_PAIR = "*fp32", "*fp32"


def forward(*, second: bool = False, for_backward: bool = False, keep: bool = False) -> dict[str, Any]:
    order = {"REVERSE": second, "FIRST": not second, "SECOND": second}
    out_row = 2 * E if for_backward else E  # the gate's gradient is half of the product's
    return SCAN | order | {"out_row": out_row, "FOR_BACKWARD": for_backward, "KEEP": keep}


def backward(*, gate: bool) -> dict[str, Any]:
    ways = {"u_rows": (E,), "delta_rows": (E,)}
    constants = SCAN | ways | {"REVERSE": True, "STATES": N, "GATE_GRADIENT": gate, "dz_row": 2 * E}
    return {name: value for name, value in constants.items() if name not in ("u_row", "delta_row")}


KERNELS: dict[str, dict[str, Any]] = {
    "scan_forward, first": forward(),
    "scan_forward, second": forward(second=True),
    "scan_forward, first, for backward": forward(for_backward=True),
    "scan_forward, second, for backward": forward(second=True, for_backward=True),
    "scan_forward, first, keeps": forward(keep=True),
    "scan_forward, second, keeps": forward(second=True, keep=True),
    "scan_backward": backward(gate=False),
    "scan_backward, of the gate, too": backward(gate=True),
    "conv_forward": CONV,
    "conv_backward": CONV | {"SEGMENT": SEGMENT, "dy0_row": E, "dy1_row": E, "dx_row": 2 * E},
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
    "scan, states kept": (
        *(f"{name}, keeps" for name in FORWARD), "scan_backward", "scan_backward, of the gate, too",
    ),
    "convolution, forward and backward": ("conv_forward", "conv_backward"),
}  # fmt: skip
"""Launches of both directions."""


def work(name: str, lanes: int = 1) -> dict[int, float]:
    """Units of work of a pass through the code at each depth of loops: a step and state of the scan, a step of the convolution.

    Code that a program runs once is left out if it is much shorter than its loops.
    """
    if name.startswith("scan_forward"):  # with several lanes a group of steps is a chunk, and has no loop of its own
        return {1: CHUNK * N / lanes} | ({2: 4 * N} if lanes == 1 else {})
    if name.startswith("scan_backward"):
        return {1: CHUNK * N / lanes, 2: CHUNK}
    return {0: ROWS} if name == "conv_forward" else {0: SEGMENT, 1: ROWS}


def paths(kind: Any, path: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Positions of the pointers in a parameter, which may be a tuple of tuples."""
    if not isinstance(kind, tuple):
        return [path]
    return [inner for i, part in enumerate(kind) for inner in paths(part, (*path, i))]


def compiled(name: str, capability: int, dtype: str, lanes: int = 1, *, both: bool = False) -> Any:
    """Compile a kernel as a launch with DiS-L/2 does: all pointers are multiples of 16 bytes. `both` is of scan_backward."""
    kernel, constants = FUNCTIONS[name.split(",")[0]], dict(KERNELS[name])
    if name.startswith("scan"):
        constants["SPLIT"] = lanes
    if name.startswith("scan_backward"):
        constants["PRODUCTS"] = dtype == "bf16"
    if both:
        constants |= {"u_rows": (E, E), "delta_rows": (E, E)}
    pointer, halves = f"*{dtype}", f"*{'fp32' if constants.get('FOR_BACKWARD') is False else dtype}"
    types: dict[str, str | tuple[str, ...]] = dict.fromkeys(kernel.arg_names, pointer)
    types |= dict.fromkeys(FLOAT32, "*fp32") | dict.fromkeys(constants, "constexpr")
    if name.startswith("scan"):
        inputs: Any = (pointer, pointer, *["*fp32"] * 4)
        types |= {"inputs": inputs} | dict.fromkeys(("y_halves", "h_halves"), (halves, halves))
    else:
        types |= dict.fromkeys(("outs", "dys"), (pointer, pointer)) | dict.fromkeys(("weights", "biases", "sums"), FLOAT32_PAIR)
    if ways := len(constants.get("u_rows", ())):
        types |= {"inputs": (inputs,) * ways} | dict.fromkeys(("gradients", "h_halves"), ((pointer, pointer),) * ways)
        types |= dict.fromkeys(FLOAT32, ("*fp32",) * ways)
    signature = {name: types[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    aligned = [path for i, kind in enumerate(signature.values()) for path in paths(kind, (i,))]
    attributes = {path: [["tt.divisibility", 16]] for path in aligned if path not in values}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})


def disassembled(program: Any, *options: str) -> str:
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(program.asm["cubin"])
        cubin.flush()
        return subprocess.run([tool, *options, cubin.name], capture_output=True, text=True, check=True).stdout


class CompileOnly:
    """A driver of a GPU that compiles and cannot launch."""

    def __init__(self, capability: int = 90):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


@contextlib.contextmanager
def ahead(capability: int = 90) -> Iterator[list[tuple[Launch, tuple[Any, ...], Any]]]:
    """Compile launches instead of running them, of tensors without memory: each one, its arguments, and its program."""
    found = list[tuple[Launch, tuple[Any, ...], Any]]()

    def only_compile(launch: Launch, *arguments: Any) -> None:
        launch.kernel.device_caches.clear()  # a kernel would stay with the first target
        found.append((launch, arguments, launch.kernel.warmup(*arguments, grid=launch.grid, **launch.numbers)))

    with patch.object(driver, "_active", CompileOnly(capability)), patch.object(Launch, "__call__", only_compile):
        yield found


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
    diverged = [int(to[1], 16) for _, _, rest in operations if rest.startswith(".DIV") and (to := TARGET.search(rest))]
    rare = min(diverged, default=math.inf)  # what a warp runs from here on, it runs while some of its lanes sleep (`settle`)
    operations = [each for each in operations if each[0] < rare]
    targets = [(at, TARGET.search(rest)) for at, op, rest in operations if op == "BRA"]
    loops = [(int(to[1], 16), at) for at, to in targets if to and int(to[1], 16) < at]
    return [(op, sum(begin <= at <= end for begin, end in loops)) for at, op, _ in operations]


def counted(program: Any, units_of_depth: dict[int, float]) -> dict[str, float]:
    """Cycles per unit of work and warp: in total and by unit."""
    cycles = {"issued": 0.0, "MUFU": 0.0, "LSU": 0.0}
    for op, depth in code(program):
        if units := units_of_depth.get(depth):
            cycles["issued"] += 1 / units
            if unit := UNITS.get(op):
                cycles[unit] += CYCLES[unit] / units
    return cycles


def launches_us(names: Sequence[str], fill: Filling, images: int, tokens: int, channels: int = E) -> float:
    """The time of a scan's launches by the programs of the busiest multiprocessor; a name is one direction's."""
    seconds = 0.0
    for name in names:
        is_backward = name.startswith("scan_backward")
        lanes, at_once = (fill.backward, 1 + fill.both) if is_backward else (fill.forward, 1)
        programs = images * channels // (LANES // lanes * WARPS) * at_once
        cycles, resident = per_state_and_step(name, lanes)
        steps = rounded(name, lanes, tokens)
        seconds += busy(programs, MULTIPROCESSORS, resident) * cycles * N / lanes * steps / CLOCK_HZ / at_once
        if is_backward:  # each program's part of dB and dC
            seconds += programs // at_once * (2 * N * tokens * 4) / BYTES_PER_S
    return 1e6 * seconds


def busy(programs: int, multiprocessors: int, resident: int) -> int:
    """Return the time of the busiest multiprocessor, in programs at full issue: `resident` run at a time, one alone takes two."""
    rounds, last = divmod(-(-programs // multiprocessors), resident)
    return rounds * max(2, resident) + (max(2, last) if last else 0)


def rounded(name: str, lanes: int, tokens: int) -> int:
    """Return the steps that a pass runs: complete groups of 4 by a scan forward with one lane per channel, otherwise of 16."""
    group = 4 if name.startswith("scan_forward") and lanes == 1 else CHUNK
    return -(-tokens // group) * group


@functools.cache
def per_state_and_step(name: str, lanes: int) -> tuple[float, int]:
    """Cycles per state, step and warp, and the programs that a multiprocessor holds at a time."""
    program = compiled(name, 90, "bf16", lanes)
    a_program = 8 * -(-registers(program).used // 8) * LANES * WARPS
    return max(counted(program, work(name, lanes)).values()), REGISTERS // a_program


def by_lanes() -> None:
    """Print cycles per state, step and warp, and registers in parentheses, by lanes of a channel."""
    print(f"\n{'lanes of a channel':38}", *(f"{lanes:>11}" for lanes in triton_fill.FORWARD))
    for name, dtype in ((FORWARD[0], "bf16"), (FORWARD[1], "bf16"), ("scan_backward", "bf16"), ("scan_backward", "fp32")):
        cells = []
        for lanes in triton_fill.FORWARD:
            program = compiled(name, 90, dtype, lanes)
            cells.append(f"{max(counted(program, work(name, lanes)).values()):5.1f} ({registers(program).used:3})")
        print(f"{f'{name}, {dtype}':38}", *cells)


def main() -> None:
    times: dict[str, tuple[float, float]] = {}
    table = list[tuple[Any, ...]]()
    for name, moved in BYTES.items():
        program = compiled(name, 90, "bf16")
        cycles = counted(program, work(name))
        units = N if name.startswith("scan") else 1
        steps = rounded(name, 1, L)
        least_us = 1e6 * max(cycles.values()) * units * B * steps * E / LANES / SCHEDULERS / CLOCK_HZ
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
    by_lanes()
