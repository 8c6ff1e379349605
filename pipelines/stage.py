"""A stage's job: the `StageJob` that its program gets, and the entry point, which turns errors into one line and an exit code."""

import contextlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from textwrap import indent
from typing import Any, NoReturn, TypeVar

import ray

from dis_scale.process.context import Context
from dis_scale.process.errors import UNFORESEEN, DisScaleError, Preempted, StorageAway, shown
from dis_scale.process.redaction import redact
from dis_scale.recipe import Recipe
from dis_scale.storage import lease
from dis_scale.storage.folder import Folder
from dis_scale.storage.lease import Lease
from dis_scale.sweep import Sweep
from pipelines import lines
from pipelines.failures import cause_of, may_pass
from pipelines.lines import Log
from pipelines.logs import JobLogs
from pipelines.metrics import Exporter
from pipelines.ray_private import Resources
from pipelines.signals import Stop

T = TypeVar("T")
STORAGE_AWAY_S = 3600.0
"""Time for which a stage waits for storage that is away."""
ASK_STORAGE_EVERY_S = 60.0
"""Pause between two attempts to open the sweep, each of which retries for about a minute."""


@dataclass
class StageJob:
    """A job as its program sees it: the sweep, arguments, the stop request, and ways to log, to measure and to wait."""

    sweep: Sweep
    arguments: Sequence[str] = ()
    log: Log = field(default_factory=lambda: Log(Context()))
    stop: Stop = field(default_factory=Stop)
    logs: JobLogs = field(default_factory=lambda: JobLogs(None, Context()))
    requests: dict[str, Resources] = field(default_factory=dict)
    """The resources that each worker asked for, by its actor's id."""
    placed: frozenset[str] = frozenset()
    """Names of the nodes that the current attempt runs on."""
    reuses_excluded: bool = False
    """Whether the current attempt uses nodes whose devices failed, since the others have no capacity."""
    left_out: frozenset[str] = frozenset()
    """Names of the nodes that the current attempt does without if it can: attempts with them failed."""
    failed_ids: set[str] = field(default_factory=set)
    """Ids of the nodes whose devices failed in this job. Several pods on one machine have its name, but different ids."""
    held: Lease | None = None
    """The stage's lease, while this job holds it."""
    dealer: Any = None
    """The actor that deals shared work (pipelines/sharing.py); None before the first."""

    def __post_init__(self) -> None:
        self.exporter = Exporter(self.context)
        self._done = -1

    @property
    def context(self) -> Context:
        return self.log.context

    @property
    def recipe(self) -> Recipe:
        return self.sweep.recipe

    @property
    def failed_nodes(self) -> Folder:
        return self.sweep.failed_nodes(self.context.stage or "stage", self.context.model)

    def connect(self) -> None:
        """Join the cluster that this job runs on."""
        with keeping_handlers():
            ray.init(log_to_driver=False, logging_level="ERROR")
        self.exporter.start()
        self.show_advance()

    def say(self, text: str, level: str = "info") -> None:
        self.log.say(text, level)

    def emit(self, name: str, **facts: Any) -> None:
        self.log.emit(name, **facts)

    def progress(self, done: int, total: int, unit: str) -> None:
        self.log.progress(done, total, unit)
        if done != self._done:
            self._done = done
            self.show_advance()

    def show_idle(self) -> None:
        """Export the present time as that of the last progress while there is no work or capacity; log progress now and then."""
        self.show_advance()
        self.log.repeat_progress()

    def show_advance(self) -> None:
        """Export the present time as that of the last progress. An ablation does not: it has the labels of its model's training."""
        if self.context.stage != "ablate":
            self.gauge("progress_timestamp_seconds", time.time())

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge of the sweep's model."""
        self.exporter.gauge(name, value)

    def stop_requested(self) -> bool:
        return self.stop.is_set()

    def grace_left_s(self) -> float:
        """Return the seconds left of the grace period, after which Ray kills this process."""
        return self.recipe.grace_s - max(0.0, time.monotonic() - self.stop.at_s)

    def raise_if_stopped(self) -> None:
        if self.stop_requested():
            raise Preempted("stopped as requested")

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[Lease]:
        """Hold the stage's lease for the block."""
        with lease.hold(self.sweep.lease(name)) as self.held:
            try:
                yield self.held
            finally:
                self.held = None

    def require_held(self) -> None:
        """Raise Held if another process has taken over this stage. Called before each document that both would write."""
        if self.held:
            self.held.require_held()

    def gone_of(self, names: frozenset[str]) -> frozenset[str]:
        """Return which of these nodes are gone: they were taken away, or have crashed."""
        return names - {str(node["NodeName"]) for node in ray.nodes() if node["Alive"]} if names else names

    def now_s(self) -> float:
        """Return the time of a clock that never jumps."""
        return time.monotonic()

    def pause(self, seconds: float) -> None:
        """Sleep, but end at once if a stop is requested."""
        self.stop.pause(seconds)


def run_program(program: Callable[[StageJob], None], url: str, *arguments: str) -> None:
    """Run a stage's program on the sweep at `url`, patient with storage."""
    log, stop = Log(Context.from_environment()), Stop()
    _show_warnings(log)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    logs = JobLogs(None, log.context)
    try:
        sweep = _opened(url, log, stop)
        logs = JobLogs.of(sweep, log.context)
        program(StageJob(sweep, arguments, log, stop, logs))
        logs.close()
    except Exception as error:
        _exit_with(error, log, logs)


def _opened(url: str, log: Log, stop: Stop) -> Sweep:
    """Open the sweep. At the start of a job storage is waited for as long as later: otherwise one job would end all jobs."""

    def pause() -> None:
        if stop.is_set():
            raise Preempted("stopped as requested, before storage answered")
        stop.pause(ASK_STORAGE_EVERY_S)

    return insist(lambda: Sweep.open(url, patient=True), partial(log.say, level="warning"), pause)


def insist(ask: Callable[[], T], say: Callable[[str], None], pause: Callable[[], None]) -> T:
    """Return the answer of storage. If it is away, log this once and ask again after each pause, for `STORAGE_AWAY_S`."""
    until_s, said = time.monotonic() + STORAGE_AWAY_S, False
    while True:
        try:
            return ask()
        except StorageAway as error:
            if not said:
                say(f"storage does not answer, asked again for an hour: {error}")
            said = True
            pause()
            if time.monotonic() > until_s:
                raise


def _show_warnings(log: Log) -> None:
    """Show our warnings in the sweep; Ray's errors stay in the job's log."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("dis_scale").addHandler(ToSweep(log))
    logging.getLogger("dis_scale").propagate = False


class ToSweep(logging.Handler):
    """Shows records of modules as messages in the sweep."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.say(self.format(record), record.levelname.lower())


def _exit_with(error: Exception, log: Log, logs: JobLogs) -> NoReturn:
    """End this job with one line on the cause, and with the complete traceback before it if the cause is no DisScaleError."""
    cause = cause_of(error)
    if isinstance(cause, DisScaleError):
        log.fail(str(cause))
    else:
        # Indented, so that text which a library quotes, such as a name with a newline, is no line of the protocol.
        lines.write(indent(shown(redact("".join(traceback.format_exception(error)))), "  ").rstrip("\n"))
        log.fail(f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0][:300]}")
    logs.close()
    if isinstance(cause, DisScaleError):
        os._exit(cause.exit_code)
    os._exit(UNFORESEEN if may_pass(error) else DisScaleError.exit_code)  # an accident, after which another job follows


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
