"""Builds native.cpp on first use and loads it.

* `DIS_SCALE_ISA=plain|avx2|avx512` forces an instruction set.
* Once loaded, the process keeps up to 256 MiB of freed memory (glibc only): see native.cpp.
* The library is stored in `$XDG_CACHE_HOME/dis_scale` (or `~/.cache/dis_scale`) under a hash of its sources and flags.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from dis_scale.process.errors import DisScaleError, UserError
from dis_scale.scan.backend import NATIVE_CHUNK

SOURCES = [Path(__file__).with_name(name) for name in ("native.cpp", "kernels.inl", "memory.inl", "scan.inl", "conv.inl")]
"""The one translation unit, then the files that it includes. A change of any of them rebuilds the library."""
MOST_STATES, MOST_TAPS = 256, 16
INSTRUCTION_SETS = ("plain", "avx2", "avx512")
GROUP_CHANNELS = 192
"""Channels that share one partial sum of dB and dC: these sums take 1/6 of u's memory at 16 states."""
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += [f"-DMOST_STATES={MOST_STATES}", f"-DMOST_TAPS={MOST_TAPS}"]
FLAGS += [f"-DNATIVE_CHUNK={NATIVE_CHUNK}", f"-DGROUP_CHANNELS={GROUP_CHANNELS}"]
if platform.machine() == "x86_64":
    # These flags change only the order of instructions and how registers are loaded: 5 to 10 % faster, on AMD too.
    FLAGS += ["-mtune=skylake-avx512", "-fschedule-insns", "-fsched-pressure", "-fno-tree-loop-distribute-patterns"]
COMPILER_LINES = 8


@functools.cache
def problem() -> DisScaleError | None:
    """Build and load the library; return the error, or None. Cached: once per process."""
    try:
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
    chosen: bytes | None = library().use_instruction_set(name.encode())
    if chosen is None and name in INSTRUCTION_SETS:
        raise ValueError(f"this processor has no {name}, only {library().best_instruction_set().decode()}")
    if chosen is None:
        raise ValueError(f"no instruction set {name!r}: there are {', '.join(INSTRUCTION_SETS)}")
    return chosen.decode()


def cached_library(flags: Sequence[str] = tuple(FLAGS)) -> Path:
    """Path of the library built from these sources, with these flags, for this processor."""
    inputs = [path.read_text() for path in SOURCES] + [*flags, platform.machine()]
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # a container's user without a name; a shared folder is unsafe for programs
        raise UserError("the native scan is built in a cache, and this user has no home folder: set XDG_CACHE_HOME") from error
    return Path(home) / "dis_scale" / f"native-{key}.so"


def _load(path: Path) -> ctypes.CDLL:
    with contextlib.suppress(OSError):  # missing or damaged
        return ctypes.CDLL(str(path))
    with _one_builder(path):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
        return _build(path)


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. DisScaleError if it cannot be built."""
    loaded = _load(cached_library())
    loaded.use_instruction_set.restype = loaded.best_instruction_set.restype = ctypes.c_char_p
    loaded.lanes.restype = ctypes.c_int64
    loaded.keep_freed_memory()
    return loaded


@contextlib.contextmanager
def _one_builder(path: Path) -> Iterator[None]:
    """Let one process of a machine build at a time: ranks that start together would all compile the same."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks: all build, and still do not collide
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        yield


def _build(path: Path) -> ctypes.CDLL:
    """Build the library, publish it by one rename, so that builders cannot collide, and load it."""
    logging.getLogger(__name__).warning("compiling the scan for this machine, once: about ten seconds")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_builds(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
            built = Path(folder) / path.name
            compiler = shlex.split(os.environ.get("CXX") or "c++")
            command = [*compiler, *FLAGS, str(SOURCES[0]), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise DisScaleError(_build_error(done.stderr or f"{shlex.join(command)} ended with {done.returncode}"))
            built.replace(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise DisScaleError(_build_error(str(error))) from error


def _remove_stale_builds(cache: Path) -> None:
    """Remove build folders of killed processes: those older than an hour, longer than any build."""
    for folder in cache.glob("build-*"):
        with contextlib.suppress(FileNotFoundError):  # another builder has ended
            if time.time() - folder.stat().st_mtime > 3600:
                shutil.rmtree(folder, ignore_errors=True)


def _build_error(error: str) -> str:
    """The last lines of the build's output, and what to do."""
    output = "\n  ".join([line for line in error.splitlines() if line.strip()][-COMPILER_LINES:])
    return (
        f"the native scan cannot be built; the last lines of its build:\n  {output}\n"
        "install a C++ compiler (g++ 11 or newer), or set the backend to chunked"
    )
