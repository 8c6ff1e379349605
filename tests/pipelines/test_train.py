"""World sizes: the largest of the recipe that has capacity. Ranks: ordered by node and GPU. The copy of rows in MLflow."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import ray

from dis_scale.process.errors import OutOfMemory, WrongKernel
from dis_scale.recipe import Recipe, reading
from dis_scale.sweep import state
from dis_scale.sweep.documents import TrackingIds
from dis_scale.tracking.mlflow import RunCopy
from dis_scale.tracking.rows import RowReader, RowWriter
from dis_scale.training.memory import PassPlan
from pipelines import nodes
from pipelines.failures import WorkerFailure
from pipelines.nodes import Node
from pipelines.ranks import Place, RankPlaces, largest_fitting, rank_order
from pipelines.restarts import with_restarts
from pipelines.train import Ranks, RowCopies, TrainingRun, group_waits_s
from pipelines.waiting import capacity
from pipelines.watching import Pace, Watch
from tests.conftest import TINY
from tests.support.stage_jobs import RecordedJob, job_of


def test_an_attempt_uses_as_many_workers_as_fit() -> None:
    sizes = reading.load(TINY, ["train.lanes=8", "train.workers=2..6"]).train.world_sizes
    assert sizes == [6, 5, 4, 3, 2]
    bundle = {"CPU": 1, "train": 1.0}
    fitting = [largest_fitting(sizes, capacity(bundle, [{"CPU": cpus, "train": 8}])) for cpus in (9, 5, 3, 1)]
    assert fitting == [6, 5, 3, 0]
    assert capacity(bundle, [{"CPU": 8.0}]) == 0


def test_one_workers_resources_are_on_one_node() -> None:
    bundle = {"CPU": 2, "train": 1.0}
    assert capacity(bundle, [{"CPU": 3, "train": 2}, {"CPU": 1, "train": 1}, {"CPU": 4, "train": 1}]) == 2


def test_ranks_are_in_the_order_of_nodes_and_gpus() -> None:
    places = [
        Place("10.0.0.2", "b", ["0"], 1, ""), Place("10.0.0.1", "c", ["1"], 2, ""), Place("10.0.0.1", "c", ["0"], 9, ""),
        Place("10.0.0.1", "a", ["3"], 4, ""),
    ]  # fmt: skip
    assert rank_order(places) == [3, 2, 1, 0]
    assert [places[::-1][n] for n in rank_order(places[::-1])] == [places[n] for n in rank_order(places)]


def test_a_node_that_starts_no_process_is_left_after_two_attempts(tiny: Recipe, tmp_path: Path) -> None:
    """It would be chosen each time and end a healthy model; but for a hang of all, or where no other node is, nobody is blamed."""
    job, names = job_of(tiny, tmp_path), {"1": "a", "2": "b", "3": "c"}
    run = TrainingRun(job, "dit", PlacesOf(job, "dit", "cuda", able={"1", "2"}))
    for worker in (1, None, 2, 1):  # the node of the third is gone
        run._blame_start(WorkerFailure("a worker was lost", worker=worker), ["1", "2", "3"], names)
    assert state.excluded_nodes(job.sweep) == ["b"]
    assert state.node_failures(job.sweep) == {"b": 2}
    alone = TrainingRun(job, "dit", PlacesOf(job, "dit", "cuda", able={"1"}))
    alone._blame_start(WorkerFailure("a worker was lost", worker=0), ["1"], names)
    assert "a" not in state.node_failures(job.sweep)


@dataclass
class PlacesOf(RankPlaces):
    """Places on these nodes, each of which holds all workers."""

    able: set[str] = field(default_factory=set)
    living: Callable[[], list[Node]] = lambda: [Node("1", "a", {}), Node("2", "b", {})]

    def fits_without(self, avoided: Collection[str]) -> bool:
        return bool(self.able - {*avoided})


class OnePlace(RankPlaces):
    """A place without Ray: on each of three nodes in turn that is not avoided."""

    every = ("a", "b", "c")

    def choose(self) -> tuple[int, Any, set[str]]:
        return 1, next(node for node in self.every if node not in self.wrong), {*self.wrong}

    def fits_without(self, avoided: Collection[str]) -> bool:
        return not set(self.every) <= set(avoided)

    def free(self, group: Any) -> None: ...

    def shared(self) -> float:
        return 0.0


class OneRank(TrainingRun):
    """Attempts of one rank, or of two on one node, without Ray; `right` are the nodes whose kernels are right."""

    right = frozenset[str]()
    ranks = 1

    def _start(self, group: Any, world: int) -> Ranks:
        return Ranks([None] * self.ranks, [Place("ip", group, [], 1, "")] * self.ranks)

    def _check(self, ranks: Ranks) -> None: ...

    def _train(self, ranks: Ranks, *_: object) -> int:
        if ranks.places[0].node not in self.right:
            raise ray.exceptions.RayTaskError("train", "", WrongKernel("wrong by 0.1")).as_instanceof_cause()
        return self.settings.images


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("right", "failed"), [("c", ["a", "b"]), ("a", []), ("", ["a", "b"])])
def test_a_kernel_that_is_wrong_on_one_node_alone_is_tried_on_others(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, failed: list[str], ranks: int
) -> None:
    """One wrong GPU, or machine, would end model after model. Only if it is wrong on all nodes it is a mistake."""
    monkeypatch.setattr(nodes, "name_of", str)
    job = job_of(tiny, tmp_path)
    run = OneRank(job, "dit", OnePlace(job, "dit", "cuda"))
    run.right, run.ranks = frozenset(right), ranks
    with contextlib.nullcontext() if right else pytest.raises(WrongKernel):
        assert with_restarts(job, "dit", run.attempts, lambda: 0) == tiny.train.images
    assert sorted(state.node_failures(job.sweep)) == failed


class Connecting(TrainingRun):
    """Attempts without Ray that begin with a check of the connections."""

    def _start(self, group: Any, world: int) -> Ranks:
        return Ranks([], [Place("ip", group, [], 1, "")])


@pytest.mark.parametrize(("silent_s", "done"), [(3.0, 0), (10**6, 1)])
def test_a_connection_that_fails_in_the_check_has_passed_no_step(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_s: float, done: int
) -> None:
    """All devices were right, which counts as progress; but a network that is away for minutes is no crash at the same place."""

    def fails(*_: object, **__: object) -> None:
        raise WorkerFailure("no route", 1, silent_s, cause="connection")

    monkeypatch.setattr("pipelines.train.watch", fails)
    job = job_of(tiny, tmp_path)
    with pytest.raises(WorkerFailure) as error:
        Connecting(job, "dit", OnePlace(job, "dit", "cuda")).attempts(None)
    assert error.value.done == done


@dataclass
class RoomOn(RankPlaces):
    """Places without Ray for two workers: `room` are the nodes with a free place for one."""

    room: str = ""
    living: Callable[[], list[Node]] = lambda: [Node(name, name.upper(), {}) for name in "abc"]

    def _free(self, avoided: Collection[str]) -> int:
        return len({*self.room} - {*avoided})

    def _possible(self, avoided: Collection[str]) -> int:
        return len({*"abc"} - {*avoided})

    def _world_size(self, avoided: Collection[str]) -> int:
        return 2


@pytest.mark.parametrize(("room", "left_out"), [("abc", {"b"}), ("ab", set()), ("ac", {"b"})])
def test_a_node_is_left_out_only_if_the_others_have_places_now(tiny: Recipe, tmp_path: Path, room: str, left_out: set[str]) -> None:
    """Another model's may have them for weeks, and the node would wait."""
    job = job_of(tiny, tmp_path)
    job.left_out = frozenset({"B"})
    places = RoomOn(job, "dit", "cuda", room=room)
    assert places.left_out(set(), places.living()) == left_out
    assert places.left_out({"a"}, places.living()) == set(), "not enough in all"


