"""Workers that share numbers on Ray: one without capacity holds up nothing, the others take its numbers."""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import ray

from dis_scale.data.staging import MixedOrder
from dis_scale.process.errors import BrokenDevice, NotFinite, StorageAway, WrongKernel
from dis_scale.recipe import LatentShape, Precompute, Recipe
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sampled, state
from dis_scale.tracking import attempt_logs
from pipelines import nodes, prepare, stage
from pipelines.evaluators import NotOpened, RayEvaluators
from pipelines.failures import WorkerFailure
from pipelines.logs import JobLogs
from pipelines.precompute import mixing_request
from pipelines.sharing import SHARED, Deal, capacity, share
from pipelines.stage import StageJob
from pipelines.watching import Watch, watch
from pipelines.worker import Worker, request_for, spawn
from tests.support.judged import Judged
from tests.support.stage_jobs import RayJob, job_of
from tests.support.waiting import wait_until

POLICY = replace(SHARED, answer_s=2.0)
"""A worker without a process delays each poll by the time for an answer."""


HANGS, BROKEN = 10**6, 10**6 + 1
"""Numbers at which a worker makes no more progress, and at which its device fails."""


class Taker(Worker):
    """Takes numbers and writes a file for each; its process dies at a number below 0. It is slow to begin its log."""

    def observe(self, folder: Folder, name: attempt_logs.LogName) -> None:
        time.sleep(0.5)
        super().observe(folder, name)

    def take(self, made: Path, deal: Deal) -> None:
        for number in iter(deal, None):
            if number == HANGS:
                time.sleep(1e6)
            if number == BROKEN:
                (made / "failed").touch()
                raise BrokenDevice("uncorrectable ECC error")
            if number < 0:
                time.sleep(1.5 * POLICY.poll_every_s)  # so that the driver has seen what was done before
                os._exit(1)
            time.sleep(0.05)
            (made / str(number)).touch()
            self.report(self._done + 1)


class Away(Worker):
    """Prepares from a storage that is away."""

    def __init__(self, _: object) -> None:
        super().__init__()

    def prepare(self, *_: object) -> None:
        raise StorageAway("cannot read recipe.json: 503")


class Joining(Worker):
    """Ends its own part of work that no worker ends alone, or hangs before."""

    def join(self, hangs: bool) -> None:
        if not hangs:
            self.report(1)
        time.sleep(1e6)


