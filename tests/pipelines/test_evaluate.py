"""A published checkpoint that cannot be measured is logged, noted and skipped; an evaluation without news ends."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from dis_scale.data.sources import open_source
from dis_scale.process.context import Context
from dis_scale.process.errors import (
    DisScaleError,
    Held,
    OutOfMemory,
    Preempted,
    StorageAway,
    StorageError,
    StorageFull,
    UserError,
    WrongKernel,
)
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import open_folder
from dis_scale.storage.lease import Holder
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import Ended
from pipelines import evaluate
from pipelines.evaluate import PublishedEvaluation
from pipelines.evaluators import Evaluator, NotOpened
from pipelines.failures import WorkerFailure
from pipelines.lines import Log, parse
from pipelines.nodes import Node
from pipelines.places import Places, own_gpus
from tests.conftest import TINY
from tests.support.documents import put_metrics, put_published
from tests.support.labelled_images import png
from tests.support.stage_jobs import RecordedJob, deal_of, job_of


@dataclass
class Failing:
    """An evaluation that can measure nothing."""

    error: DisScaleError

    def evaluate(self, _: Sampled) -> dict[str, float]:
        raise self.error

    def floor(self) -> None:
        raise self.error


@pytest.fixture
def job(tiny: Recipe, tmp_path: Path) -> RecordedJob:
    return job_of(tiny, tmp_path)


def test_evaluation_opens_with_the_gpus_that_ended_its_wait(job: RecordedJob) -> None:
    counts = iter([2, None])  # training continues a moment later
    assert evaluate.await_gpus(job, lambda: next(counts)) == 2, "an evaluation without evaluators would fail"
    assert job.events == []


TRAINING, APART = {"GPU": 8.0, "CPU": 32.0, "train": 8.0}, {"GPU": 1.0, "CPU": 4.0, "evaluate": 1.0}
ANY = {"GPU": 8.0, "CPU": 32.0}


def listed(nodes: list[dict[str, float]]) -> list[Node]:
    return [Node(name, name, resources) for name, resources in zip("abcd", nodes, strict=False)]


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
    tmp_path: Path, nodes: list[dict[str, float]], before: int, after: int
) -> None:
    recipe = reading.load(TINY, ["train.workers=8", "train.lanes=8", "evaluate.workers=4"])
    sweep, places = job_of(recipe, tmp_path).sweep, Places(recipe, listed(nodes))
    assert own_gpus(sweep, places) == before
    for model in recipe.models:
        Ended(why="it failed").write(sweep.run(model).folder)
    assert own_gpus(sweep, places) == after


def test_evaluators_stay_off_the_nodes_that_training_needs() -> None:
    """Otherwise one of them may hold a GPU of the only node on which four workers fit, and training waits for ever."""
    nodes = listed([{"GPU": 4.0, "CPU": 8.0, "train": 4.0}, {"GPU": 2.0, "CPU": 8.0}])
    places = Places(reading.load(TINY, ["evaluate.workers=3"]), nodes)
    selectors = [request.options.get("label_selector") for _, request in places.evaluators("cuda", 3)]
    assert selectors == [{"ray.io/node-id": "!in(a)"}] * 2 + [None]


def test_evaluators_avoid_a_node_whose_device_failed_as_long_as_another_holds_one() -> None:
    nodes = listed([{"GPU": 4.0, "CPU": 8.0, "train": 4.0}, {"GPU": 1.0, "CPU": 8.0}, {"GPU": 1.0, "CPU": 8.0}])
    recipe = reading.load(TINY, ["evaluate.workers=2", "evaluate.gpu_share=0.1"])
    places = Places(recipe, nodes).without(["b"])
    selectors = [request.options.get("label_selector") for _, request in places.evaluators("cuda", 2)]
    assert selectors == [{"ray.io/node-id": "!in(a,b)"}, {"ray.io/node-id": "!in(b)"}]
    assert [number for number, _ in Places(recipe, nodes).without("abc").evaluators("cuda", 0)] == []
    assert places.evaluates("cuda")
    assert places.without("ab").evaluates("cuda")
    assert not places.without("abc").evaluates("cuda")
    assert Places(recipe, nodes).without("bc").evaluates("cpu")


def test_training_plans_with_what_evaluators_take_beside_it_once_a_node_has_failed(tmp_path: Path) -> None:
    """Those that lose their own GPUs move onto training's."""
    nodes = listed([{"GPU": 4.0, "CPU": 8.0, "train": 4.0}, {"GPU": 2.0, "CPU": 8.0}])
    recipe = reading.load(TINY, ["evaluate.workers=2", "evaluate.gpu_share=0.1"])
    sweep, places = job_of(recipe, tmp_path).sweep, Places(recipe, nodes)
    assert places.avoiding_failed(sweep, "cuda").shared == 0
    for _ in range(state.MOST_NODE_FAILURES):
        state.record_node_failure(sweep.failed_nodes("evaluate"), "b", "uncorrectable ECC error")
    places = places.avoiding_failed(sweep, "cuda")
    assert own_gpus(sweep, places) == 0
    assert places.shared == 0.1


