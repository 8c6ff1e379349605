"""Restarts: which failures lead to another attempt, how many there are, how long they wait, and the error after the last."""

import pytest
import ray

from dis_scale.process.errors import DisScaleError, StorageAway, StorageError
from dis_scale.recipe import Recipe
from pipelines.failures import StorageFailure, WorkerFailure
from pipelines.restarts import with_restarts
from tests.support.stage_jobs import RecordedJob, job_of


@pytest.fixture
def job(tiny: Recipe) -> RecordedJob:
    return job_of(tiny)


def run(job: RecordedJob, failures: list[Exception], stored: list[int]) -> list[WorkerFailure | None]:
    """Run attempts that end in these failures, then one that succeeds; return the failure that each was given."""
    left, given = list(failures), list[WorkerFailure | None]()
    counts = iter(stored)

    def attempt(failure: WorkerFailure | None) -> list[WorkerFailure | None]:
        given.append(failure)
        if left:
            raise left.pop(0)
        return given

    return with_restarts(job, "dis", attempt, lambda: next(counts))


def test_attempts_without_progress_wait_longer_each_time_and_progress_resets_the_count(job: RecordedJob) -> None:
    failures = [WorkerFailure("a worker was lost", done) for done in (10, 12, 15, 99, 98)]
    given = run(job, failures, [0, 0, 0, 0, 80, 80])
    assert job.pauses == [0, 2, 4, 0, 2]
    assert given == [None, *failures]
    logged = job.events_named("restart")
    assert [(event["done"], event["left"]) for event in logged] == [(10, 2), (12, 1), (15, 0), (99, 2), (98, 1)]


def test_a_crash_at_the_same_count_is_called_deterministic(job: RecordedJob) -> None:
    with pytest.raises(
        DisScaleError,
        match=r"dis: crashed 4 times in a row with 112 done: this looks deterministic; .* last failure: worker lost",
    ):
        run(job, [WorkerFailure("worker lost", 112)] * 4, [80] * 5)
    assert job.pauses == [0, 2, 4]


def test_failures_at_different_counts_are_not(job: RecordedJob) -> None:
    failures: list[Exception] = [WorkerFailure("worker lost", done) for done in (96, 112, 96, 128)]
    with pytest.raises(DisScaleError, match="dis: 4 attempts in a row failed without progress: worker lost"):
        run(job, failures, [80] * 5)


def test_an_attempt_follows_unavailable_storage_but_not_damage(job: RecordedJob) -> None:
    assert len(run(job, [StorageAway("away")], [0, 0])) == 2
    with pytest.raises(StorageError, match="damaged"):
        run(job, [StorageError("damaged")], [0, 0])


def test_after_the_last_attempt_storage_that_is_away_is_reported_as_such(job: RecordedJob) -> None:
    """Its exit code lets a new cluster try again; a driver's error and a worker's count alike."""
    of_a_rank = ray.exceptions.RayTaskError("train", "traceback", StorageAway("away"))
    for failure in (StorageAway("away"), of_a_rank, StorageFailure("away")):
        with pytest.raises(StorageAway, match="dis: 4 attempts in a row failed without progress: away"):
            run(job, [WorkerFailure("lost")] * 3 + [failure], [0] * 5)
    with pytest.raises(DisScaleError) as raised:
        run(job, [StorageAway("away")] * 3 + [WorkerFailure("lost")], [0] * 5)
    assert not isinstance(raised.value, StorageAway)
