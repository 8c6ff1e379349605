"""The native CPU backend: builds native.cpp on first use, loads it, and calls its operators.

Computes in float32: float16 and bfloat16 inputs are converted (a copy), the outputs converted back; float64 is refused.
Inputs may be views whose last axis is contiguous, such as chunks and splits of a product; anything else costs a copy.
A gate keeps the output, from which the backward pass takes y: |z| counts as 1e-30 at least, and the output must not be
changed in place. Results are the same bits at any number of threads.
`DIS_SCALE_ISA=plain|avx2|avx512` forces an instruction set.
Once loaded, freed memory of up to 256 MiB stays with the process (glibc only): see memory.inl.
The library is kept in `$XDG_CACHE_HOME/dis_scale` (or `~/.cache/dis_scale`) under a hash of what it was made from.
"""

import functools
import hashlib
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from dis_scale.errors import DisScaleError, UserError
from dis_scale.scan.backend import NATIVE_CHUNK, Backend, Direction

SOURCES = [
    Path(__file__).with_name(name) for name in ("native.cpp", "kernels.inl", "memory.inl", "scan.inl", "conv.inl")
]
"""The one translation unit, then the files that it includes. A change of any of them rebuilds the library."""
MOST_STATES, MOST_TAPS = 256, 16
FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += [f"-DMOST_STATES={MOST_STATES}", f"-DMOST_TAPS={MOST_TAPS}", f"-DNATIVE_CHUNK={NATIVE_CHUNK}"]
if platform.machine() == "x86_64":
    # The order of instructions alone, and registers filled without a detour; 5 to 10 %, on AMD's processors, too.
    FLAGS += ["-mtune=skylake-avx512", "-fschedule-insns", "-fsched-pressure", "-fno-tree-loop-distribute-patterns"]
COMPILER_LINES = 8


@functools.cache
def problem() -> DisScaleError | None:
    """Builds and loads the library, once a process; what stands in the way, or None."""
    try:
        _load(cached_library())
        instruction_set()
    except DisScaleError as error:
        return error
    return None


@functools.cache
def instruction_set() -> str:
    """What the library runs on: `DIS_SCALE_ISA`, or the best that this processor has."""
    try:
        return use_instruction_set(os.environ.get("DIS_SCALE_ISA", ""))
    except ValueError as error:
        raise UserError(f"DIS_SCALE_ISA: {error}") from error


def use_instruction_set(name: str) -> str:
    """Forces an instruction set for calls from now on; not between a forward pass and its backward pass."""
    return torch.ops.dis_scale.use_instruction_set(name)


def cached_library() -> Path:
    made_from = [path.read_text() for path in SOURCES] + [*FLAGS, torch.__version__, platform.machine()]
    key = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "dis_scale" / f"native-{key}.so"


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(library)
    except OSError:  # not there, or damaged
        _build(library)


def _build(library: Path) -> None:
    """Builds, loads and then publishes by one rename: a builder that dies leaves no lock, several do not meet.

    To load the library twice, under two names, would end the process: its operators are there already.
    """
    from torch.utils import cpp_extension  # half a second, and only here

    # The ninja that pip installed stands beside this interpreter, which need not be on the path.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        _clear(library.parent)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
            cpp_extension.load(
                "native", str(SOURCES[0]), extra_cflags=FLAGS, build_directory=folder, is_python_module=False
            )
            (Path(folder) / "native.so").replace(library)
    except (RuntimeError, OSError) as error:
        raise DisScaleError(_why(str(error))) from error


def _clear(cache: Path) -> None:
    """Removes what killed builders left; an hour is longer than any build."""
    for folder in cache.glob("build-*"):
        if time.time() - folder.stat().st_mtime > 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _why(error: str) -> str:
    """The last lines that the build said, and what to do."""
    lines = [line for line in error.splitlines() if line.strip() and "ninja: build stopped" not in line]
    said = "\n  ".join(lines[-COMPILER_LINES:])
    return (
        f"the native scan cannot be built; the last that its build said:\n  {said}\n"
        "install a C++ compiler (g++ 11 or newer) and ninja, or set the backend to chunked"
    )


def _check_limit(what: str, got: int, most: int) -> None:
    if got > most:
        raise UserError(f"the native scan takes at most {most} {what}, got {got}: set the backend to chunked")


def _floats(*tensors: Tensor) -> list[Tensor]:
    for x in tensors:
        if x.dtype == torch.float64:
            raise UserError("the native scan computes in float32, got float64: convert, or set the backend to chunked")
    return list(tensors)


def _selective_scan(direction: Direction, reverse: bool) -> Tensor:
    _check_limit("states", direction.A_EN.shape[1], MOST_STATES)
    return torch.ops.dis_scale.scan(_floats(*direction), reverse)


def _two_way_scan(forward: Direction, backward: Direction, z_BLE: Tensor | None) -> Tensor:
    _check_limit("states", max(forward.A_EN.shape[1], backward.A_EN.shape[1]), MOST_STATES)
    gate = () if z_BLE is None else (z_BLE,)
    return torch.ops.dis_scale.scan(_floats(*forward, *backward, *gate), False)


def _causal_conv_silu(x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, reverse: bool) -> Tensor:
    _check_limit("taps", weight_EW.shape[1], MOST_TAPS)
    return torch.ops.dis_scale.conv_silu(_floats(x_BLE, weight_EW, bias_E), reverse)[0]


def _two_way_conv_silu(x_BLE: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    _check_limit("taps", weights[0].shape[1], MOST_TAPS)
    forward, backward = torch.ops.dis_scale.conv_silu(_floats(x_BLE, *weights), False)
    return forward, backward


backend = Backend(_selective_scan, _two_way_scan, _causal_conv_silu, _two_way_conv_silu)