def test_evaluators_that_share_fit_however_few_gpus_are_left() -> None:
    """Four on the last GPU, with half of its memory each, would leave training none and end its model."""
    recipe = reading.load(TINY, ["evaluate.workers=4", "evaluate.gpu_share=0.5", "train.workers=1..8", "train.lanes=8"])
    for gpus in (8, 4, 2, 1):
        places = Places(recipe, [Node("0" * 56, "a", {"GPU": float(gpus), "CPU": 16.0})])
        assert places.shared == 0.5
        assert [number for number, _ in places.evaluators("cuda", 0)] == [*reversed(range(gpus))][:4]


OTHERS = [
    Held("taken over"),
    Preempted("stop"),
    StorageAway("503"),
    StorageFull("no space left"),
    WorkerFailure("a worker was lost"),
    NotOpened("no decoder at /models/vae (on node 3)"),
]


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
    job: RecordedJob, error: DisScaleError, wrap: Callable[[Any], Any]
) -> None:
    skipped, sampled = set[Sampled](), Sampled("dis", 160, "wide")
    evaluate.evaluate_one(job, Failing(wrap(error)), sampled, skipped)  # type: ignore[arg-type]
    assert skipped == {sampled}
    assert job.events == [{"event": "skip", "model": "dis", "images": 160, "variant": "wide"}]
    assert state.skipped(job.sweep) == {sampled: str(error)}


@pytest.mark.parametrize("error", [*OTHERS, WrongKernel("the scan is wrong on all devices")], ids=str)
def test_a_failure_that_is_not_the_checkpoints_skips_nothing(job: RecordedJob, error: DisScaleError) -> None:
    skipped = set[Sampled]()
    with pytest.raises(type(error)):
        evaluate.evaluate_one(job, Failing(error), Sampled("dis", 0), skipped)  # type: ignore[arg-type]
    assert skipped == set()
    assert state.skipped(job.sweep) == {}


@dataclass
class Recorded:
    """An evaluation that fails for one model, or until it is measured again."""

    sweep: Sweep
    error: DisScaleError | None = None
    evaluated: list[Sampled] = field(default_factory=list)

    def sample(self, sampled: Sampled) -> Callable[[], dict[str, float]]:
        return partial(dict, self.evaluate(sampled))

    def evaluate(self, sampled: Sampled) -> dict[str, float]:
        self.evaluated.append(sampled)
        if self.error and sampled.model == "dit":
            raise self.error
        put_metrics(self.sweep.evaluation(sampled))
        return {}


