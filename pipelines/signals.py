"""Requests to stop. Each of SIGTERM, SIGINT and SIGHUP is one for the command."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from dis_scale.process.errors import write_nowhere


class Stop:
    """A stop request and its time, by a clock that never jumps. `set` takes no lock, since a second signal may interrupt it."""

    at_s = math.inf

    def set(self) -> None:
        self.at_s = min(self.at_s, time.monotonic())

    def is_set(self) -> bool:
        return self.at_s < math.inf

    def pause(self, seconds: float) -> None:
        """Sleep for this time, or until a stop is requested."""
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s and not self.is_set():
            time.sleep(0.1)


@contextlib.contextmanager
def obeying_signals(stop_requested: Stop) -> Iterator[None]:
    """Let a signal set `stop_requested`; a SIGTERM or SIGINT that is the second signal ends this process at once.

    SIGHUP says that the terminal was closed: nothing is written to it any more. Under `nohup` it stays ignored.
    """
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    # now, since a closed terminal no longer reports that it is one
    terminals = [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]
    asked = False  # by a signal: a stop may have been requested in another way before

    def request(number: int, _: FrameType | None) -> None:
        nonlocal asked
        if number == signal.SIGHUP:
            write_nowhere(*terminals)  # each write to a closed one would fail
        elif asked:
            signal.default_int_handler(number, None)
        asked = True
        stop_requested.set()

    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
