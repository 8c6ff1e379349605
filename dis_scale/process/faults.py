"""Fault injection: a plan of faults, injected through one hook, so that a fault is an input of a test or a drill.

`DIS_SCALE_FAULTS` names a file with one fault per line; without it `at` does nothing. `<file>.spent/` records what has
happened, for all processes of the machine that share the plan, so that a restarted attempt does not meet the same fault again.

    kill at step rank=1 images=640              SIGKILL to rank 1 when it begins the first step at or after 640 images
    stop at written path=resume/ nth=2          SIGTERM to the process that has written its second file of a resume point
    flip at written path=weights-00001 nth=3    one bit of the file that was just written is flipped
    fail at write path=.safetensors times=3     storage answers with a lost connection three times
    gone at write seconds=20                    storage is away for 20 s from the first write on
    full at write path=resume/*/ema-00000       no space left on the device
    jump at step images=160 seconds=-3600       the wall clock jumps back one hour
    hang at step rank=0 images=160              the process hangs for ever
    nan at loss images=160 times=2              the loss's gradient is not a number
    broken at check times=2                     the device reports an uncorrectable memory error
    memory at step images=160                   the device has no memory left
    wait at step rank=0 images=160 until=1.0    the process waits until the plan's second fault begins
    wait at step images=160 seconds=1 times=9   each of nine steps takes one second more

Points: `step` and `loss` (training/loop.py), `check` (a training worker's and an evaluator's check of its device), `poll` (a
stage's driver, once per second; `path` is the stage), each storage verb before it, `written` after a write. `path` is a part of
the path, in which `*` matches anything. `until` is a file in `<file>.spent/`: `1.0` appears when the second fault happens for the
first time, and a drill may make others.
"""

import errno
import math
import os
import re
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dis_scale.process.errors import UserError

VARIABLE = "DIS_SCALE_FAULTS"
ACTIONS = ("kill", "stop", "flip", "fail", "gone", "full", "jump", "hang", "nan", "broken", "memory", "wait")
CUDA_ERRORS = {"broken": "uncorrectable ECC error encountered", "memory": "out of memory"}
POINTS = ("step", "loss", "check", "poll", "read", "write", "written", "create", "list", "delete")
CONDITIONS = {"rank": int, "images": int, "path": str, "nth": int, "times": int, "seconds": float, "until": str}


@dataclass(frozen=True)
class Fault:
    """An action at a point, its conditions, and how often it happens in all (`times`)."""

    action: str
    point: str
    rank: int | None = None
    images: int | None = None
    path: str = ""
    nth: int = 1
    times: int = 1
    seconds: float = 0.0
    until: str = ""
    """Name of the file that ends a wait before its `seconds`; without `seconds` a wait has no other end."""

    def fits(self, point: str, where: dict[str, Any]) -> bool:
        """Return whether the conditions hold here; `nth` and `times` are checked elsewhere."""
        pattern = ".*".join(map(re.escape, self.path.split("*")))
        here = point == self.point and bool(re.search(pattern, str(where.get("path", ""))))
        mine = self.rank is None or self.rank == int(os.environ.get("RANK", -1))
        return here and mine and (self.images is None or where.get("images", -1) >= self.images)


@dataclass
class FaultPlan:
    """The faults of a file, and how often this process has met the conditions of each."""

    spent: Path
    faults: list[Fault]
    _met: Counter[int] = field(default_factory=Counter)

    def at(self, point: str, **where: Any) -> None:
        for number, fault in enumerate(self.faults):
            if fault.fits(point, where):
                self._met[number] += 1
                if self._met[number] >= fault.nth and self._due(number, fault):
                    if fault.action == "wait":
                        self._wait(fault)
                    _inject(fault, where)

    def _wait(self, fault: Fault) -> None:
        deadline = time.monotonic() + (fault.seconds or math.inf)
        while time.monotonic() < deadline and not (fault.until and (self.spent / fault.until).exists()):
            time.sleep(0.05)

    def _due(self, number: int, fault: Fault) -> bool:
        """Use up one of the fault's `times`; for a lasting fault return whether it still lasts."""
        self.spent.mkdir(exist_ok=True)
        marks = [self.spent / f"{number}.{time_}" for time_ in range(fault.times)]
        if any(_create(mark) for mark in marks):
            return True
        return fault.action == "gone" and time.time() < marks[0].stat().st_mtime + fault.seconds


def _create(mark: Path) -> bool:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def parse(line: str) -> Fault:
    """Return the fault of a line; UserError says what was expected."""
    words = line.split()
    pairs = dict(word.partition("=")[::2] for word in words[3:])
    known = len(words) > 2 and words[0] in ACTIONS and words[1] == "at" and words[2] in POINTS
    if not known or not pairs.keys() <= CONDITIONS.keys():
        raise UserError(
            f"fault {line!r}: expected one of {', '.join(ACTIONS)}, then `at`, one of {', '.join(POINTS)}, then any of "
            f"{', '.join(f'{name}=' for name in CONDITIONS)}, for example: kill at step rank=1 images=640"
        )
    try:
        return Fault(words[0], words[2], **{name: CONDITIONS[name](value) for name, value in pairs.items()})
    except ValueError as error:
        raise UserError(f"fault {line!r}: {error}") from error


def load(path: str | os.PathLike[str]) -> FaultPlan:
    """Return the plan of a file."""
    file = Path(path)
    lines = [line.strip() for line in file.read_text().splitlines()]
    return FaultPlan(file.with_name(f"{file.name}.spent"), [parse(line) for line in lines if line and not line.startswith("#")])


_plan: FaultPlan | None = load(os.environ[VARIABLE]) if VARIABLE in os.environ else None


def at(point: str, **where: Any) -> None:
    """Inject the faults that the plan has for this point. Raises what storage would raise; may not return."""
    if _plan is not None:
        _plan.at(point, **where)


def use(path: str | os.PathLike[str] | None) -> None:
    """Use the plan of a file from now on, or none: for a process that was forked before the variable was set."""
    global _plan
    _plan = None if path is None else load(path)


def _inject(fault: Fault, where: dict[str, Any]) -> None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        case "flip":
            _flip(Path(where["path"]))
        case "fail" | "gone":
            raise ConnectionError(f"fault: storage is away ({fault.action})")
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "jump":
            clock = time.time
            time.time = lambda: clock() + fault.seconds
        case "broken" | "memory":
            raise RuntimeError(f"CUDA error: {CUDA_ERRORS[fault.action]}")
        case "hang":
            threading.Event().wait()
        case "nan":
            where["loss"].register_hook(lambda gradient: gradient * float("nan"))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