@pytest.mark.parametrize("error", [OutOfMemory("CUDA out of memory"), WrongKernel("the scan is wrong")], ids=str)
def test_a_model_that_cannot_be_sampled_here_keeps_no_other_from_it(tmp_path: Path, error: DisScaleError) -> None:
    """The first checkpoint of the largest model would end each job, and nothing would be measured for weeks."""

    class Publishing(RecordedJob):
        """A job during whose first wait the other model is trained."""

        def pause(self, seconds: float) -> None:
            super().pause(seconds)
            put_published(self.sweep.run("dis").published_at(320))
            Ended(why="it failed").write(self.sweep.run("dis").folder)

    job = job_of(reading.load(TINY, ["evaluate.floor=false"]), tmp_path, Publishing)
    for model in job.recipe.models:
        put_published(job.sweep.run(model).published_at(160))
    Ended(why="it failed").write(job.sweep.run("dit").folder)
    evaluation = Recorded(job.sweep, error)
    with pytest.raises(type(error)):
        evaluate.evaluate_all(job, evaluation, set())  # type: ignore[arg-type]
    assert [each.variant for each in evaluation.evaluated if each.model == "dit"] == [*job.recipe.evaluate.samplings]
    assert {each.model for each in state.Backlog(job.sweep).left()} == {"dit"}
    assert len(job.pauses) == 1, "while training continues it waits for others"


@pytest.fixture
def two(tmp_path: Path) -> RecordedJob:
    """A job with one checkpoint of each of two models, whose training is over."""
    job = job_of(reading.load(TINY, ["evaluate.floor=false", "evaluate.variants={}"]), tmp_path)
    for model in job.recipe.models:
        put_published(job.sweep.run(model).published_at(160))
        Ended(why="it failed").write(job.sweep.run(model).folder)
    return job


@pytest.mark.parametrize("error", [WorkerFailure("lost"), RayActorError(), Preempted("stopped as requested"), None], ids=str)
def test_what_is_measured_at_a_failure_a_stop_or_a_move_is_measured_once(two: RecordedJob, error: Exception | None) -> None:
    """The next attempt would measure it a second time beside the first, and after a stop the time of its samples is not known."""
    first, other = two.recipe.models
    begun = threading.Event()

    class Slow(Recorded):
        def sample(self, sampled: Sampled) -> Callable[[], dict[str, float]]:
            if sampled.model == other:
                assert begun.wait(20)
                assert error
                raise error

            def measure() -> dict[str, float]:
                begun.set()
                time.sleep(0.5)
                return self.evaluate(sampled)

            return measure

    evaluation = Slow(two.sweep)
    if error:
        with pytest.raises(type(error)):
            evaluate.evaluate_all(two, evaluation, set())  # type: ignore[arg-type]
    else:
        moves = iter([False, True])
        assert not evaluate.evaluate_all(two, evaluation, set(), lambda: next(moves))  # type: ignore[arg-type]
    assert state.evaluated_counts(two.sweep, first) == [160]
    assert evaluation.evaluated == [Sampled(first, 160)]


def test_evaluators_sample_the_next_checkpoint_while_one_is_measured(two: RecordedJob) -> None:
    """The metrics of 50,000 samples took five minutes, 222 times in a sweep, for which four GPUs waited. One that cannot be
    measured is noted, and is not another one.
    """
    job = two
    steps, second = list[str](), threading.Event()

    class Slow(Recorded):
        def sample(self, sampled: Sampled) -> Callable[[], dict[str, float]]:
            steps.append(f"{sampled.model} is sampled")
            if len(steps) == 2:
                second.set()

            def measure() -> dict[str, float]:
                assert second.wait(20), "the next one waits for the metrics"
                steps.append(f"{sampled.model} is measured")
                if sampled.model == first:
                    raise StorageError("block-00000.npz: damaged")
                return self.evaluate(sampled)

            return measure

    first, other = job.recipe.models
    assert evaluate.evaluate_all(job, Slow(job.sweep), skipped := set[Sampled]())  # type: ignore[arg-type]
    assert steps == [f"{first} is sampled", f"{other} is sampled", f"{first} is measured", f"{other} is measured"]
    assert skipped == {Sampled(first, 160)}
    assert state.skipped(job.sweep) == {Sampled(first, 160): "block-00000.npz: damaged"}
    assert state.evaluated_counts(job.sweep, other) == [160]