@pytest.mark.parametrize(("room", "outdated"), [("abc", False), ("b", False), ("bc", True), ("ac", False)])
def test_a_wait_ends_if_only_a_node_that_is_left_out_has_places(tiny: Recipe, tmp_path: Path, room: str, outdated: bool) -> None:
    places = RoomOn(job_of(tiny, tmp_path), "dit", "cuda", room=room)
    assert places.outdated(2, {"b"}, places.living(), {"b"}) == outdated


def test_the_node_of_a_process_that_died_is_known(tiny: Recipe, tmp_path: Path) -> None:
    class Dying(OneRank):
        def _train(self, ranks: Ranks, *_: object) -> int:
            raise WorkerFailure("killed", worker=0)

    job = job_of(tiny, tmp_path)
    places = OnePlace(job, "dit", "cuda", living=lambda: [Node("a", "machine-a", {})])
    with pytest.raises(WorkerFailure) as error:
        Dying(job, "dit", places).attempts(None)
    assert error.value.node == "machine-a"


@dataclass
class GivenWorlds(RankPlaces):
    """Places without Ray, for the next number of workers each time."""

    worlds: Iterator[int] = field(default_factory=lambda: iter(()))

    def choose(self) -> tuple[int, Any, set[str]]:
        return next(self.worlds), None, set()

    def free(self, group: Any) -> None: ...


