"""Leases: one writer at a time. The writer holds `<n>` in the lease's folder; to take over, a process creates `<n + 1>`.

The sweep, its prepare and evaluate stages and each run have their own leases. For a run, n is also the attempt's number.

Create-only-if-absent lets one of several processes win; a nonce shows a process that it won although the answer was lost. The
lease of a process that died on this machine, in the same container or outside of any, is free at once; that of any other process
is free after its heartbeat has stopped. A run's owner checks for n + 1 before each manifest.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from dis_scale.process import counts
from dis_scale.process.errors import DisScaleError, Held
from dis_scale.process.redaction import redact
from dis_scale.process.threads import in_order
from dis_scale.storage.folder import Folder

BEAT_S = 5.0
"""Time between two heartbeats."""
STILL_S = 20.0
"""Time without a heartbeat after which a holder on another machine counts as dead."""
BEATLESS_S = 60.0
"""Age of the last heartbeat from which a holder is reported dead; includes the difference between two machines' clocks."""
WHY_CHARACTERS = 500
"""Most characters of the error that ended a lease."""
AT_ONCE = 32
"""Leases that are read at a time."""

PROCESSES = Path("/proc/self/ns/pid")
"""Linux: names the namespace of process ids. Containers of one host have the same host name and boot, if they share its network."""


@dataclass(frozen=True)
class Lease:
    """Write permission, valid until another process creates the next number."""

    folder: Folder
    number: int

    def held(self) -> bool:
        """Whether no other process has taken over."""
        return _latest(self.folder) == self.number

    def stop_requested(self) -> bool:
        """Whether another process has requested this one to stop, by `request_stop`."""
        return self.folder.exists(_stop_request(self.number))


@contextlib.contextmanager
def hold(folder: Folder, cluster: str = "") -> Iterator[Lease]:
    """Hold the lease, with a heartbeat, for the block; Held names the other holder and its cluster."""
    latest = _latest(folder)
    taken_over = latest > 0 and not _ended(folder, latest)
    if taken_over and _living([holder := _holder(folder, latest)])[0]:
        raise Held(
            f"{folder}: held by process {name_of(holder.facts)}, which is alive: one writer at a time", holder.facts
        )
    facts = {"cluster": cluster, "nonce": uuid.uuid4().hex, "at": time.time()}
    lease, mine = Lease(folder, latest + 1), _this_process() | facts
    if not folder.create(f"{lease.number:04d}", json.dumps(mine).encode()):
        first = folder.find_json(f"{lease.number:04d}") or {}
        if first.get("nonce") != mine["nonce"]:  # otherwise it is ours: the answer was lost, and the retry found it
            raise Held(f"{folder}: process {name_of(first)} took the lease first: one writer at a time", first)
    if taken_over:
        counts.add(counts.TAKEOVERS)
    ended = threading.Event()
    threading.Thread(target=_send_heartbeats, args=(lease, ended), daemon=True, name="lease").start()
    why = ""
    try:
        yield lease
    except BaseException as error:
        why = _why(error)
        raise
    finally:
        ended.set()
        with contextlib.suppress(*[DisScaleError] if why else []):  # the error that ended the block is the one to raise
            folder.write_json(f"{lease.number:04d}.end", {"at": time.time(), "why": why})


def _why(error: BaseException) -> str:
    """Return an error in one line without secrets; of an error of Ray, what its worker raised, without the worker's traceback."""
    cause = getattr(error, "cause", None) or error
    return redact(" ".join(f"{type(cause).__name__}: {cause}".split()))[:WHY_CHARACTERS]


def name_of(holder: dict[str, Any]) -> str:
    """Return the number and host of a holder's process by its facts, none if its file is damaged."""
    return f"{holder['pid']} on {holder['host']}" if holder else "? on ? (its file is damaged)"


def live_holders(folders: Iterable[Folder]) -> dict[Folder, dict[str, Any]]:
    """Return the facts of the live process that holds each lease, without leases that none holds; takes up to STILL_S for all."""
    holders = [holder for holder in in_order(folders, _unended, AT_ONCE) if holder]
    return {each.folder: each.facts for each, alive in zip(holders, _living(holders), strict=True) if alive}


def earlier(names: Collection[str]) -> list[str]:
    """Return those of a lease's files that belong to another holder than the last."""
    latest = _highest(names)
    return [name for name in names if (number := name.partition(".")[0]).isdigit() and int(number) < latest]


@dataclass(frozen=True)
class Holding:
    """One holder of a lease, past or present. Times are Unix times of the holder's clock."""

    number: int
    host: str
    pid: int
    since: float | None
    ended: float | None
    """None while it holds the lease, and for good if it died without ending it."""
    why: str
    """The error that ended it, if any."""
    beat: float | None
    """Time of its last heartbeat or, before the first, of its beginning; None if not known."""
    gone: bool
    """Whether it was a process of this machine that has ended."""

    def works(self, now: float) -> bool:
        """Whether it holds the lease and is alive at the Unix time `now`, as far as its heartbeats tell."""
        beats = self.beat is None or now - self.beat < BEATLESS_S
        return self.ended is None and not self.gone and beats


