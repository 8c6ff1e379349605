"""Leases: one writer at a time. The writer holds `<n>` in the lease's folder; to take over, a process creates `<n + 1>`.

The sweep, its other stages and each run have their own leases. For a run, n is also the attempt's number.

Create-only-if-absent lets one of several processes win; a nonce shows a process that it won although the answer was lost. The
lease of a process that died on this machine, in the same container or outside of any, is free at once; that of any other process
is free after its heartbeat has stopped. An owner checks for n + 1 before each document that its successor would also write.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from dis_scale.process import counts
from dis_scale.process.errors import DisScaleError, Held, UserError
from dis_scale.process.redaction import redact
from dis_scale.process.threads import in_order
from dis_scale.storage.document import Document
from dis_scale.storage.folder import Folder

BEAT_S = 5.0
"""Time between two heartbeats."""
CLOCK_BEATS = 720
"""Heartbeats (an hour of them) after which the difference between this machine's clock and the store's is measured again."""
STILL_S = 20.0
"""Time without a heartbeat after which a holder on another machine counts as dead."""
MOST_STILL_S = 300.0
"""Time in which this wait begins again while storage answers slowly."""
JOINED_S = 10.0
"""Longest wait for a heartbeat that is on its way when the holder ends."""
BEATLESS_S = 60.0
"""Age of the last heartbeat, by the store's clock, from which a holder is reported dead."""
WHY_CHARACTERS = 500
"""Most characters of the error that ended a lease."""

PROCESSES = Path("/proc/self/ns/pid")
"""Linux: names the namespace of process ids. Containers of one host have the same host name and boot, if they share its network."""


@dataclass(frozen=True)
class Lease:
    """Write permission, valid until another process creates the next number."""

    folder: Folder
    number: int

    def held(self) -> bool:
        """Return whether no other process has taken over."""
        return _highest(self.folder.list()) == self.number

    def require_held(self) -> None:
        """Raise Held if another process has taken over. Called before each document that both would write."""
        if not self.held():
            raise Held(f"{self.folder}: another process has taken over from this one (number {self.number}), which stops")

    def stop_requested(self) -> bool:
        """Return whether another process has requested this one to stop, by `request_stop`, or has taken over."""
        names = self.folder.list()
        return _stop_request(self.number) in names or _highest(names) > self.number


class Holder(Document):
    """The process that holds a lease. Without values it is used for a damaged file."""

    host: str = ""
    boot: str = ""
    """Linux's id of the host's boot."""
    processes: str = ""
    """Its namespace of process ids."""
    pid: int = 0
    started: float | None = None
    """When the process began: ticks after the boot on Linux, which a step of the clock does not change; else Unix time."""
    cluster: str = ""
    nonce: str = ""
    at: float | None = None
    """Unix time at which it took the lease."""

    def __str__(self) -> str:
        return f"{self.pid} on {self.host}" if self.pid else "? on ? (its file is damaged)"

    @classmethod
    def here(cls) -> "Holder":
        """Return this process."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        return cls(
            host=socket.gethostname(),
            boot=boot.read_text().strip() if boot.exists() else "",
            processes=str(PROCESSES.readlink()) if PROCESSES.is_symlink() else "",
            pid=os.getpid(),
            started=began(os.getpid()),
        )

    @property
    def is_here(self) -> bool:
        """Whether it is or was a process that this machine, or this container, would show to this user."""
        own = Holder.here()
        return (self.host, self.boot, self.processes) == (own.host, own.boot, own.processes) and not _hidden(self.pid)


class End(Document):
    """The end of a lease; without an error, `why` is empty."""

    at: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Holding:
    """One holder of a lease, past or present. Times are Unix times: of heartbeats by the store's clock, others by the holder's."""

    folder: Folder
    number: int
    holder: Holder
    end: End | None
    """None while it holds the lease, and for good if it died without ending it."""
    beat: float | None
    """Time of its last heartbeat or, before the first, of its beginning; None if not known."""

    @property
    def gone(self) -> bool:
        """Whether it was a process of this machine that has ended."""
        return self.holder.is_here and began(self.holder.pid) != self.holder.started

    @property
    def alive(self) -> bool | None:
        """Whether another process of this machine holds it; None if only a heartbeat can show it."""
        return self.holder.pid != os.getpid() and not self.gone if self.holder.is_here else None

    def works(self, now: float) -> bool:
        """Return whether it holds the lease and is alive at the time `now` of the store's clock, as its heartbeats show."""
        beats = self.beat is None or now - self.beat < BEATLESS_S
        return self.end is None and not self.gone and beats