@dataclass
class ShortOfMemory(TrainingRun):
    """Attempts without Ray; `fits` are the numbers of workers whose planned passes fit in memory."""

    fits: Collection[int] = ()
    fit_after: int = 1
    """How often passes have to be smaller."""
    tried: list[tuple[int, int]] = field(default_factory=list)

    def _start(self, group: Any, world: int) -> Ranks:
        return Ranks([None] * world, [Place("ip", "a", [], 1, "")] * world)

    def _check(self, ranks: Ranks) -> None: ...

    def _train(self, ranks: Ranks, *_: object) -> int:
        world = len(ranks.workers)
        self.tried.append((world, self._short(world)))
        if world not in self.fits and self.tried[-1][1] < self.fit_after:
            raise OutOfMemory("CUDA out of memory", done=48, silent_s=2.5)
        return 0 if len(self.tried) < 5 else self.settings.images


def test_passes_are_smaller_after_memory_was_short_until_more_workers_train(tiny: Recipe, tmp_path: Path) -> None:
    """More of them hold smaller parts of the states and have fewer lanes each."""
    job = job_of(tiny, tmp_path)
    run = ShortOfMemory(job, "dit", GivenWorlds(job, "dit", "cuda", worlds=iter([8, 8, 32, 4, 8])), fits={32})
    assert with_restarts(job, "dit", run.attempts, lambda: 0) == tiny.train.images
    assert run.tried == [(8, 0), (8, 1), (32, 0), (4, 1), (8, 1)]
    assert [event["done"] for event in job.events_named("restart")] == [48], "what was trained counts"


def test_memory_that_is_short_ends_the_model_once_passes_have_one_lane(tmp_path: Path) -> None:
    """Of 16 lanes on two workers, a pass has 8 without kept states, and then 1: within the restarts that recipes allow."""
    job = job_of(reading.load(TINY, ["train.lanes=16", "train.batch_images=16", "train.workers=2"]), tmp_path)
    tried = [PassPlan(1, keeps_states=True).smaller(8, times) for times in (1, 2)]
    assert tried == [PassPlan(passes, keeps_states=False) for passes in (1, 8)]
    run = ShortOfMemory(job, "dit", GivenWorlds(job, "dit", "cuda", worlds=iter([2] * 9)), fit_after=99)
    with pytest.raises(OutOfMemory):
        with_restarts(job, "dit", run.attempts, lambda: 0)
    assert run.tried == [(2, 0), (2, 1), (2, 2)]


class FreePlaces(RankPlaces):
    """Places without Ray, of which so many are free."""

    count = 0

    def _free(self, avoided: Collection[str]) -> int:
        return self.count


def test_a_group_that_waits_is_chosen_again_when_the_nodes_change_while_some_are_avoided(tiny: Recipe, tmp_path: Path) -> None:
    """Those whose devices failed are used again once the others are gone."""
    before, now = [Node("a", "a", {}), Node("b", "b", {})], [Node("a", "a", {})]
    places = FreePlaces(job_of(tiny, tmp_path), "dit", "cuda", living=lambda: now)
    assert places.outdated(2, {"a"}, before)
    assert not places.outdated(2, {"a"}, now)
    assert not places.outdated(2, set(), before)
    ranges = replace(places, job=job_of(reading.load(TINY, ["train.workers=1..2"]), tmp_path))
    ranges.count = 1
    assert ranges.outdated(2, set(), now), "one worker fits, and two were waited for"


