"""Entry point of a stage's job: open the sweep, obey stop requests, turn errors into one line and an exit code."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import ray

from dis_scale.process.errors import DisScaleError, Preempted
from dis_scale.process.redaction import redact
from dis_scale.sweep import Sweep
from pipelines import environment, lines, logs, metrics

Program = Callable[[Sweep, list[str]], None]
"""A stage's program, given the sweep and further arguments."""
_stop = threading.Event()


def run_program(program: Program, url: str, *arguments: str) -> None:
    """Run a stage's program on the sweep at `url`, patient with storage."""
    lines.emit("driver")
    lines.say(environment.words())
    _log_to_stdout()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _stop.set())
    try:
        sweep = Sweep.open(url, patient=True)
        logs.keep_driver(sweep)
        program(sweep, list(arguments))
        logs.close()
    except Exception as error:
        _exit_with(cause_of(error), error)


def _log_to_stdout() -> None:
    """Our warnings are shown in the sweep; Ray's errors stay in the job's log."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("ray").setLevel(logging.ERROR)
    shown = logging.StreamHandler(sys.stdout)
    shown.setFormatter(_Messages())
    logging.getLogger("dis_scale").addHandler(shown)
    logging.getLogger("dis_scale").propagate = False


class _Messages(logging.Formatter):
    """Warnings of ours as messages to the sweep."""

    def format(self, record: logging.LogRecord) -> str:
        return lines.message(super().format(record), record.levelname.lower())


def _exit_with(cause: BaseException, error: BaseException) -> NoReturn:
    """End this job with the cause's line; with the complete traceback before it if the cause is not one of ours."""
    if isinstance(cause, DisScaleError):
        lines.fail(str(cause))
    else:
        print(redact("".join(traceback.format_exception(error))), end="", flush=True)
        lines.fail(f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0][:300]}")
    logs.close()
    os._exit(cause.exit_code if isinstance(cause, DisScaleError) else 1)


def cause_of(error: BaseException) -> BaseException:
    """Return what a worker raised, without the traceback and addresses that Ray adds."""
    return error.cause if isinstance(error, ray.exceptions.RayTaskError) else error


@contextlib.contextmanager
def keeping_handlers() -> Iterator[None]:
    """Restore the handlers of SIGTERM and SIGINT: Ray's own would end this process at a stop before anything is saved."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not installed from Python, and not ours
                signal.signal(number, handler)


def connect() -> None:
    """Join the cluster that this job runs on."""
    with keeping_handlers():
        ray.init(log_to_driver=False, logging_level="ERROR")
    metrics.start()


def stop_requested() -> bool:
    return _stop.is_set()


def raise_if_stopped() -> None:
    if _stop.is_set():
        raise Preempted("stopped as requested")


def pause(seconds: float) -> None:
    """Sleep, but end at once if a stop is requested."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not _stop.is_set():
        time.sleep(0.1)
