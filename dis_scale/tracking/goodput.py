"""Goodput: the share of a run's time that went into steps that counted; and their cost in worker hours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ATTEMPT = "attempt"
"""Name of the row that begins an attempt: its number, at the images that it starts from."""
GOODPUT = "goodput"
"""Name of the row that ends an attempt, and of the fact in manifests: the run's goodput up to there."""
WORKER_HOURS = "worker_hours"
"""Name of the fact in manifests: the workers' time in the lasting steps up to there, a branch's trunk included."""
MEMORY, TRAINED_ON = "memory_gib", "trained_on"
"""Facts in manifests, of rank 0: the largest peak memory of its processes, and the names of all machines that trained."""
SAMPLED_ON = "sampled_on"
"""Fact in an evaluation's metrics: the names of the machines that sampled."""
_SPENT = "spent"


@dataclass(frozen=True)
class Goodput:
    """The share of the time since the run's first attempt began that went into lasting steps.

    A step is lasting if no later attempt repeated it. Waiting for machines, start-up and repeated steps count as lost:

        attempt 1   |start|steps|steps that were lost|      attempt 2   |wait, start|steps|
        good                ^^^^^                                                   ^^^^^

    Times are in seconds, `_at` Unix times. The facts of a resume point hold what the next attempt needs to continue.
    """

    first_at: float
    lasting_s: float
    """Time in lasting steps of the attempts before."""
    began_at: float
    worker_s: float | None = 0.0
    """Time in lasting steps of the attempts before, of all workers; None if an earlier version did not count it."""
    workers: int = 1

    @classmethod
    def begin(cls, earlier: Mapping[str, Any], now: float, workers: int = 1) -> "Goodput":
        """Begin an attempt on `workers` from a resume point's facts, or from none."""
        spent = earlier.get(_SPENT, {"first_at": now, "lasting_s": 0.0, "worker_s": 0.0})
        return cls(spent["first_at"], spent["lasting_s"], now, spent.get("worker_s"), workers)

    def share(self, now: float) -> float:
        """Return the goodput at a time of this attempt, from 0 to 1 also if a clock was set back."""
        return min(1.0, max(0.0, self._lasting_s(now) / max(now - self.first_at, 1e-9)))

    def facts(self, now: float) -> dict[str, Any]:
        """Return the facts for a manifest that is written now."""
        spent = {"first_at": self.first_at, "lasting_s": self._lasting_s(now)}
        facts: dict[str, Any] = {GOODPUT: self.share(now), _SPENT: spent}
        if self.worker_s is not None:
            spent["worker_s"] = self.worker_s + self.workers * self._here_s(now)
            facts[WORKER_HOURS] = spent["worker_s"] / 3600
        return facts

    def _lasting_s(self, now: float) -> float:
        return self.lasting_s + self._here_s(now)

    def _here_s(self, now: float) -> float:
        return max(0.0, now - self.began_at)


def spent_by_trunk(facts: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Return the facts for a branch that begins now at its trunk's resume point: the trunk's cost, and none of its time."""
    spent = facts.get(_SPENT, {}) | {"first_at": now, "lasting_s": 0.0}
    return {_SPENT: spent, TRAINED_ON: facts.get(TRAINED_ON, [])}
