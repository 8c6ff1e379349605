"""A stage's job without Ray: it keeps what a program would log, and its pauses take no time."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

from dis_scale.process.context import Context
from dis_scale.recipe import Recipe
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from pipelines.lines import Log
from pipelines.sharing import Deal
from pipelines.stage import StageJob


@dataclass
class RecordedJob(StageJob):
    """Keeps messages, events, gauges and pauses."""

    said: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    gauges: list[tuple[str, float]] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    """Names of nodes that are gone."""

    def connect(self) -> None:
        """Join no cluster."""

    def say(self, text: str, level: str = "info") -> None:
        self.said.append(text)

    def emit(self, name: str, **facts: Any) -> None:
        self.events.append({"event": name, **facts})

    def gauge(self, name: str, value: float) -> None:
        self.gauges.append((name, value))

    def gone_of(self, names: frozenset[str]) -> frozenset[str]:
        return names & self.gone

    def now_s(self) -> float:
        return sum(self.pauses)

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def events_named(self, name: str) -> list[dict[str, Any]]:
        """Return the facts of all events of this name, in order."""
        return [event for event in self.events if event["event"] == name]


class RayJob(RecordedJob):
    """A recorded job for workers on a real Ray: its pauses take their time."""

    gone_of, now_s, pause = StageJob.gone_of, StageJob.now_s, StageJob.pause


def job_of(recipe: Recipe, root: object = "/nowhere", kind: type[RecordedJob] = RecordedJob) -> RecordedJob:
    """Return the job of a sweep of this recipe below a storage root."""
    return kind(Sweep.below(open_folder(str(root)), recipe))


def deal_of(numbers: Iterable[int]) -> Deal:
    """Return a deal of these numbers to workers of this process."""
    return partial(next, iter(numbers), None)


def printing_job(sweep: Sweep) -> StageJob:
    """Return a job whose lines go to the output, as those of a stage do."""
    return StageJob(sweep, log=Log(Context()))


def actor(name: str, **methods: Any) -> Any:
    """Return a handle as Ray's of an actor with this id."""
    remote = {method: SimpleNamespace(remote=call) for method, call in methods.items()}
    return SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: name), **remote)
