"""A published checkpoint that cannot be measured is logged, noted and skipped; an evaluation without news ends."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError

from dis_scale.process.errors import DisScaleError, Preempted, StorageAway, StorageError, StorageFull, UserError
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sampled, Sweep, state
from pipelines import evaluate, places, stage
from pipelines.worker import WorkerFailure
from tests.conftest import TINY
from tests.support.events import events


@dataclass
class Failing:
    """An evaluation that can measure nothing."""

    sweep: Sweep
    error: DisScaleError

    def evaluate(self, _: Sampled) -> dict[str, float]:
        raise self.error


def sweep_at(root: Path, recipe: Recipe) -> Sweep:
    return Sweep.below(open_folder(root), recipe)


def test_evaluation_opens_with_the_gpus_that_ended_its_wait(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([2, 0])  # training continues a moment later
    monkeypatch.setattr(evaluate, "own_gpus", lambda _: next(counts))
    assert evaluate._await_gpus(sweep_at(tmp_path, tiny)) == 2, "an evaluation without evaluators would fail"


TRAINING, APART = {"GPU": 8.0, "CPU": 32.0, "train": 8.0}, {"GPU": 1.0, "CPU": 4.0, "evaluate": 1.0}
ANY = {"GPU": 8.0, "CPU": 32.0}


@pytest.mark.parametrize(
    ("nodes", "before", "after"),
    [
        ([TRAINING, APART, APART], 2, 2),
        ([TRAINING, TRAINING, APART], 1, 1),
        ([TRAINING | {"GPU": 4.0}, APART], 1, 1),
        ([ANY], 0, 4),
        ([ANY, {"CPU": 8.0}, {"GPU": 2.0, "CPU": 8.0}], 2, 4),
    ],
    ids=["apart", "more nodes than training needs", "training has too few", "one node", "two more GPUs"],
)
def test_as_many_evaluators_have_a_gpu_as_training_leaves_and_nodes_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], before: int, after: int
) -> None:
    sweep = sweep_at(tmp_path, reading.load(TINY, ["train.workers=8", "train.lanes=8", "evaluate.workers=4"]))
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    total = {name: sum(node.get(name, 0) for node in nodes) for node in nodes for name in node}
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    assert evaluate.own_gpus(sweep) == before
    monkeypatch.setattr(state, "training_over", lambda _: True)
    assert evaluate.own_gpus(sweep) == after


def test_evaluators_stay_off_the_nodes_that_training_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise one of them may hold a GPU of the only node on which four workers fit, and training waits for ever."""
    declared = {"a": {"GPU": 4.0, "CPU": 8.0, "train": 4.0}, "b": {"GPU": 2.0, "CPU": 8.0}}
    nodes = [{"Alive": True, "NodeID": name, "Resources": node} for name, node in declared.items()]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    recipe = reading.load(TINY, ["evaluate.workers=3"])
    selectors = [request.get("label_selector") for _, request in places.requests(recipe, "cuda", 3)]
    assert selectors == [{"ray.io/node-id": "!in(a)"}] * 2 + [None]


OTHERS = [Preempted("stop"), StorageAway("503"), StorageFull("no space left"), WorkerFailure("a worker was lost")]


def from_a_worker(error: DisScaleError) -> Any:
    """Return the error as Ray raises it: of the same class, with a traceback and addresses around it."""
    return RayTaskError("sample", "Traceback ...", error, pid=1, ip="192.0.2.1").as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [StorageError("weights.safetensors: damaged"), DisScaleError("3 samples are not finite"), UserError("not finite")],
    ids=str,
)
@pytest.mark.parametrize("wrap", [lambda error: error, from_a_worker], ids=["here", "in a worker"])
def test_a_checkpoint_that_cannot_be_measured_is_skipped_and_noted(
    tmp_path: Path, tiny: Recipe, capsys: pytest.CaptureFixture[str], error: DisScaleError, wrap: Callable[[Any], Any]
) -> None:
    sweep, skipped, sampled = sweep_at(tmp_path, tiny), set[Sampled](), Sampled("dis", 160, "wide")
    evaluate.evaluate_one(Failing(sweep, wrap(error)), sampled, skipped)  # type: ignore[arg-type]
    assert skipped == {sampled}
    (event,) = events(capsys.readouterr().out, "skip")
    assert (event["model"], event["images"], event["variant"]) == ("dis", 160, "wide")
    assert state.skipped(sweep) == {sampled: str(error)}


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_a_failure_that_is_not_the_checkpoints_skips_nothing(
    tmp_path: Path, tiny: Recipe, error: DisScaleError
) -> None:
    sweep, skipped = sweep_at(tmp_path, tiny), set[Sampled]()
    with pytest.raises(type(error)):
        evaluate.evaluate_one(Failing(sweep, error), Sampled("dis", 0), skipped)  # type: ignore[arg-type]
    assert skipped == set()
    assert state.skipped(sweep) == {}


@pytest.mark.parametrize("wrap", [lambda error: error, from_a_worker], ids=["here", "in a worker"])
def test_a_floor_that_cannot_be_measured_is_logged_and_stops_nothing(
    tmp_path: Path, tiny: Recipe, capsys: pytest.CaptureFixture[str], wrap: Callable[[Any], Any]
) -> None:
    def fail() -> None:
        raise wrap(StorageError("photos/a/03.png: storage refuses access (403)"))

    sweep = sweep_at(tmp_path, tiny)
    assert not state.floor_settled(sweep)
    evaluate.measure_floor(SimpleNamespace(floor=fail, sweep=sweep))  # type: ignore[arg-type]
    assert state.floor_settled(sweep)
    assert state.floor_skipped(sweep) == "photos/a/03.png: storage refuses access (403)"
    assert "floor: not measured: photos/a/03.png: storage refuses access (403)" in capsys.readouterr().out


@pytest.mark.parametrize("error", [e for e in OTHERS if not isinstance(e, StorageAway)], ids=str)
def test_a_failure_that_is_not_the_floors_is_raised(error: DisScaleError) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        evaluate.measure_floor(SimpleNamespace(floor=fail))  # type: ignore[arg-type]


def test_an_evaluation_without_news_ends_with_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweep_at(tmp_path, reading.load(TINY, ["evaluate.give_up_after_s=0.3", "evaluate.floor=false"]))
    opened: list[Any] = []
    still = SimpleNamespace(evaluators=SimpleNamespace(move=lambda: False))
    monkeypatch.setattr(stage, "connect", lambda: None)
    monkeypatch.setattr(evaluate, "choose_device", lambda _: ("cpu", "test"))
    monkeypatch.setattr(evaluate, "open_evaluation", lambda *arguments: opened.append(arguments) or still)
    monkeypatch.setattr(evaluate, "POLL_EVERY_S", 0.1)
    with pytest.raises(DisScaleError, match="nothing was published or saved for 0 s: is training running"):
        evaluate.evaluate_published(sweep, [])
    assert len(opened) == 1, "it is not restarted"


def test_a_wait_of_a_day_asks_storage_rarely(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each poll costs several requests."""
    now_s, polls = [0.0], list[float]()

    def pause(seconds: float) -> None:
        now_s[0] += seconds

    def news() -> bool:
        polls.append(now_s[0])
        return now_s[0] > 86_400

    monkeypatch.setattr(evaluate.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(stage, "pause", pause)
    evaluate.wait_for_training(sweep_at(tmp_path, tiny), news)
    assert len(polls) < 3000
    assert all(later - poll < 1.001 * max(2, poll / 20) for poll, later in pairwise(polls))
