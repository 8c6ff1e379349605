"""Restarts: which failures lead to another attempt, how many there are, how long they wait, and the error after the last."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count, cycle, repeat
from pathlib import Path
from string import ascii_lowercase

import pytest
import ray

from dis_scale.process.errors import DisScaleError, StorageAway, StorageError
from dis_scale.recipe import ModelTrain, Recipe
from dis_scale.sweep import state
from pipelines.failures import Cause, Hang, WorkerFailure
from pipelines.restarts import CRASH, with_restarts
from tests.support.stage_jobs import RecordedJob, job_of


@pytest.fixture
def job(tiny: Recipe) -> RecordedJob:
    return job_of(tiny)


def run(job: RecordedJob, failures: Sequence[Exception], stored: list[int]) -> list[WorkerFailure | None]:
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
        DisScaleError, match=r"dis: crashed 4 times in a row with 112 done: this looks deterministic; .* last failure: worker lost"
    ):
        run(job, [WorkerFailure("worker lost", 112)] * 4, [80] * 5)
    assert job.pauses == [0, 2, 4]


def test_an_attempt_gets_the_failure_before_it_also_one_that_does_not_count(job: RecordedJob) -> None:
    """From its time on training counts the restart's seconds."""
    failures = [WorkerFailure("lost", 10), WorkerFailure("away", 12, cause="storage"), WorkerFailure("away", 99, cause="storage")]
    assert run(job, failures, [0, 0, 0, 80]) == [None, *failures]


def test_the_last_words_count_the_crashes(tiny: Recipe) -> None:
    """A loss of a node is no crash."""
    job = job_of(tiny)
    job.gone_of = lambda nodes: nodes & {"b"}  # type: ignore[assignment]
    places = iter("aabb")

    def attempt(_: WorkerFailure | None) -> None:
        job.placed = frozenset(place := next(places))
        raise WorkerFailure("lost" if place == "b" else "it crashed", 0 if place == "b" else 500)

    with pytest.raises(DisScaleError, match=r"dis: crashed 2 times in a row with 500 done: .* last failure: it crashed"):
        with_restarts(job, "dis", attempt, lambda: 80)


@pytest.mark.parametrize(("batch", "tries"), [(None, 101), (1024, 10)])
def test_crashes_are_near_by_the_models_own_batch(tiny: Recipe, batch: int | None, tries: int) -> None:
    """Each dies one step of 1,024 images before or after the last."""
    train = tiny.train.model_copy(update={"restarts": 100})
    own = tiny.models["dit"].model_copy(update={"train": ModelTrain(batch_images=batch) if batch else ModelTrain()})
    job = job_of(tiny.model_copy(update={"train": train, "models": {**tiny.models, "dit": own}}))
    job.log.context.model = "dit"
    crashes = [WorkerFailure("it crashed", 4096 + 1024 * (number % 2)) for number in range(101)]
    with pytest.raises(DisScaleError, match=rf"dis: (crashed )?{tries} (times|attempts) in a row"):
        run(job, crashes, [80] * 102)


def test_a_device_that_is_the_only_one_is_waited_for_and_not_called_a_mistake(tiny: Recipe) -> None:
    """Its node may be repaired on Monday."""
    job = job_of(tiny.model_copy(update={"train": tiny.train.model_copy(update={"restarts": 100})}))
    with pytest.raises(DisScaleError, match="dis: 101 attempts in a row failed without progress: ECC"):
        run(job, [WorkerFailure("ECC", 112, cause="device")] * 101, [80] * 102)
    assert sum(job.pauses) > 45 * 3600


