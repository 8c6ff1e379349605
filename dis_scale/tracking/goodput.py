"""Goodput: the share of a run's time that went into steps that counted; and their cost in worker hours."""

from dataclasses import dataclass

from dis_scale.sweep.documents import RunCost, RunState, TimeSpent

ATTEMPT = "attempt"
"""Metric row at the start of an attempt: the attempt's number, at its first images seen."""
GOODPUT = "goodput"
"""Metric row at the end of an attempt that was not killed."""
MEMORY = "memory_gib"
"""Metric row of the peak memory of rank 0's process."""


@dataclass(frozen=True)
class Goodput:
    """The share of the time since the run's first attempt was requested that went into lasting steps.

    A step is lasting if no later attempt repeated it; its saves and its waits for data belong to it. Waiting for machines, start-up
    and repeated steps count as lost:

        attempt 1   |wait, start|steps|steps that were lost|      attempt 2   |wait, start|steps|
        good                    ^^^^^                                                     ^^^^^

    `own_s` is the time since this attempt's first step, by a clock that is never set. A resume point has what the next attempt
    needs to continue.
    """

    earlier: TimeSpent
    """Sums of all earlier attempts."""
    before_s: float
    """Seconds from the run's first request until this attempt was ready for its first step."""
    workers: int = 1

    @classmethod
    def begin(cls, earlier: TimeSpent | None, requested_at: float, now: float, workers: int = 1) -> "Goodput":
        """Begin an attempt on `workers` from a resume point's sums, if any; Unix times."""
        earlier = earlier or TimeSpent(first_at=requested_at)
        return cls(earlier, now - earlier.first_at, workers)

    def share(self, own_s: float) -> float:
        """Return the goodput if this attempt's steps up to now last; at most 1 also if a clock was set back between attempts."""
        return min(1.0, self.spent(own_s).lasting_s / max(self.before_s + own_s, 1e-9))

    def spent(self, own_s: float) -> TimeSpent:
        """Return the sums up to now, from which the next attempt continues."""
        return TimeSpent(
            first_at=self.earlier.first_at,
            lasting_s=self.earlier.lasting_s + own_s,
            worker_s=self.earlier.worker_s + self.workers * own_s,
        )

    def worker_hours(self, own_s: float) -> float:
        return self.spent(own_s).worker_s / 3600


def as_branch(trunk: RunState, now: float) -> RunState:
    """Return a trunk's progress as that of a branch: it keeps the trunk's worker time, and its goodput begins now."""
    worker_s = trunk.spent.worker_s if trunk.spent else 0.0
    spent = TimeSpent(first_at=now, worker_s=worker_s)
    return trunk.model_copy(update={"spent": spent, "cost": RunCost(trained_on=trunk.cost.trained_on), "skipped": 0})