@contextlib.contextmanager
def hold(folder: Folder, cluster: str = "", *, aside: bool = False) -> Iterator[Lease]:
    """Hold the lease, with a heartbeat, for the block. Held, with the holder and its cluster, if another process holds it.

    `aside` is for a command beside the work that the lease protects: a UserError or Held of the command is no failure of that work.
    The reason of the work's last end is then kept.
    """
    before = last_holding(folder)
    taken_over = before is not None and before.end is None
    if before and taken_over and _living([before])[0]:
        raise _held_by(before)
    lease = Lease(folder, before.number + 1 if before else 1)
    mine = Holder.here().changed(cluster=cluster, nonce=uuid.uuid4().hex, at=time.time())
    if not mine.create(folder, _name(lease.number)):
        first = Holder.find_intact(folder, _name(lease.number)) or Holder()
        if first.nonce != mine.nonce:  # otherwise it is ours: the answer was lost, and the retry found it
            raise Held(f"{folder}: process {first} took the lease first: one writer at a time", first.cluster, str(first))
    if taken_over:
        counts.add(counts.TAKEOVERS)
    ended = threading.Event()
    heartbeats = threading.Thread(target=_send_heartbeats, args=(lease, ended), daemon=True, name="lease")
    heartbeats.start()
    failed, why = False, before.end.why if aside and before and before.end else ""
    try:
        yield lease
    except BaseException as error:
        failed = True
        if not (aside and isinstance(error, UserError | Held)):
            why = _why(error)
        raise
    finally:
        ended.set()
        heartbeats.join(JOINED_S)  # one on its way would arrive after the end, perhaps in a folder that is then deleted
        with contextlib.suppress(*[DisScaleError] if failed else []):  # the error that ended the block is the one to raise
            End(at=time.time(), why=why).write(folder, f"{_name(lease.number)}.end")


def require_free_here(folder: Folder) -> None:
    """Raise Held if another process of this machine holds the lease: this needs no wait for heartbeats, as other machines do."""
    before = last_holding(folder)
    if before and before.end is None and before.alive:
        raise _held_by(before)


def _held_by(holding: Holding) -> Held:
    words = f"{holding.folder}: held by process {holding.holder}, which is alive: one writer at a time"
    return Held(words, holding.holder.cluster, str(holding.holder))


def _why(error: BaseException) -> str:
    """Return an error in one line without secrets; of an error of Ray, what its worker raised, without the worker's traceback."""
    found = getattr(error, "cause", None)
    cause = found if isinstance(found, BaseException) else error
    return redact(" ".join(f"{type(cause).__name__}: {cause}".split()).removesuffix(":"))[:WHY_CHARACTERS]


def live_holders(folders: Iterable[Folder]) -> dict[Folder, Holder]:
    """Return the live holder of each lease, without leases that no live process holds; takes up to STILL_S for all together."""
    last = in_order(folders, last_holding)
    holdings = [holding for holding in last if holding and holding.end is None]
    return {each.folder: each.holder for each, alive in zip(holdings, _living(holdings), strict=True) if alive}


def earlier(names: Collection[str]) -> list[str]:
    """Return the files of a lease's earlier holders, except the first holder's own file, which shows when the work began."""
    latest, first = _highest(names), _first(names)
    return [name for name in names if (number := name.partition(".")[0]).isdigit() and int(number) < latest and name != first]


def last_holding(folder: Folder) -> Holding | None:
    """Return the lease's last holder, None if it was never held."""
    return next(iter(last_holdings(folder, 1)), None)


def first_taken_at(folder: Folder) -> float | None:
    """Return the Unix time at which the lease's first holder took it; None without any."""
    first = _first(folder.list())
    return (Holder.find_intact(folder, first) or Holder()).at if first else None


def last_holdings(folder: Folder, count: int) -> list[Holding]:
    """Return at most `count` of the lease's last holders, the last one first."""
    names = set(folder.list())
    numbers = range(_highest(names), 0, -1)[:count]
    return [_holding(folder, number, names) for number in numbers if _name(number) in names]