@pytest.mark.parametrize("hang_after_s", [1.0, 900.0, 86_400.0])
def test_a_hang_is_logged_before_a_collective_fails(hang_after_s: float) -> None:
    """Also before the first step, which may take longer: NCCL ends the process of a rank whose collective fails."""
    settings = reading.load(TINY, [f"train.hang_after_s={hang_after_s}"]).train
    policy = Watch(hang_after_s=settings.hang_after_s)
    noticed_s = group_waits_s(settings) - 2 * policy.answer_s - policy.poll_every_s - 60
    for done in (0, 16):
        pace = Pace(1, policy)
        assert pace.note([0], {0}, (), 0.0) == pace.note([done], {0}, (), 0.0) == []
        assert pace.note([done], {0}, (), noticed_s) == [0]


@pytest.mark.parametrize(("tracked", "uri", "away"), [(False, "", 0.0), (True, "", 1.0), (False, "http://mlflow:5000", 1.0)])
def test_mlflow_is_away_for_a_sweep_that_has_runs_there_or_asks_for_them(
    tmp_path: Path, tracked: bool, uri: str, away: float
) -> None:
    """A server that refused it at its begin, since another user has a sweep of its name, would never be heard of again."""
    job = job_of(reading.load(TINY, [f"tracking.uri={uri}"] if uri else []), tmp_path)
    if tracked:
        ids = TrackingIds(uri=f"sqlite:///{tmp_path}/gone.db", experiment="1", sweep="s", models={"dis": "d"})
        ids.write(job.sweep.folder)
    rows = RowWriter(job.sweep.run("dis").log, 1)
    rows.add(16, {"loss": 1.0})
    rows.settle()
    with RowCopies(job, RunCopy(job.sweep, "dis")).running():
        pass
    assert dict(job.gauges)["mlflow_away"] == away
    assert ["its last rows are in storage and not in MLflow: MLflow is away" in line for line in job.said] == [True] * bool(away)


def test_an_mlflow_that_hangs_is_asked_once_in_a_turn_and_the_gauges_are_of_the_newest_row(tmp_path: Path, tiny: Recipe) -> None:
    """A new driver reads a file of each of 200 attempts: 35 s for each would be two hours without a gauge, and false alerts."""
    job, asked = job_of(tiny, tmp_path), list[int]()

    class Hanging(RunCopy):
        def _try(self, _: Any) -> bool:
            asked.append(len(self._waiting))
            return False

    copies = RowCopies(job, Hanging(job.sweep, "dis"))
    for attempt in range(1, 4):
        rows = RowWriter(job.sweep.run("dis").log, attempt)
        rows.add(16 * attempt, {"loss": 1.0})
        rows.close()
    reader = RowReader(job.sweep.run("dis").log)
    copies._send(reader, 0.0)
    assert (asked, dict(job.gauges)["images_seen"]) == ([1], 48)
    copies._send(reader, 0.0)
    assert asked == [1, 3], "all wait for the next turn"


def test_a_finished_model_does_not_fail_by_the_copy_of_its_rows(
    tmp_path: Path, tiny: Recipe, no_pauses: None, inject: Callable[[str], None]
) -> None:
    """Storage is away when the last rows are copied; the error of training, if any, is the one that is raised."""
    job = job_of(tiny, tmp_path)
    inject("fail at list times=1000")
    copies = RowCopies(job, RunCopy(job.sweep, "dis"))
    with copies.running():
        pass
    assert job.said[-1].startswith("dis: its last rows are in storage and not in MLflow: cannot list ")
    with pytest.raises(ValueError, match="a mistake"), copies.running():
        raise ValueError("a mistake")


def test_a_copy_that_hangs_at_the_end_is_named(tmp_path: Path, tiny: Recipe) -> None:
    begun, over = Event(), Event()

    class HangingJob(RecordedJob):
        def gauge(self, name: str, value: float) -> None:
            begun.set()
            over.wait(60)

    job = HangingJob(job_of(tiny, tmp_path).sweep)
    with RowCopies(job, RunCopy(job.sweep, "dis"), every_s=0.0, last_s=0.1).running():
        begun.wait(60)
    over.set()
    assert job.said[-1].endswith(f"no answer for 0.1 s; to copy them: dis-scale mlflow sync {job.sweep}")