@pytest.mark.parametrize(("placed", "tries"), [("ab", 69), ("a", 4)])
def test_a_bad_node_is_used_for_an_hour_until_another_takes_the_place_of_one_that_is_gone(
    job: RecordedJob, placed: str, tries: int
) -> None:
    """A new node starts in minutes, attempts on the bad one fail in seconds; where there was no other node, none is waited for."""
    made = 0

    def attempt(_: WorkerFailure | None, last: int = 0) -> str:
        nonlocal made
        made += 1
        job.placed, job.reuses_excluded = frozenset(placed), True
        if made == last:
            return "trained"
        raise WorkerFailure("ECC", 112, cause="device")

    if len(placed) > 1:
        assert with_restarts(job, "dis", lambda failure: attempt(failure, last=15), lambda: 80) == "trained"
        assert max(job.pauses) == 60
        job.pauses.clear()
        made = 0
    with pytest.raises(DisScaleError, match="dis: 4 attempts in a row failed without progress: ECC"):
        with_restarts(job, "dis", attempt, lambda: 80)
    assert made == tries


def test_failures_at_different_counts_are_not(job: RecordedJob) -> None:
    failures: list[Exception] = [WorkerFailure("worker lost", done) for done in (96, 112, 96, 128)]
    with pytest.raises(DisScaleError, match="dis: 4 attempts in a row failed without progress: worker lost"):
        run(job, failures, [80] * 5)


def test_an_attempt_follows_unavailable_storage_but_not_damage(job: RecordedJob) -> None:
    assert len(run(job, [StorageAway("away")], [0, 0])) == 2
    with pytest.raises(StorageError, match="damaged"):
        run(job, [StorageError("damaged")], [0, 0])


def test_an_outage_of_storage_is_waited_for_and_does_not_count(job: RecordedJob) -> None:
    """For an hour, in which each attempt may take minutes to notice; a driver's error and a worker's are alike."""
    of_a_rank = ray.exceptions.RayTaskError("train", "traceback", StorageAway("away"))
    outage = [StorageAway("away"), of_a_rank, WorkerFailure("away", cause="storage")] * 10
    lost = [WorkerFailure("lost")] * 3
    assert len(run(job, [*lost, *outage], [0] * 40)) == 34
    with pytest.raises(StorageAway, match="dis: storage has been away for 60 minutes: away"):
        run(job, outage * 3, [0] * 99)
    with pytest.raises(DisScaleError, match="dis: 4 attempts in a row failed without progress: lost"):
        run(job, [*lost, *outage, WorkerFailure("lost")], [0] * 40)


def test_outages_with_training_between_them_are_not_one(job: RecordedJob) -> None:
    """Three days of it, with resume points; or an hour, before the first."""
    for pause_s, stored in ((3 * 86_400, [0, 0, 80, 80]), (3_700, [0, 0, 0, 0])):
        left, counts = 3, iter(stored)

        def attempt(_: WorkerFailure | None, pause_s: int = pause_s) -> int:
            nonlocal left
            left -= 1
            if left == 1:
                job.pause(pause_s)
            if left:
                raise WorkerFailure("503", cause="storage")
            return left

        assert with_restarts(job, "dis", attempt, lambda counts=counts: next(counts)) == 0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("nodes", "done", "cause", "attempts"),
    [
        ("ababa", [112] * 5, ["lost"], 5), ("aaaaaaaaaa", [112] * 10, ["lost"], 10), ("ababababab", [112, 160] * 5, ["lost"], 41),
        ("ab", [112, 128, 96, 112, 112], ["lost"], 5), ("aaaabbbb", [112] * 8, ["lost"], 5),
        ("ab", [0], ["lost"], 5), ("a", [0], ["lost"], 10), ("ab", [0], ["connection"], 20), ("a", [0], ["connection"], 30),
        ("ab", [0], ["lost", "connection"], 5), ("ab", [112], ["connection", "lost"], 5),
    ],
    ids=[
        "on two sets of nodes", "always on one set", "at two places", "a step apart", "after a move",
        "before a step", "before a step on one set", "no connection", "no connection on one set", "both", "the other first",
    ],
)  # fmt: skip
def test_a_deterministic_crash_does_not_burn_all_restarts(
    tiny: Recipe, nodes: str, done: list[int], cause: list[Cause], attempts: int
) -> None:
    """Of the forty that this recipe allows."""
    recipe = tiny.model_copy(update={"train": tiny.train.model_copy(update={"restarts": 40})})
    job, made = job_of(recipe), 0

    def attempt(_: WorkerFailure | None) -> None:
        nonlocal made
        job.placed = frozenset(nodes[made % len(nodes)])
        made += 1
        raise WorkerFailure("worker lost", done[(made - 1) % len(done)], cause=cause[(made - 1) % len(cause)])

    with pytest.raises(DisScaleError):
        with_restarts(job, "dis", attempt, lambda: 80)
    assert made == attempts


