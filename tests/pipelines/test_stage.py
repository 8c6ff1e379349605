"""Lost attempts: which errors another attempt may survive, how many there are, how long they wait, and what is said at the end."""

import pytest
import ray

from dis_scale.errors import DisScaleError, StorageAway, StorageError
from dis_scale.recipe import Recipe, reading
from pipelines import stage
from pipelines.stage import Lost, Worker
from pipelines.train import _largest, _room
from tests.conftest import TINY


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each attempt waited for the one before."""
    waited: list[float] = []
    monkeypatch.setattr(stage, "pause", waited.append)
    return waited


def run(recipe: Recipe, losses: list[Exception], kept: list[int]) -> list[Lost | None]:
    left, told = list(losses), list[Lost | None]()
    counts = iter(kept)

    def attempt(lost: Lost | None) -> list[Lost | None]:
        told.append(lost)
        if left:
            raise left.pop(0)
        return told

    return stage.with_restarts(recipe, "dis", attempt, lambda: next(counts))


def test_attempts_without_progress_wait_longer_each_time_and_progress_resets_the_count(
    tiny: Recipe, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    losses = [Lost("a worker was lost", done) for done in (10, 12, 15, 99, 98)]
    told = run(tiny, losses, [0, 0, 0, 0, 80, 80])
    assert waits == [0, 2, 4, 0, 2]
    assert told == [None, *losses]
    assert "dis: a worker was lost; going on from what is stored in 0 s, 2 more attempts without progress" in (
        capsys.readouterr().out
    )


def test_a_crash_at_the_same_place_is_called_one(tiny: Recipe, waits: list[float]) -> None:
    with pytest.raises(
        DisScaleError,
        match=r"dis: crashed 4 times at the same place, 112 done, which is no accident; .* the last time: worker lost",
    ):
        run(tiny, [Lost("worker lost", 112)] * 4, [80] * 5)
    assert waits == [0, 2, 4]


def test_losses_at_different_places_are_not(tiny: Recipe, waits: list[float]) -> None:
    losses: list[Exception] = [Lost("worker lost", done) for done in (96, 112, 96, 128)]
    with pytest.raises(DisScaleError, match="dis: 4 attempts in a row were lost without progress: worker lost"):
        run(tiny, losses, [80] * 5)


def test_storage_that_is_away_is_waited_for_and_what_is_damaged_is_not(tiny: Recipe, waits: list[float]) -> None:
    assert len(run(tiny, [StorageAway("away")], [0, 0])) == 2
    with pytest.raises(StorageError, match="damaged"):
        run(tiny, [StorageError("damaged")], [0, 0])


@pytest.mark.parametrize(
    ("cause", "passes"),
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (StorageAway("cannot write"), True),
        (StorageError("no space left on the device"), False),
        (ValueError("gloo"), False),
    ],
    ids=str,
)
def test_a_broken_connection_restarts_as_a_lost_worker_does(cause: Exception, passes: bool) -> None:
    assert stage._may_pass(ray.exceptions.RayTaskError("train", "trace", cause)) == passes


def test_stacks_name_the_function_that_stands_still() -> None:
    assert "test_stacks_name_the_function_that_stands_still" in Worker().stacks()


def test_an_attempt_takes_the_largest_divisor_of_the_lanes_for_which_there_is_room() -> None:
    sizes = reading.load(TINY, ["train.lanes=8", "train.workers=2..6"]).train.world_sizes
    assert sizes == [4, 2]
    bundle = {"CPU": 1, "train": 1.0}
    assert [_largest(sizes, _room(bundle, [{"CPU": cpus, "train": 8}])) for cpus in (9, 5, 3, 1)] == [4, 4, 2, 0]
    assert _room(bundle, [{"CPU": 8.0}]) == 0


def test_one_workers_resources_lie_on_one_node() -> None:
    bundle = {"CPU": 2, "train": 1.0}
    assert _room(bundle, [{"CPU": 3, "train": 2}, {"CPU": 1, "train": 1}, {"CPU": 4, "train": 1}]) == 2
