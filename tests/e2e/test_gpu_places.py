"""Where workers run, and what those that wait say, on a cluster with declared GPUs: a head without one and a node with two.

Nothing computes on them.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dis_scale.data import shards
from dis_scale.data.sources import open_source
from dis_scale.process.errors import Preempted, WrongKernel
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import Ended
from pipelines import needs, ranks
from pipelines.evaluate import PublishedEvaluation
from pipelines.evaluators import RayEvaluators, Seat
from pipelines.failures import WorkerFailure
from pipelines.nodes import choose_device, living, name_of, only, record_failure
from pipelines.places import Places
from pipelines.precompute import Encoder, RayEncoders
from pipelines.ray_private import actor_id, node_of
from pipelines.watching import Watch, watch
from pipelines.worker import Request, elsewhere, request_for, spawn
from tests.conftest import TINY
from tests.support.documents import put_metrics, put_published
from tests.support.drivers import cluster, driver_of, logged
from tests.support.judged import Judged
from tests.support.labelled_images import png, tar
from tests.support.probe import Probe
from tests.support.small_latents import make
from tests.support.stage_jobs import RayJob, RecordedJob, deal_of, job_of
from tests.support.stages import ONE_MODEL
from tests.support.waiting import wait_until

GPUS = 2


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        head = {"num_cpus": 2, "num_gpus": 0, "resources": {"prepare": 1, "train": 2}, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=2, num_gpus=GPUS, resources={"train": 2, "evaluate": 2}, node_name="gpus")
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def node(nodes: Cluster) -> str:
    """The id of the node with GPUs."""
    return str(next(iter(nodes.worker_nodes)).node_id)


def recipe_of(*settings: str) -> Recipe:
    return reading.load(TINY, ["device=cuda", *settings])


def test_an_evaluator_without_a_gpu_shares_those_of_the_node_that_has_some(node: str) -> None:
    recipe = recipe_of("evaluate.workers=4", "evaluate.gpu_share=0.2", "train.workers=2", f"models={ONE_MODEL}")
    asked = Places.now(recipe).evaluators("cuda", 0)
    assert Places.now(recipe).shared == 0.2
    assert [shared for shared, _ in asked] == [1, 0], "one on each"
    assert [shared for shared, _ in Places.now(recipe).evaluators("cuda", 1)] == [None], "it could be on either"
    job = job_of(recipe)
    probes = [spawn(job, Probe, request) for _, request in asked]
    places = ray.get([probe.where.remote() for probe in probes])
    assert {place for place, _ in places} == {node}
    assert [len(gpus) for _, gpus in places] == [0, 0]
    assert ray.get(probes[1].visible.remote()) is None, "all devices stay visible"


def test_gpus_count_for_training_once_its_nodes_are_there(node: str, tmp_path: Path) -> None:
    """Of the nodes of other stages alone, whose GPUs are smaller, training would seem not to fit, which ends a sweep for good."""
    found = [needs.holds(driver_of(recipe_of(f"train.workers={n}"), tmp_path), cluster("here"), "train") for n in (2, 4)]
    assert found == [True, False]


def test_without_a_share_there_are_only_evaluators_with_a_gpu_of_their_own(node: str) -> None:
    recipe = recipe_of("evaluate.workers=4", "train.workers=1", f"models={ONE_MODEL}")
    places = Places.now(recipe)
    assert places.spare_gpus(len(recipe.models)) == 1
    assert [shared for shared, _ in places.evaluators("cuda", 1)] == [None]


def test_evaluators_that_share_are_spread_again_after_a_loss_and_wait_while_no_gpu_is_there(node: str, tmp_path: Path) -> None:
    recipe = recipe_of("evaluate.workers=4", "evaluate.gpu_share=0.2", "train.workers=2", f"models={ONE_MODEL}")
    job = job_of(recipe, tmp_path, RayJob)
    workers: dict[Seat, Any] = {(1, node, 0): spawn(job, Probe, Request({}))}
    evaluators = RayEvaluators(job, "cuda", 0, lambda _: None, dict(workers))
    evaluators.spawn()
    assert sorted(evaluators._workers) == [(0, node, 0), (1, node, 0)]
    assert all(evaluators._workers[seat] is worker for seat, worker in workers.items()), "these go on"
    evaluators.end()
    waits = job_of(recipe, tmp_path, RayJob)
    threading.Timer(8, waits.stop.set).start()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):
        patch.setattr("pipelines.nodes.living", list)
        RayEvaluators(waits, "cuda", 0, lambda _: None).spawn()
    assert "waiting for capacity for 1 worker, each with 1 GPU; " in waits.said[0]


def test_a_stage_asks_for_its_named_resource_only_if_a_node_with_a_gpu_has_it(node: str) -> None:
    assert not request_for("prepare", "cuda", 1).named(), "only the head declares it, and has no GPU"
    assert request_for("prepare", "cpu", 1).named() == {"prepare": 1}
    assert request_for("train", "cuda", 1).named() == {"train": 1}
    probe = spawn(job_of(recipe_of()), Probe, request_for("prepare", "cuda", 1))
    assert ray.get(probe.where.remote())[0] == node


def test_a_worker_without_capacity_is_logged_and_starts_when_there_is_some(node: str) -> None:
    training, job = training_group(), job_of(recipe_of())
    probe = spawn(job, Probe, Request({"GPU": 1}))
    threading.Timer(4, remove_placement_group, [training]).start()
    (place,) = watch(job, [probe], [probe.where.remote()], policy=Watch(logged_after_s=0.5))
    assert place[0] == node
    assert job.events == [{"event": "waiting", "workers": 1}]


def training_group() -> Any:
    """Take all GPUs, as a training job does."""
    group = placement_group([{"GPU": 1}] * GPUS)
    assert ray.wait([group.ready()], timeout=30)[0]
    return group


@dataclass
class Evaluated:
    """An evaluation whose evaluators hold their GPUs and compute nothing."""

    job: RecordedJob
    workers: list[Any]
    after: Callable[[], None]
    """Called after each checkpoint, while the evaluators hold the GPUs."""

    def sample(self, sampled: Sampled) -> Callable[[], dict[str, float]]:
        watch(self.job, self.workers, [worker.where.remote() for worker in self.workers])
        put_metrics(self.job.sweep.evaluation(sampled))
        self.after()
        return dict

    def floor(self) -> None:
        """Measure no floor."""


def publish(sweep: Sweep, images: int) -> None:
    put_published(sweep.run("dit").published_at(images), images=images)


def test_evaluation_waits_for_training_and_gives_its_gpus_back(node: str, tmp_path: Path) -> None:
    recipe = recipe_of(
        f"models={ONE_MODEL}", "evaluate.variants={}",
        "train.publish_images=[0, 160, 320]", "train.workers=2", "evaluate.workers=2",
    )  # fmt: skip
    job = job_of(recipe, tmp_path, RayJob)
    sweep = job.sweep

    def resume_training() -> None:
        """A rerun continues training while evaluators hold the GPUs."""
        sweep.run("dit").folder.delete(Ended.NAME)
        if not state.published_counts(sweep.run("dit"))[1:]:
            publish(sweep, 160)

    def open_evaluation(_: object, device: str, gpus: int) -> Any:
        assert gpus == GPUS
        requests = Places.now(recipe).evaluators(device, gpus)
        workers = [spawn(job, Probe, request) for _, request in requests]
        evaluators = RayEvaluators(job, "cuda", GPUS, lambda _: None, {(None, None, n): worker for n, worker in enumerate(workers)})
        evaluation: Any = Evaluated(job, workers, resume_training)
        return evaluation, evaluators

    training = training_group()
    publish(sweep, 0)
    evaluation = PublishedEvaluation(job, "cuda", open_evaluation)
    thread = threading.Thread(target=evaluation.run, daemon=True)
    thread.start()
    time.sleep(3)
    assert state.evaluated_counts(sweep, "dit") == [], "training has all GPUs"
    assert len(job.events_named("queued")) == 1

    # Training fails: its GPUs are free, and evaluation takes them. It is asked again at once whether it may keep them.
    Ended(why="a GPU fell off the bus").write(sweep.run("dit").folder)
    remove_placement_group(training)
    wait_until(lambda: state.evaluated_counts(sweep, "dit") == [0], 300)
    training = training_group()  # would wait for ever if evaluation kept its GPUs
    assert state.evaluated_counts(sweep, "dit") == [0]

    publish(sweep, 320)
    remove_placement_group(training)
    thread.join(300)
    assert not thread.is_alive()
    assert state.evaluated_counts(sweep, "dit") == [0, 160, 320]


def test_mixing_gives_the_gpus_of_the_encoders_back(node: str, tmp_path: Path) -> None:
    """The parts are encoded here. The encoders that hold the GPUs have ended their work, as after encoding."""
    open_folder(tmp_path / "images").write("0.tar", tar({f"{i}.png": png(i) for i in range(8)}))
    source = f"data.source={{kind: tar, url: {tmp_path}/images, label: tar}}"
    sizes = ["precompute.shard_images=4", "data.num_classes=1", "data.resolution=8"]
    job = job_of(recipe_of(source, "vae={kind: none}", *sizes), tmp_path, RayJob)
    here, images = Encoder(job.sweep, "cpu"), open_source(job.recipe.data, job.sweep.store)
    latents, encoding = job.sweep.store / "latents/set", here.encoding()
    here.encode(latents, encoding, deal_of([0, 1]))
    workers = [spawn(job, Probe, request_for("precompute", "cuda", 1)) for _ in range(GPUS)]
    assert sum(len(gpus) for _, gpus in ray.get([worker.where.remote() for worker in workers])) == GPUS
    encoders = RayEncoders(job, "cuda", workers=workers)
    encoders.mix(latents, encoding, images, [0])
    assert shards.finished(latents, range(2)) == {0, 1}
    wait_until(lambda: ray.available_resources().get("GPU") == GPUS, 30)
    (mixer,) = encoders.workers
    assert job.requests[actor_id(mixer)].keys() == {"CPU", "memory"}, "it has no GPU and keeps none from others"


def test_what_no_node_can_hold_is_logged_within_ten_seconds_with_the_cure(node: str) -> None:
    """It waits on: an autoscaler may add a node. A stop request ends the wait."""
    job = job_of(recipe_of())
    other = spawn(job, Probe, Request({"CPU": 1}))
    idle = spawn(job, Probe, Request({"CPU": 1, "GPU": 1, "prepare": 1}))
    threading.Timer(10, job.stop.set).start()
    with pytest.raises(Preempted):
        watch(job, [other, idle], [other.where.remote(), idle.where.remote()])
    assert job.events == [{"event": "waiting", "workers": 1}]
    (line,) = job.said
    assert "waiting for capacity for 1 worker, each with 1 CPU, 1 GPU, 1 prepare; " in line
    assert "start such a node" in line
    ray.kill(idle)


def test_a_group_that_is_larger_than_the_cluster_is_logged_with_the_cure(node: str) -> None:
    bundle, job = {"CPU": 1.0, "GPU": 1.0}, job_of(recipe_of())
    group = placement_group([bundle] * 3)
    threading.Timer(8, job.stop.set).start()
    with pytest.raises(Preempted):
        ranks.placed(job, group, 3, bundle, lambda: False)
    (line,) = job.said
    assert "the nodes hold 2 of them, so they wait until one joins: start such a node" in line
    remove_placement_group(group)


def test_a_node_on_which_no_process_starts_counts_as_failed_and_not_as_capacity_that_lacks(node: str, tmp_path: Path) -> None:
    """Its interpreter hangs, as with a home folder that does not answer; a worker of the other node has started."""
    job = job_of(recipe_of(), tmp_path)
    group = placement_group([{"CPU": 1.0, "train": 1.0}] * 2, strategy="STRICT_SPREAD")
    assert ranks.placed(job, group, 2, {}, lambda: False)
    held = [placement_group_table(group)["bundles_to_node_id"][number] for number in range(2)]
    bundles = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number) for number in range(2)]
    asks = [Request({"CPU": 1.0, "train": 1.0}).on(scheduling_strategy=bundle) for bundle in bundles]
    asks[1] = asks[1].on(runtime_env={"py_executable": "sleep 1000"})
    workers = [spawn(job, Probe, each) for each in asks]
    policy = Watch(hang_after_s=4, keep_logs=False, held=held, answer_s=2)
    with pytest.raises(WorkerFailure, match="hanging; all others wait for the workers of node") as failed:
        watch(job, workers, [worker.where.remote() for worker in workers], policy=policy)
    assert (failed.value.cause, failed.value.worker) == ("device", 1)
    assert state.node_failures(job.sweep) == {name_of(held[1]): 1}
    assert "waiting for capacity" not in " ".join(job.said)
    remove_placement_group(group)


def test_a_worker_of_any_stage_avoids_a_node_whose_devices_failed_while_others_hold_it(node: str, tmp_path: Path) -> None:
    job = job_of(recipe_of(), tmp_path)
    name = next(each.name for each in living() if each.id == node)
    head = next(each.id for each in living() if each.id != node)
    for _ in range(2):
        record_failure(job, name, "uncorrectable ECC error")
    for _ in range(4):
        probe = spawn(job, Probe, elsewhere(job, Request({"CPU": 1.0})))
        assert ray.get(probe.where.remote())[0] == head
        ray.kill(probe)
    assert elsewhere(job, Request({"CPU": 1.0, "GPU": 1.0})).options == {}, "only that node has one"
    assert job.events_named("exclusion_ignored") == [{"event": "exclusion_ignored", "nodes": [name]}]


WRONG = WrongKernel("the scan is wrong")


@dataclass
class Compared(RayEvaluators):
    """Evaluators of which one on another node has right kernels, or wrong ones as well."""

    right: bool = True
    asked: list[Any] = field(default_factory=list)

    def _spawn_other(self, request: Request) -> Any:
        self.asked.append(spawn(self.job, Judged, request, self.right, WRONG))
        return self.asked[-1]


@pytest.mark.parametrize("right", [True, False])
def test_a_kernel_that_is_wrong_for_a_lone_evaluator_is_compared_on_another_node(node: str, tmp_path: Path, right: bool) -> None:
    """A sweep has one evaluator unless its recipe says more. No node is to blame for a kernel that is wrong on both."""
    job = job_of(reading.load(TINY, ["device=cpu"]), tmp_path, RayJob)
    head = next(each.id for each in living() if each.id != node)
    lone = spawn(job, Judged, Request({"CPU": 1.0}).on(scheduling_strategy=only(head)), False, WRONG)
    evaluators = Compared(job, "cpu", 0, lambda _: None, {(None, None, 0): lone}, right=right)
    with pytest.raises(WorkerFailure if right else WrongKernel, match="the scan is wrong"):
        evaluators.sample(Sampled("dis", 0), job.recipe.evaluate, [0])
    assert [node_of(other) for other in evaluators.asked] == [node]
    assert state.node_failures(job.sweep) == ({name_of(head): 1} if right else {})
    evaluators.end()


def test_a_sweep_says_at_its_start_which_stage_no_node_can_hold_and_waits_before_it_encodes(node: str, tmp_path: Path) -> None:
    """Not only after the days of the stages before it; prepare runs meanwhile."""
    on_gpus: Any = SimpleNamespace(ours=False, require_alive=lambda: None)
    for workers, lines in ((2, 0), (3, 1)):
        driver = driver_of(reading.load(TINY, ["device=cuda", f"train.workers={workers}"]), tmp_path)
        needs.name_needs(driver, on_gpus)
        assert logged(driver).count("later    ") == lines
        threading.Timer(7, driver.stop_requested.set).start()
        with contextlib.nullcontext() if workers == 2 else pytest.raises(Preempted):
            needs.await_nodes(driver, on_gpus)
        assert logged(driver).count("waiting for capacity for 3 workers, each with 1 CPU, 1 GPU, 1 train; ") == lines
    assert "later    train needs 3 workers, each with 1 CPU, 1 GPU, 1 train; nodes: " in logged(driver)
    assert "; the nodes hold 2 of them, so they wait until one joins: start such a node" in " ".join(logged(driver).split())


def test_what_nodes_declared_that_are_gone_is_waited_for(nodes: Cluster, tmp_path: Path) -> None:
    """Otherwise a stage would take the GPUs of another whose nodes are left, which may be of another kind."""
    recipe = recipe_of("train.workers=1", f"models={ONE_MODEL}")
    before = Places.now(recipe).spare_gpus(1)
    encoding = nodes.add_node(num_cpus=1, num_gpus=1, resources={"precompute": 1})
    assert request_for("precompute", "cuda", 1).named() == {"precompute": 1}
    nodes.remove_node(encoding, allow_graceful=False)
    wait_until(lambda: all(node.id != encoding.node_id for node in living()), 60)
    assert request_for("precompute", "cuda", 1).named() == {"precompute": 1}
    assert Places.now(recipe).lacking("cuda").keys() == {"precompute"}
    assert Places.now(recipe).spare_gpus(1) == before
    three = recipe.model_copy(update={"device": "auto", "train": recipe.train.model_copy(update={"workers": 3})})
    assert choose_device(three)[0] == "cuda", "a model that begins meanwhile would be trained on the CPU, or fail"
    driver = driver_of(recipe, tmp_path)
    on_gpus: Any = SimpleNamespace(ours=False, require_alive=lambda: None)
    needs.name_needs(driver, on_gpus)
    assert "later    precompute needs 1 worker" in logged(driver)
    state.use_latents(driver.sweep, make(driver.sweep.store / "latents/set", [2]), "v" * 64)
    again = driver_of(recipe, tmp_path)
    needs.name_needs(again, on_gpus)
    assert logged(again) == "", "there are latents"