def test_nothing_that_is_behind_a_hang_is_waited_for(two: RecordedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics are computed one after the other: the next ones would be waited for as long again."""
    over, hours, begun = threading.Event(), itertools.count(0, 2), list[Sampled]()
    monkeypatch.setattr(two, "now_s", lambda: 3600.0 * next(hours))

    class Hanging(Recorded):
        def sample(self, sampled: Sampled) -> Callable[[], dict[str, float]]:
            def measure() -> dict[str, float]:
                begun.append(sampled)
                return {"fd": float(over.wait(20))}

            return measure

    with pytest.raises(DisScaleError, match="is not measured after 6 h"):
        evaluate.evaluate_all(two, Hanging(two.sweep), set())  # type: ignore[arg-type]
    over.set()
    time.sleep(0.2)
    assert (next(hours), len(begun)) == (8, 1)


def test_what_is_measured_again_is_progress_and_what_was_skipped_is_not_tried_again(job: RecordedJob) -> None:
    """A thousand of them sample nothing for hours, and would count as a hang."""
    every = [Sampled("dis", images) for images in (16, 32, 48)]
    for sampled in every:  # before the recipe added metrics
        put_metrics(job.sweep.evaluation(sampled), metrics=())
    evaluation = Recorded(job.sweep)
    evaluate._measure_again(job, evaluation, {every[1]})  # type: ignore[arg-type]
    assert evaluation.evaluated == [every[0], every[2]]
    assert [name for name, _ in job.gauges].count("progress_timestamp_seconds") == 2


def test_gpus_that_the_last_models_leave_are_for_evaluation(tmp_path: Path) -> None:
    """Otherwise they are idle beside a growing backlog until the slowest of ten models is trained."""
    recipe = reading.load(TINY, ["train.workers=8", "train.lanes=8", "evaluate.workers=99"])
    sweep, places = job_of(recipe, tmp_path).sweep, Places(recipe, listed([ANY, ANY]))
    assert own_gpus(sweep, places) == 0
    Ended(why="it failed").write(sweep.run("dis").folder)
    assert own_gpus(sweep, places) == 8


def test_an_evaluator_that_cannot_open_its_networks_says_why(job: RecordedJob, same_priority: None) -> None:
    """Ray says of what a constructor raises that the worker was lost, in a text whose end has the reason."""
    with pytest.raises(NotOpened, match=r"vae.*\(on node "):
        Evaluator(job.sweep, "cpu").held_out(Sampled("dis", 0))


class Unmounted(Evaluator):
    """An evaluator on a node that lacks what the images' links lead to."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.sampler = sweep, SimpleNamespace(recipe=sweep.recipe)  # type: ignore[assignment]

    def _working(self) -> Any:
        return contextlib.nullcontext()

    def stop_requested(self) -> bool:
        return False


@pytest.mark.parametrize("undecodable", ["refuse", "skip"])
def test_a_floor_without_its_images_is_no_fault_of_the_node(tmp_path: Path, undecodable: str) -> None:
    """It would be left out, also by training, which needs no images."""
    for n in range(40):
        open_folder(tmp_path / "mount").write(f"{n}.png", png(n))
        (link := tmp_path / f"photos/{n % 2}/{n}.png").parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(tmp_path / f"mount/{n}.png")
    source = f"data.source={{kind: folder, url: '{tmp_path}/photos'}}"
    recipe = reading.load(TINY, [source, "data.num_classes=2", f"data.undecodable={undecodable}"])
    sweep = job_of(recipe, tmp_path).sweep
    open_source(recipe.data, sweep.store)
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="images of a floor's block are not there on"):
        Unmounted(sweep).floor(deal_of([0]))