@dataclass
class OnNodes:
    """Attempts on all nodes but those that are left out, which fail while they are on the bad one, and end well without it."""

    job: RecordedJob
    nodes: str
    bad: str
    done: Iterator[int]
    hangs: bool = True
    cause: Cause = "lost"
    tried: list[str] = field(default_factory=list)
    stored: int = 80

    def __call__(self, _: WorkerFailure | None) -> int:
        self.job.placed = frozenset(self.nodes) - self.job.left_out
        self.tried.append("".join(sorted(self.job.placed)))
        if self.bad in self.job.placed:
            failure = Hang("hanging", next(self.done)) if self.hangs else WorkerFailure("killed", next(self.done), cause=self.cause)
            failure.node = "" if self.hangs else self.bad
            raise failure
        self.stored += 80
        return self.stored

    def run(self) -> int:
        return with_restarts(self.job, "dis", self, lambda: self.stored)


def job_with(recipe: Recipe, root: object, restarts: int) -> RecordedJob:
    return job_of(recipe.model_copy(update={"train": recipe.train.model_copy(update={"restarts": restarts})}), root)


@pytest.mark.parametrize("done", [repeat(0), count(100, 100)], ids=["before a step", "anywhere"])
@pytest.mark.parametrize(("nodes", "bad"), [("abcd", "a"), ("abcd", "d"), (ascii_lowercase, "z")])
def test_after_two_hangs_in_a_row_each_node_is_left_out_in_turn(
    tiny: Recipe, tmp_path: Path, nodes: str, bad: str, done: Iterator[int]
) -> None:
    """One GPU that hangs lets all ranks wait: a hundred attempts of 15 minutes ended the model, and then the next one."""
    made = OnNodes(job_with(tiny, tmp_path, 100), nodes, bad, done)
    assert made.run() == 160
    assert made.tried[:2] == [nodes] * 2
    assert len(made.tried) <= CRASH.on_any
    assert bad in made.job.left_out
    lone = {bad: 1} if len(nodes) < CRASH.on_any else {}
    assert state.node_failures(made.job.sweep) == lone, "once may be the file system of all; of several no one knows which"


def test_the_only_attempt_after_two_hangs_is_without_half_of_the_nodes(tiny: Recipe, tmp_path: Path) -> None:
    made = OnNodes(job_with(tiny, tmp_path, 2), "abcd", "b", repeat(0))
    assert made.run() == 160
    assert made.tried == ["abcd", "abcd", "cd"]


def test_a_node_from_which_storage_is_away_is_left_out(tiny: Recipe, tmp_path: Path) -> None:
    """Its mount or its route is broken. Attempts on it would end for hours, and then the sweep."""
    made = OnNodes(job_with(tiny, tmp_path, 3), "abc", "b", repeat(0), hangs=False, cause="storage")
    assert made.run() == 160
    assert made.tried == ["abc", "abc", "abc", "ac"]
    assert not state.node_failures(made.job.sweep), "rank 0's node asks storage for all"


