"""One writer: who writes holds `<n>` of a lease's folder; to take over is to create `<n + 1>`.

A sweep, its preparation, its evaluation and each run have a lease of their own.

Creating only if absent admits one of several that try. A holder that died on this machine is free at once; one elsewhere is free
when its beat has stood still. A run's owner looks for n + 1 before each manifest, and the number is the attempt's own.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dis_scale.errors import DisScaleError, Held
from dis_scale.storage.folder import Folder

FOLDER = "leases"
"""In a sweep's folder: its own lease and those of stages; a run's stands in the run's folder."""
BEAT_S = 5.0
STILL_S = 20.0


@dataclass(frozen=True)
class Lease:
    """The right to write one thing, until another number is there."""

    folder: Folder
    number: int

    def held(self) -> bool:
        return _latest(self.folder) == self.number


@contextlib.contextmanager
def hold(folder: Folder, cluster: str = "") -> Iterator[Lease]:
    """Takes the lease, keeps its beat going and gives it back at the end; Held says who else has it, and on which cluster."""
    latest = _latest(folder)
    if latest and (holder := _living_holder(folder, latest)):
        raise Held(
            f"{folder}: held by process {holder['pid']} on {holder['host']}, which is alive: one writer at a time",
            holder,
        )
    lease, mine = Lease(folder, latest + 1), _me() | {"cluster": cluster}
    if not folder.create(f"{lease.number:04d}", json.dumps(mine).encode()):
        first = folder.read_json(f"{lease.number:04d}")
        raise Held(
            f"{folder}: process {first['pid']} on {first['host']} was first to take it: one writer at a time", first
        )
    ended = threading.Event()
    threading.Thread(target=_beat, args=(lease, ended), daemon=True, name="lease").start()
    try:
        yield lease
    finally:
        ended.set()
        folder.write(f"{lease.number:04d}.end", b"")


def _beat(lease: Lease, ended: threading.Event) -> None:
    beats = 0
    while not ended.wait(BEAT_S):
        beats += 1
        # Storage away for a while: whoever takes over creates the next number, which `held` sees.
        with contextlib.suppress(DisScaleError):
            lease.folder.write(f"{lease.number:04d}.beat", str(beats).encode())


def _latest(folder: Folder) -> int:
    return max((int(name) for name in folder.list() if name.isdigit()), default=0)


def _living_holder(folder: Folder, number: int) -> dict[str, Any] | None:
    name = f"{number:04d}"
    if folder.exists(f"{name}.end"):
        return None
    holder: dict[str, Any] = folder.read_json(name)
    here = _me()
    if (holder["host"], holder["boot"]) == (here["host"], here["boot"]):
        alive = holder["pid"] != here["pid"] and _started(holder["pid"]) == holder["started"]
    else:
        alive = _beats(folder, name)
    return holder if alive else None


def _beats(folder: Folder, name: str) -> bool:
    """Whether the holder's beat moves while we look; no clock is compared with another machine's."""
    first = _beat_of(folder, name)
    deadline = time.monotonic() + STILL_S
    while time.monotonic() < deadline:
        time.sleep(1)
        if _beat_of(folder, name) != first:
            return True
    return False


def _beat_of(folder: Folder, name: str) -> bytes:
    return folder.read(f"{name}.beat") if folder.exists(f"{name}.beat") else b""


def _me() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(), "boot": boot.read_text().strip() if boot.exists() else "",
        "pid": os.getpid(), "started": _started(os.getpid()),
    }  # fmt: skip


def _started(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None