def request_stop(folder: Folder) -> Holding | None:
    """Request the lease's holder to stop; return it, None if it has ended or was a process of this machine that is gone."""
    holding = last_holding(folder)
    if holding is None or holding.end is not None or holding.gone:  # of any other, clocks do not show that it is dead
        return None
    folder.write(_stop_request(holding.number), b"")
    return holding


def _name(number: int) -> str:
    return f"{number:04d}"


def _stop_request(number: int) -> str:
    return f"{_name(number)}.stop"


def _holding(folder: Folder, number: int, names: Collection[str]) -> Holding:
    """Return a holder from those of its files that are among `names`."""
    name = _name(number)
    holder = Holder.find_intact(folder, name) or Holder()
    end = (End.find_intact(folder, f"{name}.end") or End()) if f"{name}.end" in names else None
    beat = _time_of(folder.read(f"{name}.beat")) if end is None and f"{name}.beat" in names else holder.at
    return Holding(folder, number, holder, end, beat)


def _time_of(heartbeat: bytes) -> float | None:
    """Return the time of a heartbeat; None for a damaged one."""
    _, _, at = heartbeat.partition(b" ")
    return float(at) if at.isdigit() else None


def _send_heartbeats(lease: Lease, ended: threading.Event) -> None:
    beats, ahead_s, own_s = 0, None, 0.0
    folder = replace(lease.folder, tries=1)  # the next heartbeat is the retry: others do not wait for a pause of 38 s between tries
    while not ended.wait(BEAT_S):
        beats += 1
        # Storage may be away for a while. If another process takes over meanwhile, `held` sees its number.
        with contextlib.suppress(Exception):  # whatever storage raises, the heartbeat is sent
            was_set = abs(time.time() - time.monotonic() - own_s) > BEAT_S  # this machine's clock
            if ahead_s is None or was_set or beats % CLOCK_BEATS == 0:
                ahead_s, own_s = folder.time_s() - time.time(), time.time() - time.monotonic()
        with contextlib.suppress(Exception):
            folder.write(f"{_name(lease.number)}.beat", f"{beats} {time.time() + (ahead_s or 0.0):.0f}".encode())


def _highest(names: Iterable[str]) -> int:
    """Return the highest number that is the name of a holder, 0 if none."""
    return max((int(name) for name in names if name.isdigit()), default=0)


def _first(names: Iterable[str]) -> str | None:
    """Return the name of the first holder's file, None if there is none."""
    return min(filter(str.isdigit, names), key=int, default=None)


def _living(holdings: Sequence[Holding]) -> list[bool]:
    """Return whether each is alive, after STILL_S for the heartbeats of all. Clocks of two machines are never compared.

    If storage takes longer to answer than heartbeats are apart, the wait begins again: the holders may not have reached it either.
    """
    alive = [holding.alive for holding in holdings]

    def beats(numbers: list[int]) -> dict[int, bytes]:
        read = in_order(numbers, lambda n: _heartbeat(holdings[n]))
        return dict(zip(numbers, read, strict=True))

    first = beats([n for n, known in enumerate(alive) if known is None])
    began_s = still_since_s = time.monotonic()
    while first:
        time.sleep(1)
        asked_s = time.monotonic()
        for n, beat in beats(list(first)).items():
            if beat != first[n]:
                alive[n] = True
                del first[n]
        if time.monotonic() - asked_s > BEAT_S and asked_s - began_s < MOST_STILL_S:
            still_since_s = time.monotonic()
        elif asked_s - still_since_s >= STILL_S:
            break
    return [bool(each) for each in alive]


def _heartbeat(holding: Holding) -> bytes:
    name = f"{_name(holding.number)}.beat"
    return holding.folder.read(name) if holding.folder.exists(name) else b""


def _hidden(pid: int) -> bool:
    """Return whether a process lives that this user may not see: another user's, if /proc is mounted with hidepid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not Path(f"/proc/{pid}").exists()
    except (ProcessLookupError, OverflowError):  # the latter for the number in a damaged file
        pass
    return False


def began(pid: int) -> float | None:
    """Return when a process began; None if there is no process, or only a zombie, which a container often does not reap."""
    try:
        if (process := Path(f"/proc/{pid}/stat")).exists():
            fields = process.read_text().rpartition(")")[2].split()
            return None if fields[0] in "ZX" else float(fields[19])
        return float(psutil.Process(pid).create_time())
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None
