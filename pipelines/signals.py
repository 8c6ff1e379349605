"""Signals to the command: each of SIGTERM, SIGINT and SIGHUP requests a stop."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from threading import Event
from types import FrameType

from dis_scale.process.errors import write_nowhere


@contextlib.contextmanager
def obeying_signals(stop_requested: Event) -> Iterator[None]:
    """Let a signal set `stop_requested`; a SIGTERM or SIGINT that is the second signal ends this process at once.

    To be polled by `is_set`: a signal that comes while the main thread begins to `wait` would block for ever.
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