def last_holding(folder: Folder) -> Holding | None:
    """Return the lease's last holder, None if it was never held."""
    return next(iter(last_holdings(folder, 1)), None)


def last_holdings(folder: Folder, count: int) -> list[Holding]:
    """Return at most `count` of the lease's last holders, the last one first."""
    names = set(folder.list())
    numbers = range(_highest(names), 0, -1)[:count]
    return [_holding(folder, number, names) for number in numbers if f"{number:04d}" in names]


def request_stop(folder: Folder) -> Holding | None:
    """Request the lease's holder to stop; return it, None if it has ended or was a process of this machine that is gone."""
    holding = last_holding(folder)
    if holding is None or holding.ended is not None or holding.gone:  # of any other, clocks do not show that it is dead
        return None
    folder.write(_stop_request(holding.number), b"")
    return holding


def _stop_request(number: int) -> str:
    return f"{number:04d}.stop"


def _holding(folder: Folder, number: int, names: Collection[str]) -> Holding:
    """Return a holder from those of its files that are among `names`."""
    name = f"{number:04d}"
    holder = folder.find_json(name, "host", "pid") or {"host": "an unknown host", "pid": 0}
    ended, why = _end(folder, name) if f"{name}.end" in names else (None, "")
    since = _number(holder.get("at"))
    beat = _time_of(folder.read(f"{name}.beat")) if ended is None and f"{name}.beat" in names else since
    gone = _is_here(holder) and _started(holder["pid"]) != holder.get("started")
    return Holding(number, holder["host"], holder["pid"], since, ended, why, beat, gone)


def _end(folder: Folder, name: str) -> tuple[float, str]:
    """Return the time and the reason of a lease's end; 0 and none if they are damaged, or of an earlier version, which has none."""
    written = folder.read(f"{name}.end")
    end = (folder.find_json(f"{name}.end", "at") if written else None) or {}
    return _number(end.get("at")) or 0.0, str(end.get("why", ""))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _time_of(heartbeat: bytes) -> float | None:
    """Return the time of a heartbeat; None for a damaged one, or one of an earlier version, which has none."""
    _, _, at = heartbeat.partition(b" ")
    return float(at) if at.isdigit() else None


def _send_heartbeats(lease: Lease, ended: threading.Event) -> None:
    beats = 0
    while not ended.wait(BEAT_S):
        beats += 1
        # Storage may be away for a while. If another process takes over meanwhile, `held` sees its number.
        with contextlib.suppress(DisScaleError):
            lease.folder.write(f"{lease.number:04d}.beat", f"{beats} {time.time():.0f}".encode())


def _latest(folder: Folder) -> int:
    return _highest(folder.list())


def _highest(names: Iterable[str]) -> int:
    """Return the highest number that is the name of a holder, 0 if none."""
    return max((int(name) for name in names if name.isdigit()), default=0)


def _ended(folder: Folder, number: int) -> bool:
    return folder.exists(f"{number:04d}.end")


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether the holder is or was a process that this machine, or this container, would list."""
    here = _this_process()
    return all(holder.get(key) == here[key] for key in ("host", "boot", "processes"))


class _Holder(NamedTuple):
    """A holder that did not end its lease."""

    folder: Folder
    name: str
    facts: dict[str, Any]
    """Empty if its file is damaged."""
    alive: bool | None
    """None if only its heartbeat can show it: that of another machine's process, or of one without facts."""


def _holder(folder: Folder, number: int) -> _Holder:
    name, alive = f"{number:04d}", None
    facts = folder.find_json(name, "host", "pid", "started") or {}
    if _is_here(facts):
        alive = facts["pid"] != os.getpid() and _started(facts["pid"]) == facts["started"]
    return _Holder(folder, name, facts, alive)


def _unended(folder: Folder) -> _Holder | None:
    latest = _latest(folder)
    return _holder(folder, latest) if latest and not _ended(folder, latest) else None


def _living(holders: Sequence[_Holder]) -> list[bool]:
    """Return whether each is alive; up to STILL_S for the heartbeats of all. Clocks of two machines are never compared."""
    alive, deadline = [holder.alive for holder in holders], time.monotonic() + STILL_S

    def beats(numbers: list[int]) -> dict[int, bytes]:
        read = in_order(numbers, lambda n: _heartbeat(holders[n].folder, holders[n].name), AT_ONCE)
        return dict(zip(numbers, read, strict=True))

    first = beats([n for n, known in enumerate(alive) if known is None])
    while first and time.monotonic() < deadline:
        time.sleep(1)
        for n, beat in beats(list(first)).items():
            if beat != first[n]:
                alive[n] = True
                del first[n]
    return [bool(each) for each in alive]


def _heartbeat(folder: Folder, name: str) -> bytes:
    return folder.read(f"{name}.beat") if folder.exists(f"{name}.beat") else b""


def _this_process() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(), "boot": boot.read_text().strip() if boot.exists() else "",
        "processes": str(PROCESSES.readlink()) if PROCESSES.is_symlink() else "",
        "pid": os.getpid(), "started": _started(os.getpid()),
    }  # fmt: skip


def _started(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None