def test_storage_that_is_away_for_moments_leaves_no_node_out(tiny: Recipe, tmp_path: Path) -> None:
    """Three times in weeks, with resume points between them, each seen from rank 0's node."""
    job, stored, left_out = job_with(tiny, tmp_path, 3), count(80, 80), list[frozenset[str]]()

    def attempt(_: WorkerFailure | None) -> None:
        left_out.append(job.left_out)
        if len(left_out) <= 4:
            failure = WorkerFailure("503", cause="storage")
            failure.node = "a"
            raise failure

    with_restarts(job, "dis", attempt, lambda: next(stored))
    assert left_out == [frozenset()] * 5


def test_a_program_that_hangs_on_all_nodes_ends_as_deterministic(tiny: Recipe, tmp_path: Path) -> None:
    made = OnNodes(job_with(tiny, tmp_path, 100), "a", "a", repeat(0))

    def attempt(failure: WorkerFailure | None) -> int:
        made.job.left_out = frozenset()  # there are no others
        return made(failure)

    with pytest.raises(DisScaleError, match="crashed 10 times in a row"):
        with_restarts(made.job, "dis", attempt, lambda: 80)
    assert not state.node_failures(made.job.sweep)


def ends(plan: str, job: RecordedJob) -> list[str]:
    """Run attempts on two nodes that hang (h), are lost after a resume point (l) or hang after one (H), then one that ends well.

    Return the nodes of each.
    """
    stored, tried, left = [0], list[str](), list(plan)

    def attempt(_: WorkerFailure | None) -> int:
        job.placed = frozenset("ab") - job.left_out
        tried.append("".join(sorted(job.placed)))
        end = left.pop(0) if left else ""
        stored[0] += 80 * (end in ("l", "H", ""))
        if end:
            raise Hang("hanging") if end in "hH" else WorkerFailure("lost", stored[0])
        return stored[0]

    with_restarts(job, "dis", attempt, lambda: stored[0])
    return tried


def test_stalls_of_what_all_nodes_share_exclude_none(tiny: Recipe, tmp_path: Path) -> None:
    """Each costs two hangs, and the next attempt continues, whichever node it is without; that is used again afterwards."""
    job = job_with(tiny, tmp_path, 100)
    assert ends("hhlhhl", job) == ["ab", "ab", "b", "ab", "ab", "a", "ab"]
    assert state.node_failures(job.sweep) == {"a": 1, "b": 1}


def test_a_hang_without_a_node_acquits_it(tiny: Recipe, tmp_path: Path) -> None:
    """The program hangs by itself, now and then."""
    job = job_with(tiny, tmp_path, 100)
    assert ends("hhHhHl", job) == ["ab", "ab", "b", "ab", "a", "ab", "ab"]
    assert not state.node_failures(job.sweep)


@pytest.mark.parametrize(
    ("done", "tried", "ends"),
    [
        pytest.param(repeat(0), ["abc", "abc", "ac"], True, id="before a step"),
        pytest.param(repeat(48), ["abc"] * 4, False, id="at one place"),
        pytest.param(cycle((48, 64)), ["abc"] * 4, False, id="at one place, seen a step earlier or later"),
        pytest.param(count(48, 100), ["abc", "abc", "abc", "ac"], True, id="at several places"),
    ],
)
def test_a_node_where_processes_die_is_left_out(
    tiny: Recipe, tmp_path: Path, done: Iterator[int], tried: list[str], ends: bool
) -> None:
    """All attempts would end there, though the other nodes train the model. Deaths at one place are of the model."""
    made = OnNodes(job_with(tiny, tmp_path, 3), "abc", "b", done, hangs=False)
    with nullcontext() if ends else pytest.raises(DisScaleError):
        assert made.run() == 160
    assert made.tried == tried
    assert state.node_failures(made.job.sweep) == ({"b": 1} if ends else {})


