"""Accidents on purpose: a plan of faults, injected through one hook, so that a fault is an input of a test or a drill.

`DIS_SCALE_FAULTS` names a file with a fault a line; without it `at` does nothing. `<file>.spent/` keeps what has happened, for all
processes of the machine that share the plan, so that a restarted attempt does not meet the same accident again.

    kill at step rank=1 images=640              -9 to rank 1 when it begins the first step at or after 640 images
    stop at written path=resume/ nth=2          SIGTERM to the process that has written its second file of a resume point
    flip at written path=weights-00001 nth=3    a byte of the file that was just written is turned
    fail at write path=.safetensors times=3     storage answers with a lost connection three times
    gone at write seconds=20                    storage is gone for 20 s from the first write on
    full at write path=resume/ nth=4            no space left on the device
    jump at step images=160 seconds=-3600       the wall clock goes back an hour
    hang at step rank=0 images=160              the process stands still for good
    nan at loss images=160 times=2              the loss's gradient is not a number

Points: `step` and `loss` (train.py), `look` (a stage's driver, once a second; `path` is the stage), each storage
verb before it, `written` after one.
"""

import errno
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dis_scale.errors import UserError

VARIABLE = "DIS_SCALE_FAULTS"
ACTIONS = ("kill", "stop", "flip", "fail", "gone", "full", "jump", "hang", "nan")
CONDITIONS = {"rank": int, "images": int, "path": str, "nth": int, "times": int, "seconds": float}


@dataclass(frozen=True)
class Fault:
    """What happens at which point, under which conditions, and how often in all (`times`)."""

    what: str
    point: str
    rank: int | None = None
    images: int | None = None
    path: str = ""
    nth: int = 1
    times: int = 1
    seconds: float = 0.0

    def fits(self, point: str, where: dict[str, Any]) -> bool:
        """Whether this is the place, `nth` and `times` apart."""
        here = point == self.point and self.path in str(where.get("path", ""))
        mine = self.rank is None or self.rank == int(os.environ.get("RANK", -1))
        return here and mine and (self.images is None or where.get("images", -1) >= self.images)


@dataclass
class Plan:
    """The faults of a file, and how often each one's place was passed in this process."""

    spent: Path
    faults: list[Fault]
    _passed: Counter[int] = field(default_factory=Counter)

    def at(self, point: str, **where: Any) -> None:
        for number, fault in enumerate(self.faults):
            if fault.fits(point, where):
                self._passed[number] += 1
                if self._passed[number] >= fault.nth and self._due(number, fault):
                    _happen(fault, where)

    def _due(self, number: int, fault: Fault) -> bool:
        """Takes one of the fault's `times`, or, for one that lasts, says whether it still does."""
        self.spent.mkdir(exist_ok=True)
        marks = [self.spent / f"{number}.{time_}" for time_ in range(fault.times)]
        if any(_take(mark) for mark in marks):
            return True
        return fault.what == "gone" and time.time() < marks[0].stat().st_mtime + fault.seconds


def _take(mark: Path) -> bool:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def parse(line: str) -> Fault:
    """A fault from its line; UserError says what was expected."""
    words = line.split()
    pairs = dict(word.partition("=")[::2] for word in words[3:])
    if len(words) < 3 or words[1] != "at" or words[0] not in ACTIONS or not pairs.keys() <= CONDITIONS.keys():
        raise UserError(
            f"fault {line!r}: expected one of {', '.join(ACTIONS)}, then `at POINT`, then any of "
            f"{', '.join(f'{name}=' for name in CONDITIONS)}, for example: kill at step rank=1 images=640"
        )
    try:
        return Fault(words[0], words[2], **{name: CONDITIONS[name](value) for name, value in pairs.items()})
    except ValueError as error:
        raise UserError(f"fault {line!r}: {error}") from error


def load(path: str | os.PathLike) -> Plan:
    """The plan of a file."""
    file = Path(path)
    lines = [line.strip() for line in file.read_text().splitlines()]
    return Plan(
        file.with_name(f"{file.name}.spent"), [parse(line) for line in lines if line and not line.startswith("#")]
    )


_plan: Plan | None = load(os.environ[VARIABLE]) if VARIABLE in os.environ else None


def at(point: str, **where: Any) -> None:
    """The hook: whatever the plan has for this place happens now. Raises what storage would raise; may not return."""
    if _plan is not None:
        _plan.at(point, **where)


def use(path: str | os.PathLike | None) -> None:
    """Takes the plan of a file from now on, or none: for a process that was forked before the variable was set."""
    global _plan
    _plan = None if path is None else load(path)


def _happen(fault: Fault, where: dict[str, Any]) -> None:
    match fault.what:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        case "flip":
            _flip(Path(where["path"]))
        case "fail" | "gone":
            raise ConnectionError(f"fault: storage is away ({fault.what})")
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "jump":
            clock = time.time
            time.time = lambda: clock() + fault.seconds
        case "hang":
            threading.Event().wait()
        case "nan":
            where["loss"].register_hook(lambda gradient: gradient * float("nan"))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
