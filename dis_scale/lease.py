"""One writer: a training attempt holds `lease/<n>`; to take a run over is to create `<n + 1>`.

Creating only if absent admits one of several that try. A holder that died on this machine is free at once; one elsewhere is free
when its beat has stood still. The owner looks for n + 1 before each manifest. The number is the attempt's own.
"""

import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
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
    _ended: threading.Event = field(default_factory=threading.Event)

    def held(self) -> bool:
        return _latest(self.folder) == self.number

    def release(self) -> None:
        self._ended.set()
        self.folder.write(f"{self.number:04d}.end", b"")

    def _beat(self) -> None:
        beats = 0
        while not self._ended.wait(BEAT_S):
            beats += 1
            try:
                self.folder.write(f"{self.number:04d}.beat", str(beats).encode())
            except DisScaleError:
                continue  # storage away for a while: whoever takes over creates the next number, which `held` sees


def take(folder: Folder) -> Lease:
    """Takes the run; DisScaleError says who holds it."""
    latest = _latest(folder)
    if latest and (holder := _living_holder(folder, latest)):
        raise DisScaleError(
            f"{folder}: held by process {holder['pid']} on {holder['host']}, which is alive: one writer a run"
        )
    if not folder.create(f"{latest + 1:04d}", json.dumps(_me()).encode()):
        raise DisScaleError(f"{folder}: another attempt was first to take it: one writer a run")
    lease = Lease(folder, latest + 1)
    threading.Thread(target=lease._beat, daemon=True, name="lease").start()
    return lease


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