@pytest.mark.parametrize("done", [0, 5_000_032], ids=["before a step", "a step after a resume point"])
@pytest.mark.parametrize("late", [0, 1], ids=["known at once", "known by the next attempt"])
def test_a_storm_of_preemptions_is_not_deterministic(tiny: Recipe, done: int, late: int) -> None:
    """An hour and more in which each node is taken away before the attempt gets anywhere. Ray notices some losses after 30 s."""
    job, made = job_of(tiny.model_copy(update={"train": tiny.train.model_copy(update={"restarts": 100})})), 0

    def attempt(_: WorkerFailure | None) -> int:
        nonlocal made
        made += 1
        job.placed = frozenset({f"node-{made}"})
        job.gone = {f"node-{number}" for number in range(1, made + 1 - late)}
        if made == 90:
            return made
        failure = WorkerFailure("a worker was lost", done)
        failure.at = 600.0 * made  # each waits for a new node
        raise failure

    assert with_restarts(job, "dis", attempt, lambda: done) == 90
    assert job.now_s() > 3600


def test_a_node_that_is_lost_later_excuses_no_earlier_crash(tiny: Recipe) -> None:
    """With 64 ranks each attempt was on the node that a spot market takes after the ninth; only this one may have lost it."""
    job = job_of(tiny.model_copy(update={"train": tiny.train.model_copy(update={"restarts": 100})}))
    every_ten_minutes = count(0, 600)

    def attempt(_: WorkerFailure | None) -> None:
        lost = len(job.pauses) >= 9
        job.placed, job.gone = frozenset("abcdefgi" if lost else "abcdefgh"), {"h"} if lost else set()
        failure = WorkerFailure("it crashed", 112)
        failure.at = next(every_ten_minutes)
        raise failure

    with pytest.raises(DisScaleError, match="dis: crashed 9 times in a row with 112 done"):
        with_restarts(job, "dis", attempt, lambda: 80)


def test_a_node_that_was_left_out_and_is_taken_away_excuses_no_hang(job: RecordedJob) -> None:
    """An autoscaler takes what is idle; all other nodes would never be left out."""
    left_out = list[frozenset[str]]()

    def attempt(_: WorkerFailure | None) -> None:
        number = len(left_out)
        left_out.append(job.left_out)
        if number < 3:
            job.placed, job.gone = frozenset("bc" if number == 2 else "ab"), {"a"} if number == 2 else set()
            failure = Hang("no step for 15 minutes", 112)
            failure.at = 900.0 * number
            raise failure

    with_restarts(job, "dis", attempt, lambda: 80)
    assert left_out == [frozenset(), frozenset(), {"a"}, {"b"}]


def test_one_crash_among_losses_of_nodes_is_not_called_deterministic(job: RecordedJob) -> None:
    """The message names what to look for: not a step that fails each time."""

    def attempt(_: WorkerFailure | None) -> int:
        job.placed = frozenset({f"node-{len(job.pauses)}"})
        job.gone = set(job.placed) if job.pauses else set()
        raise WorkerFailure("a worker was lost", 112)

    with pytest.raises(DisScaleError, match="dis: 4 attempts in a row failed without progress: a worker was lost"):
        with_restarts(job, "dis", attempt, lambda: 80)


@pytest.mark.parametrize(
    ("nodes", "attempts"), [(("ab", "ac"), 11), (("", ""), 11), (("ab", "cd"), 5)], ids=["of one node", "unknown", "of all"]
)
def test_a_failed_device_is_not_taken_for_a_mistake_while_one_node_is_in_all_attempts(
    tiny: Recipe, nodes: tuple[str, str], attempts: int
) -> None:
    """Its node is excluded, but used while the others are away, and these may be for hours."""
    job, made = job_of(tiny.model_copy(update={"train": tiny.train.model_copy(update={"restarts": 10})})), 0

    def attempt(_: WorkerFailure | None) -> None:
        nonlocal made
        job.placed = frozenset(nodes[made % 2])
        made += 1
        raise WorkerFailure("uncorrectable ECC error", 112, cause="device")

    with pytest.raises(DisScaleError):
        with_restarts(job, "dis", attempt, lambda: 80)
    assert made == attempts
    assert sum(job.pauses) == sum(min(600, 2 * 2**n) for n in range(attempts - 2))
