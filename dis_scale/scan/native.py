"""The native CPU backend: builds native.cpp on first use, loads it, and calls its operators.

* It computes in float32. float16 and bfloat16 inputs are converted (a copy), outputs converted back; float64 is refused.
* Inputs may be views with a contiguous last axis, such as chunks and splits of a product. Anything else costs a copy.
* With a gate the output is kept, and the backward pass divides it by the gate to get y: a smaller |z| than 1e-30 counts as
  1e-30, and the output must not be changed in place.
* Results are bit-equal at any number of threads.
* `DIS_SCALE_ISA=plain|avx2|avx512` forces an instruction set.
* Once loaded, the process keeps up to 256 MiB of freed memory (glibc only): see memory.inl.
* The library is stored in `$XDG_CACHE_HOME/dis_scale` (or `~/.cache/dis_scale`) under a hash of its sources and flags.
"""

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dis_scale.process.errors import DisScaleError, UserError
from dis_scale.scan.backend import NATIVE_CHUNK, Backend, Direction

SOURCES = [
    Path(__file__).with_name(name) for name in ("native.cpp", "kernels.inl", "memory.inl", "scan.inl", "conv.inl")
]
"""The one translation unit, then the files that it includes. A change of any of them rebuilds the library."""
MOST_STATES, MOST_TAPS = 256, 16
FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += [f"-DMOST_STATES={MOST_STATES}", f"-DMOST_TAPS={MOST_TAPS}", f"-DNATIVE_CHUNK={NATIVE_CHUNK}"]
if platform.machine() == "x86_64":
    # These flags change only the order of instructions and how registers are loaded: 5 to 10 % faster, on AMD too.
    FLAGS += ["-mtune=skylake-avx512", "-fschedule-insns", "-fsched-pressure", "-fno-tree-loop-distribute-patterns"]
COMPILER_LINES = 8


@functools.cache
def problem() -> DisScaleError | None:
    """Build and load the library; return the error, or None. Cached: once per process."""
    try:
        _load(cached_library())
        instruction_set()
    except DisScaleError as error:
        return error
    return None


@functools.cache
def instruction_set() -> str:
    """Select `DIS_SCALE_ISA`, or the best instruction set of this processor; return its name."""
    try:
        return use_instruction_set(os.environ.get("DIS_SCALE_ISA", ""))
    except ValueError as error:
        raise UserError(f"DIS_SCALE_ISA: {error}") from error


def use_instruction_set(name: str) -> str:
    """Select an instruction set for all later calls; never between a forward pass and its backward pass."""
    return str(torch.ops.dis_scale.use_instruction_set(name))


def cached_library() -> Path:
    """Path of the library built from these sources, with these flags, for this torch and processor."""
    inputs = [path.read_text() for path in SOURCES] + [*FLAGS, torch.__version__, platform.machine()]
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "dis_scale" / f"native-{key}.so"


def _load(library: Path) -> None:
    if _loads(library):
        return
    with _one_builder(library):
        if not _loads(library):
            _build(library)


def _loads(library: Path) -> bool:
    try:
        torch.ops.load_library(library)
    except OSError:  # missing or damaged
        return False
    return True


@contextlib.contextmanager
def _one_builder(library: Path) -> Iterator[None]:
    """Let one process of a machine build at a time: ranks that start together would all compile the same for half a minute."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks: all build, and still do not collide
            library.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(library.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        yield


def _build(library: Path) -> None:
    """Build and load the library, then publish it by one rename, so that builders cannot collide.

    Loading the library twice, under two names, would abort the process: its operators would be registered twice.
    """
    # It warns of machines that have CUDA's compiler and no GPU, where a build for the CPU does not care.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger(__name__).warning("compiling the scan for this machine, once: about half a minute")
    from torch.utils import cpp_extension  # takes half a second to import

    # pip installs ninja next to this interpreter, whose folder need not be on the path.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_builds(library.parent)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
            cpp_extension.load(
                "native", str(SOURCES[0]), extra_cflags=FLAGS, build_directory=folder, is_python_module=False
            )
            (built,) = Path(folder).glob("native*.so")  # PyTorch adds a version to the name after a build that failed
            built.replace(library)
    except (RuntimeError, OSError) as error:
        raise DisScaleError(_build_error(str(error))) from error


def _remove_stale_builds(cache: Path) -> None:
    """Remove build folders of killed processes: those older than an hour, longer than any build."""
    for folder in cache.glob("build-*"):
        if time.time() - folder.stat().st_mtime > 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _build_error(error: str) -> str:
    """The last lines of the build's output, and what to do."""
    lines = [line for line in error.splitlines() if line.strip() and "ninja: build stopped" not in line]
    output = "\n  ".join(lines[-COMPILER_LINES:])
    return (
        f"the native scan cannot be built; the last lines of its build:\n  {output}\n"
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
    y_BLE: Tensor = torch.ops.dis_scale.scan(_floats(*direction), reverse)
    return y_BLE


def _two_way_scan(forward: Direction, backward: Direction, z_BLE: Tensor | None) -> Tensor:
    _check_limit("states", max(forward.A_EN.shape[1], backward.A_EN.shape[1]), MOST_STATES)
    gate = () if z_BLE is None else (z_BLE,)
    y_BLE: Tensor = torch.ops.dis_scale.scan(_floats(*forward, *backward, *gate), False)
    return y_BLE


def _causal_conv_silu(x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, reverse: bool) -> Tensor:
    _check_limit("taps", weight_EW.shape[1], MOST_TAPS)
    y_BLE: Tensor = torch.ops.dis_scale.conv_silu(_floats(x_BLE, weight_EW, bias_E), reverse)[0]
    return y_BLE


def _two_way_conv_silu(x_BLE: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    _check_limit("taps", weights[0].shape[1], MOST_TAPS)
    forward, backward = torch.ops.dis_scale.conv_silu(_floats(x_BLE, *weights), False)
    return forward, backward


backend = Backend(_selective_scan, _two_way_scan, _causal_conv_silu, _two_way_conv_silu)
