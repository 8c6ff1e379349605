"""Goodput: the share of a run's time that went into steps that counted; and their cost in worker hours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ATTEMPT = "attempt"
"""Metric row at the start of an attempt: the attempt's number, at its first images seen."""
GOODPUT = "goodput"
"""Metric row at the end of an attempt that was not killed, and key in manifests: the run's goodput up to there."""
WORKER_HOURS = "worker_hours"
"""Key in manifests: the time of all workers in lasting steps up to there; for a branch with its trunk's."""
MEMORY = "memory_gib"
"""Key in manifests: peak memory of rank 0's process, the largest of all attempts."""
TRAINED_ON = "trained_on"
"""Key in manifests: models of the GPUs or processors of rank 0 in all attempts."""
SAMPLED_ON = "sampled_on"
"""Key in an evaluation's metrics: models of the GPUs or processors that sampled."""
_SPENT = "spent"
"""Key in manifests: the sums from which the next attempt continues."""


@dataclass(frozen=True)
class Goodput:
    """The share of the time since the run's first attempt was requested that went into lasting steps.

    A step is lasting if no later attempt repeated it; its saves and its waits for data belong to it. Waiting for machines, start-up
    and repeated steps count as lost:

        attempt 1   |wait, start|steps|steps that were lost|      attempt 2   |wait, start|steps|
        good                    ^^^^^                                                     ^^^^^

    Times are in seconds, `_at` Unix times. The manifest of a resume point holds what the next attempt needs to continue.
    """

    first_at: float
    """When the run's first attempt was requested."""
    earlier_s: float
    """Time in lasting steps of all earlier attempts."""
    began_at: float
    """When this attempt was ready for its first step."""
    earlier_worker_s: float | None = 0.0
    """Time in lasting steps of all earlier attempts, of all workers; None if an earlier version did not count it."""
    workers: int = 1

    @classmethod
    def begin(cls, earlier: Mapping[str, Any], requested_at: float, now: float, workers: int = 1) -> "Goodput":
        """Begin an attempt on `workers` from a resume point's manifest; from an empty mapping if there is none."""
        spent = earlier.get(_SPENT, {"first_at": requested_at, "lasting_s": 0.0, "worker_s": 0.0})
        return cls(spent["first_at"], spent["lasting_s"], now, spent.get("worker_s"), workers)

    def share(self, now: float) -> float:
        """Return the goodput if this attempt's steps up to `now` last; from 0 to 1 also if a clock was set back."""
        return min(1.0, max(0.0, self._lasting_s(now) / max(now - self.first_at, 1e-9)))

    def facts(self, now: float) -> dict[str, Any]:
        """Return the entries of a manifest that is written now."""
        spent = {"first_at": self.first_at, "lasting_s": self._lasting_s(now)}
        facts: dict[str, Any] = {GOODPUT: self.share(now), _SPENT: spent}
        if self.earlier_worker_s is not None:
            spent["worker_s"] = self.earlier_worker_s + self.workers * self._this_attempt_s(now)
            facts[WORKER_HOURS] = spent["worker_s"] / 3600
        return facts

    def _lasting_s(self, now: float) -> float:
        return self.earlier_s + self._this_attempt_s(now)

    def _this_attempt_s(self, now: float) -> float:
        return max(0.0, now - self.began_at)


def facts_for_branch(trunk: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Return the first facts of a branch: it keeps its trunk's worker time, and its goodput begins now."""
    spent = trunk.get(_SPENT, {}) | {"first_at": now, "lasting_s": 0.0}
    return {_SPENT: spent, TRAINED_ON: trunk.get(TRAINED_ON, [])}