class Stopped(Worker):
    """Waits for requests to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[float] = []

    def stop(self, left_s: float = math.inf) -> None:
        self.requests.append(left_s)

    def wait_for(self, count: int) -> list[float]:
        while len(self.requests) < count:
            time.sleep(0.05)
        time.sleep(1.0)
        return self.requests


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A Ray of this process with two CPUs, of which precompute declares one."""
    with pytest.MonkeyPatch.context() as patch, stage.keeping_handlers():
        patch.setenv("RAY_AUTH_MODE", "disabled")  # by default a Ray in this process leaves another mode behind
        ray.init(
            "local", num_cpus=2, resources={"precompute": 1}, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR",
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture
def job(tiny: Recipe) -> StageJob:
    return job_of(tiny)


def takers(job: StageJob, count: int, name: str = "precompute") -> list[Any]:
    return [spawn(job, Taker, request_for(name, "cpu", 1)) for _ in range(count)]


def started(workers: list[Any]) -> list[Any]:
    """Wait for the workers' processes: one without is killed when all others have ended, however soon it would have begun."""
    ray.get([worker.poll.remote() for worker in workers])
    return workers


def test_capacity_is_that_of_the_declared_resource() -> None:
    request = request_for("precompute", "cpu", 1)
    assert request.named() == {"precompute": 1}
    assert capacity(request) == 1
    assert capacity(request_for("prepare", "cpu", 1)) == 2
    assert capacity(request_for("prepare", "cuda", 1)) == 1, "an absent GPU is waited for"
    mixing = mixing_request(MixedOrder(1000, Precompute(), LatentShape(4, 8)))
    assert mixing.named() == {"precompute": 0.001}
    assert capacity(mixing) == 2, "as many as CPUs, on the nodes that encode"


def test_a_worker_without_capacity_holds_up_nothing(job: StageJob, tmp_path: Path) -> None:
    """Its numbers are taken by the other, which alone is returned and can be used again."""
    progress: list[list[int]] = []
    workers = takers(job, 2)
    placed, results, failure = share(job, workers, "take", (tmp_path,), list(range(20)), progress.append, POLICY)
    assert (len(placed), results, failure) == (1, [None], None)
    assert sorted(progress[-1]) == [0, 20]
    del workers
    assert share(job, placed, "take", (tmp_path,), list(range(3)), progress.append, POLICY).workers == placed
    assert progress[-1] == [23]


def test_more_workers_than_the_nodes_hold_do_not_count_as_waiting_beside_others(tiny: Recipe, tmp_path: Path) -> None:
    """They join when a node does; until then nothing waits."""
    job = job_of(tiny)
    policy = replace(POLICY, logged_after_s=1.0)
    placed = share(job, takers(job, 1), "take", (tmp_path,), [1]).workers
    more = takers(job, 3)
    assert share(job, [*placed, *more], "take", (tmp_path,), list(range(80)), policy=policy).workers == placed
    assert [text for text in job.said if "waiting for capacity" in text] == []
    assert {value for name, value in job.gauges if name == "waiting_workers"} <= {0, 1}


def test_failures_of_all_that_work_are_raised_though_more_have_no_capacity(tiny: Recipe, tmp_path: Path) -> None:
    """Those that failed live on and hold what the others wait for: only another attempt frees it."""
    job = job_of(tiny, tmp_path / "store")
    (made := tmp_path / "made").mkdir()
    _, _, failure = share(job, takers(job, 3), "take", (made,), [BROKEN], policy=POLICY)
    assert "uncorrectable ECC error" in str(failure)
    assert time.time() - (made / "failed").stat().st_mtime < 30, "after the failure, whenever its process has started"
    assert sum(state.node_failures(job.sweep).values()) == 1


def test_a_device_that_fails_counts_against_its_node_whatever_the_work(tiny: Recipe, tmp_path: Path) -> None:
    job = job_of(tiny, tmp_path / "store")
    job.context.stage = "precompute"
    _, _, failure = share(job, takers(job, 1), "take", (tmp_path,), [1, BROKEN], policy=POLICY)
    assert "uncorrectable ECC error" in str(failure)
    (node,) = nodes.living()
    assert state.node_failures(job.sweep) == {node.name: 1}
    assert job.sweep.all_failed_nodes.list() == ["precompute"]


def test_a_preparation_whose_storage_was_away_gives_its_place_back(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node declares one: the next attempt would wait for it without end, and without an alert."""
    monkeypatch.setattr(prepare, "Preparer", Away)
    with pytest.raises(WorkerFailure, match="503") as kept:
        prepare._prepare_with_one(job_of(tiny, tmp_path), "cpu", request_for("precompute", "cpu", 1), cast(Any, None))
    wait_until(lambda: ray.available_resources().get("precompute") == 1)
    assert kept.tb, "which has the frames of that attempt"


def test_one_process_deals_for_all_work_and_is_replaced_if_it_dies(job: StageJob, tmp_path: Path) -> None:
    workers = takers(job, 1)
    others = dealing()
    for numbers in (3, 5):
        dealers = dealing()
        assert share(job, workers, "take", (tmp_path,), list(range(numbers)), lambda _: None, POLICY).failure is None
    (dealer,) = [each for each in dealers if each not in others]
    assert [each for each in dealing() if each not in others] == [dealer], "the second deal began no process"
    dealer.kill()
    dealer.wait(10)
    assert share(job, workers, "take", (tmp_path,), [7, 8], lambda _: None, POLICY).failure is None
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2", "3", "4", "7", "8"}


def dealing() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if each.name().startswith("ray::Dealer")]


def test_a_lost_worker_is_reported_soon_and_can_be_replaced(job: StageJob, tmp_path: Path) -> None:
    """The other ends what it has begun, and gets no more numbers until the caller has another beside it."""
    progress: list[list[int]] = []
    workers = started(takers(job, 2, "prepare"))
    living, _, failure = share(job, workers, "take", (tmp_path,), [*range(60), -1, *range(60, 1000)], progress.append, POLICY)
    assert isinstance(failure, WorkerFailure)
    assert "a worker was lost" in str(failure)
    done = {int(path.name) for path in tmp_path.iterdir()}
    assert set(range(60)) <= done
    assert len(done) < 1000
    sums = [sum(each) for each in progress]
    assert sums == sorted(sums)
    assert len(living) == 1
    assert living[0] in workers
    left = [number for number in range(1000) if number not in done][:20]
    both = [*living, *takers(job, 1, "prepare")]
    assert share(job, both, "take", (tmp_path,), left, progress.append, POLICY).failure is None
    assert done | set(left) == {int(path.name) for path in tmp_path.iterdir()}


def test_a_worker_that_hangs_is_killed_and_the_others_go_on(job: StageJob, tmp_path: Path) -> None:
    workers = started(takers(job, 2, "prepare"))
    numbers = [*range(20), HANGS, *range(20, 200)]
    living, _, failure = share(job, workers, "take", (tmp_path,), numbers, policy=replace(POLICY, hang_after_s=10.0))
    assert "a worker was lost" in str(failure)
    assert len(living) == 1
    left = [number for number in range(200) if not (tmp_path / str(number)).exists()]
    assert share(job, living, "take", (tmp_path,), left).failure is None
    assert len(list(tmp_path.iterdir())) == 200


@pytest.mark.parametrize("hanging", [[1], [0, 1], []], ids=["one", "all", "none, but together"])
def test_a_hang_of_all_counts_against_the_node_for_which_the_others_wait(tiny: Recipe, tmp_path: Path, hanging: list[int]) -> None:
    job = job_of(tiny, tmp_path)
    workers = [spawn(job, Joining, request_for("prepare", "cpu", 1)) for _ in range(2)]
    calls = [worker.join.remote(number in hanging) for number, worker in enumerate(workers)]
    expected = [int(number not in hanging) for number in range(2)]
    while [done for done, _ in ray.get([worker.poll.remote() for worker in workers])] != expected:
        time.sleep(0.1)  # a process may take longer to start than the hang below
    with pytest.raises(WorkerFailure, match=r"hanging(; all others wait for the workers of node .*)?$") as raised:
        watch(job, workers, calls, policy=Watch(hang_after_s=3.0, blame_behind=True, poll_every_s=0.2, answer_s=2.0))
    alone = hanging == [1]
    assert (raised.value.cause, raised.value.worker) == (("device", 1) if alone else ("lost", None))
    assert list(state.node_failures(job.sweep).values()) == [1] * alone


def test_a_drained_node_shortens_the_time_of_workers_that_stop_to_grow(job: StageJob) -> None:
    """The notice of a node counts down, and is not sent again for that; a second node's is, if it goes earlier."""
    early = iter([None, math.inf, math.inf, *[60.0 - 0.2 * poll for poll in range(10)]])

    def left_s() -> float | None:
        return next(early, 27.0)

    worker = spawn(job, Stopped, request_for("prepare", "cpu", 1))
    policy = Watch(stop_early=left_s, poll_every_s=0.2, answer_s=2.0)
    (requests,) = watch(job, [worker], [worker.wait_for.remote(3)], policy=policy)
    first, *later = sorted(requests, reverse=True)  # a worker that starts takes them in any order
    assert first == math.inf
    assert later == [pytest.approx(60, abs=5), pytest.approx(27, abs=5)]


def test_a_lost_worker_is_reported_though_another_has_no_capacity(job: StageJob, tmp_path: Path) -> None:
    """Two have capacity on two CPUs; the third may get that of the lost one, or none."""
    workers = takers(job, 3, "prepare")
    _, _, failure = share(job, workers, "take", (tmp_path,), [*range(20), -1], lambda _: None, POLICY)
    assert "a worker was lost" in str(failure)
    assert len(list(tmp_path.iterdir())) == 20


def test_all_workers_that_are_watched_keep_their_logs(tiny: Recipe, tmp_path: Path) -> None:
    """No stage has to think of it. Their stacks are in them: a driver's stored log has room for those of a few."""
    job = job_of(tiny)
    job.logs = JobLogs(open_folder(tmp_path / "logs"), job.context)
    workers = takers(job, 2, "prepare")
    watch(job, workers, [worker.stacks.remote() for worker in workers], policy=Watch(keep_logs=False))
    assert attempt_logs.listed(open_folder(tmp_path / "logs")) == []
    watch(job, workers, [worker.log_stacks.remote() for worker in workers])
    job.logs.collect(workers)
    kept = attempt_logs.listed(open_folder(tmp_path / "logs"))
    assert [name.process for name in kept] == ["0000", "0001"]
    for text in attempt_logs.read_attempt(open_folder(tmp_path / "logs"), kept[0].begun).values():
        assert "stacks of this worker:" in text
        assert "in log_stacks" in text


@pytest.fixture
def judged(tiny: Recipe, tmp_path: Path) -> Callable[..., RayEvaluators]:
    """Evaluators of a tiny sweep, each with its verdict."""

    def evaluators(*right: bool | None, wrong: Exception = WrongKernel("the scan is wrong")) -> RayEvaluators:
        job = job_of(tiny, tmp_path, RayJob)
        workers = [spawn(job, Judged, request_for("evaluate", "cpu", 0), each, wrong) for each in right]
        return RayEvaluators(job, "cpu", 0, lambda _: None, {(None, None, n): worker for n, worker in enumerate(workers)})

    return evaluators


def test_a_kernel_that_is_wrong_on_one_device_counts_against_its_node(judged: Callable[..., RayEvaluators]) -> None:
    """The next attempt continues with the evaluators whose devices passed."""
    evaluators = judged(True, False, True)
    sampled = Sampled(next(iter(evaluators.job.recipe.models)), 0)
    with pytest.raises(WorkerFailure, match="this device fails where those of 2 other evaluators do not: the scan is wrong"):
        evaluators.sample(sampled, evaluators.job.recipe.evaluate, list(range(400)))
    assert list(state.node_failures(evaluators.job.sweep).values()) == [1]
    assert evaluators.sample(sampled, evaluators.job.recipe.evaluate, list(range(4))) == [1, 1]  # type: ignore[comparison-overlap]


def test_a_file_that_one_node_lacks_counts_against_it(judged: Callable[..., RayEvaluators]) -> None:
    """Such as a machine without /models that replaced another: the evaluation of weeks would end with a user's mistake."""
    evaluators = judged(True, False, True, wrong=NotOpened("no decoder at /models/vae"))
    with pytest.raises(WorkerFailure, match="this node fails where those of 2 other evaluators do not: no decoder at /models/vae"):
        evaluators.floor(list(range(400)))
    assert list(state.node_failures(evaluators.job.sweep).values()) == [1]
    with pytest.raises(NotOpened):
        judged(False, False, wrong=NotOpened("no decoder at /models/vae")).floor([0, 1])


def test_samples_that_are_not_finite_on_one_device_count_against_its_node(judged: Callable[..., RayEvaluators]) -> None:
    """Each checkpoint would be skipped as one that had diverged. All make the block again that was not finite."""
    wrong = NotFinite("samples that are not finite: 3, the first number 4")
    wrong.block = 7
    evaluators, sampled = judged(True, False, wrong=wrong), Sampled("dis", 0)
    with pytest.raises(WorkerFailure, match="this device fails where those of 1 other evaluators do not: samples that are not fin"):
        evaluators.sample(sampled, evaluators.job.recipe.evaluate, list(range(400)))
    assert list(state.node_failures(evaluators.job.sweep).values()) == [1]
    with pytest.raises(NotFinite):
        judged(False, False, wrong=wrong).sample(sampled, evaluators.job.recipe.evaluate, [0, 1])


def test_a_kernel_that_is_wrong_on_all_devices_is_the_programs(judged: Callable[..., RayEvaluators]) -> None:
    evaluators = judged(False, False)
    with pytest.raises(WrongKernel):
        evaluators.sample(Sampled("dis", 0), evaluators.job.recipe.evaluate, [0, 1])
    assert state.node_failures(evaluators.job.sweep) == {}


def test_an_evaluator_that_is_lost_while_devices_are_compared_is_an_attempt(judged: Callable[..., RayEvaluators]) -> None:
    evaluators = judged(False, None)
    with pytest.raises(WorkerFailure, match="a worker was lost"):
        evaluators.sample(Sampled("dis", 0), evaluators.job.recipe.evaluate, [0, 1])
    assert state.node_failures(evaluators.job.sweep) == {}


def test_a_worker_that_is_lost_tells_on_which_nodes_it_was(job: StageJob, tmp_path: Path) -> None:
    """They distinguish a crash that follows the work to other nodes from a bad node."""
    workers = takers(job, 2, "prepare")
    assert share(job, workers, "take", (tmp_path,), [*range(20), -1], lambda _: None, POLICY).failure
    assert list(job.placed) == [nodes.living()[0].name]