def test_an_evaluation_that_another_process_has_taken_over_notes_nothing(job: RecordedJob) -> None:
    error = StorageError("weights.safetensors: damaged")
    with job.hold("evaluate") as held:
        Holder.here().write(held.folder, f"{held.number + 1:04d}")
        with pytest.raises(Held):
            evaluate.evaluate_one(job, Failing(error), Sampled("dis", 160), set())  # type: ignore[arg-type]
        with pytest.raises(Held):
            evaluate.measure_floor(job, Failing(error))  # type: ignore[arg-type]
    assert (state.skipped(job.sweep), state.floor_settled(job.sweep)) == ({}, False)


@pytest.mark.parametrize("wrap", [lambda error: error, from_a_worker], ids=["here", "in a worker"])
def test_a_floor_that_cannot_be_measured_is_logged_and_stops_nothing(job: RecordedJob, wrap: Callable[[Any], Any]) -> None:
    assert not state.floor_settled(job.sweep)
    why = "photos/a/03.png: storage refuses access (403)"
    evaluate.measure_floor(job, Failing(wrap(StorageError(why))))  # type: ignore[arg-type]
    assert state.floor_settled(job.sweep)
    assert state.floor_skipped(job.sweep) == why
    assert job.said == [f"floor: not measured: {why}"]


def test_a_floor_is_measured_once_storage_is_back(job: RecordedJob) -> None:
    """The sweep's own, away for two minutes: it would end as done without one."""
    errors: list[Exception] = [StorageAway("503"), StorageAway("503")]

    def floor() -> None:
        if errors:
            raise errors.pop()

    evaluate.measure_floor(job, SimpleNamespace(floor=floor))  # type: ignore[arg-type]
    assert (errors, job.said) == ([], ["storage does not answer, asked again for an hour: 503"])


@pytest.mark.parametrize("error", [e for e in OTHERS if not isinstance(e, StorageAway)], ids=str)
def test_a_failure_that_is_not_the_floors_is_raised(job: RecordedJob, error: DisScaleError) -> None:
    with pytest.raises(type(error)):
        evaluate.measure_floor(job, Failing(error))  # type: ignore[arg-type]


def test_an_evaluation_without_news_ends_with_a_clear_error(tmp_path: Path) -> None:
    recipe = reading.load(TINY, ["evaluate.floor=false"])
    opened: list[int] = []
    still: Any = SimpleNamespace(move=lambda: False)

    def open_still(_: object, __: str, gpus: int) -> Any:
        opened.append(gpus)
        return still, still

    job = job_of(recipe, tmp_path)
    with pytest.raises(DisScaleError, match="nothing was published or saved for 24 h: is training running"):
        PublishedEvaluation(job, "cpu", open_still).run()
    assert opened == [0], "it is not restarted"
    assert 24 * 3600 < job.now_s() < 25 * 3600


def test_a_wait_for_training_shows_that_it_lives(job: RecordedJob) -> None:
    """Training may use all GPUs for days: status would say that evaluation hangs, and its check would page somebody."""
    logged = list[str]()
    job.log = Log(Context(), logged.append, job.now_s)
    job.progress(0, 90, "images")
    evaluate.wait_for_training(job, lambda: job.now_s() > 6 * 3600)
    progress = [line.facts["done"] for line in map(parse, logged) if line and line.kind == "progress"]
    assert progress == [0] * len(progress)
    assert 15 < len(progress) < 40


def test_a_wait_of_a_day_asks_storage_rarely(job: RecordedJob) -> None:
    """Each poll costs several requests."""
    evaluate.wait_for_training(job, lambda: job.now_s() > 86_400)
    polls_s = [0.0, *accumulate(job.pauses)]
    assert len(polls_s) < 3000
    assert all(later - poll < 1.001 * max(2, poll / 20) for poll, later in pairwise(polls_s))
