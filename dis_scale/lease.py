"""One writer: a training attempt holds `lease/<n>`; to take a run over is to create `<n + 1>`.

Creating only if absent admits one of several that try. A holder that died on this machine is free at once; one elsewhere is free
when its beat has stood still. The owner looks for n + 1 before each manifest. The number is the attempt's own.
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

from dis_scale.errors import DisScaleError
from dis_scale.storage import Folder

BEAT_S = 5.0
STILL_S = 20.0


@dataclass(frozen=True)
class Lease:
    """The right to write one run, until another number is there."""

    folder: Folder
    number: int

    def held(self) -> bool:
        return _latest(self.folder) == self.number


@contextlib.contextmanager
def hold(folder: Folder) -> Iterator[Lease]:
    """Takes the run, keeps the lease's beat going and gives it back at the end; DisScaleError says who else holds it."""
    latest = _latest(folder)
    if latest and (holder := _living_holder(folder, latest)):
        raise DisScaleError(
            f"{folder}: held by process {holder['pid']} on {holder['host']}, which is alive: one writer a run"
        )
    lease = Lease(folder, latest + 1)
    if not folder.create(f"{lease.number:04d}", json.dumps(_me()).encode()):
        raise DisScaleError(f"{folder}: another attempt was first to take it: one writer a run")
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
