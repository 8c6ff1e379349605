"""Where workers run, and what those that wait say, on a cluster with declared GPUs: a head without one and a node with two.

Nothing computes on them.
"""

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
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util.placement_group import placement_group, remove_placement_group

from dis_scale.process.errors import Preempted, UserError
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import Ended
from pipelines import evaluate, stage, train, waiting
from pipelines import sweep as sweep_command
from pipelines.driver import Driver
from pipelines.evaluators import RayEvaluators
from pipelines.places import requests, spare_gpus
from pipelines.waiting import hopeless
from pipelines.worker import resources, spawn, watch
from tests.conftest import TINY
from tests.support import sweeps
from tests.support.documents import put_metrics, put_published
from tests.support.events import events
from tests.support.probe import Probe
from tests.support.stages import ONE_MODEL

GPUS = 2


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        head = {"num_cpus": 2, "num_gpus": 0, "resources": {"prepare": 1, "train": 2}, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=2, num_gpus=GPUS, resources={"train": 2, "evaluate": 2})
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def node(nodes: Cluster) -> str:
    """The id of the node with GPUs."""
    return next(iter(nodes.worker_nodes)).node_id


def recipe_of(*settings: str) -> Recipe:
    return reading.load(TINY, ["device=cuda", *settings])


def test_an_evaluator_without_a_gpu_shares_those_of_the_node_that_has_some(node: str) -> None:
    asked = requests(recipe_of("evaluate.workers=4", "evaluate.gpu_share=0.2", "train.workers=1"), "cuda", 1)
    assert [shared for shared, _ in asked] == [None, 1, 0, 1]
    probes = [spawn(Probe, request) for _, request in asked]
    places = ray.get([probe.where.remote() for probe in probes])
    assert {place for place, _ in places} == {node}
    assert [len(gpus) for _, gpus in places] == [1, 0, 0, 0]
    assert ray.get([probe.visible.remote() for probe in probes[1:]]) == [None] * 3, "all devices stay visible"


def test_without_a_share_there_are_only_evaluators_with_a_gpu_of_their_own(node: str) -> None:
    recipe = recipe_of("evaluate.workers=4", "train.workers=1", f"models={ONE_MODEL}")
    assert spare_gpus(recipe) == 1
    assert [shared for shared, _ in requests(recipe, "cuda", spare_gpus(recipe))] == [None]


def test_a_stage_asks_for_its_named_resource_only_if_a_node_with_a_gpu_has_it(node: str) -> None:
    assert "resources" not in resources("prepare", "cuda", 1), "only the head declares it, and has no GPU"
    assert resources("prepare", "cpu", 1)["resources"] == {"prepare": 1}
    assert resources("train", "cuda", 1)["resources"] == {"train": 1}
    probe = spawn(Probe, resources("prepare", "cuda", 1))
    assert ray.get(probe.where.remote())[0] == node


def test_a_worker_without_capacity_is_logged_and_starts_when_there_is_some(
    node: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.waiting.LOGGED_AFTER_S", 0.5)
    training = training_group()
    probe = spawn(Probe, {"num_gpus": 1})
    threading.Timer(4, remove_placement_group, [training]).start()
    (place,) = watch([probe], [probe.where.remote()], lambda _: None)
    assert place[0] == node
    (event,) = events(capsys.readouterr().out, "waiting")
    assert event["workers"] == 1


def training_group() -> Any:
    """Take all GPUs, as a training job does."""
    group = placement_group([{"GPU": 1}] * GPUS)
    assert ray.wait([group.ready()], timeout=30)[0]
    return group


@dataclass
class Evaluated:
    """An evaluation whose evaluators hold their GPUs and compute nothing."""

    sweep: Sweep
    workers: list[Any]
    evaluators: Any = field(init=False)

    def __post_init__(self) -> None:
        living = dict(enumerate(self.workers))
        self.evaluators = RayEvaluators(self.sweep, "cuda", GPUS, lambda _: None, living)

    def evaluate(self, sampled: Sampled) -> dict[str, float]:
        watch(self.workers, [worker.where.remote() for worker in self.workers], lambda _: None)
        put_metrics(self.sweep.evaluation(sampled))
        return {}

    def floor(self) -> None:
        """Measure no floor."""


def publish(sweep: Sweep, images: int) -> None:
    put_published(sweep.run("dit").published_at(images), images=images)


def test_evaluation_waits_for_training_and_gives_its_gpus_back(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(
        f"models={ONE_MODEL}", "evaluate.variants={}",
        "train.publish_images=[0, 160]", "train.workers=2", "evaluate.workers=2",
    )  # fmt: skip
    sweep = Sweep.below(open_folder(tmp_path), recipe)

    def open_evaluation(sweep: Sweep, device: str, gpus: int, *_: Any) -> Evaluated:
        assert gpus == GPUS
        return Evaluated(sweep, [spawn(Probe, request) for _, request in requests(sweep.recipe, device, gpus)])

    monkeypatch.setattr(evaluate, "open_evaluation", open_evaluation)
    monkeypatch.setattr(evaluate, "POLL_EVERY_S", 0.2)
    monkeypatch.setattr("dis_scale.tracking.mlflow_copy.copy_evaluation", lambda *_: True)
    monkeypatch.setattr(stage, "connect", lambda: None)
    training = training_group()
    publish(sweep, 0)
    job = threading.Thread(target=evaluate.evaluate_published, args=(sweep, []), daemon=True)
    job.start()
    time.sleep(3)
    assert state.evaluated_counts(sweep, "dit") == [], "training has all GPUs"
    assert len(events(capsys.readouterr().out, "queued")) == 1

    # Training fails: its GPUs are free, and evaluation takes them. It is asked again at once whether it may keep them.
    Ended(why="a GPU fell off the bus").write(sweep.run("dit").folder)
    over = state.training_over
    resumed = threading.Event()
    monkeypatch.setattr(state, "training_over", lambda sweep: over(sweep) and not resumed.is_set())
    taken = evaluate.evaluate_one

    def evaluate_one(*arguments: Any) -> None:
        taken(*arguments)
        resumed.set()  # a rerun continues training while evaluators hold the GPUs
        publish(sweep, 160)

    monkeypatch.setattr(evaluate, "evaluate_one", evaluate_one)
    remove_placement_group(training)
    wait_until(lambda: state.evaluated_counts(sweep, "dit") == [0])
    training = training_group()  # would wait for ever if evaluation kept its GPUs
    assert state.evaluated_counts(sweep, "dit") == [0]

    sweep.run("dit").folder.delete(Ended.NAME)
    resumed.clear()  # over from here on, since the last count is published
    monkeypatch.setattr(evaluate, "evaluate_one", taken)
    remove_placement_group(training)
    job.join(300)
    assert not job.is_alive()
    assert state.evaluated_counts(sweep, "dit") == [0, 160]


def test_what_can_never_be_placed_is_logged_within_ten_seconds_and_ends_with_the_cure(
    node: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "GIVE_UP_AFTER_S", 8.0)
    other = spawn(Probe, {"num_cpus": 1})
    idle = spawn(Probe, {"num_cpus": 1, "num_gpus": 1, "resources": {"prepare": 1}})
    logged, began_s = list[float](), time.monotonic()
    say = waiting.lines.say
    monkeypatch.setattr(waiting.lines, "say", lambda text: (logged.append(time.monotonic() - began_s), say(text)))
    with pytest.raises(
        UserError, match=r"no capacity for 1 workers, each with 1 CPU, 1 GPU, 1 prepare.*start such a node"
    ):
        watch([other, idle], [other.where.remote(), idle.where.remote()], lambda _: None)
    (event,) = events(capsys.readouterr().out, "waiting")
    assert event["workers"] == 1
    assert logged[0] < 10


def test_a_group_that_is_larger_than_the_cluster_ends_with_the_cure(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "GIVE_UP_AFTER_S", 2.0)
    bundle = {"CPU": 1.0, "GPU": 1.0}
    group = placement_group([bundle] * 3)
    with pytest.raises(UserError, match="no capacity for 3 workers, each with 1 CPU, 1 GPU, "):
        train._placed(group, 3, bundle, lambda: 0)
    remove_placement_group(group)


def test_a_sweep_says_at_its_start_which_stage_can_never_be_placed(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the days of the stages before it."""
    monkeypatch.setattr(waiting, "LOGGED_AFTER_S", 0.5)
    monkeypatch.setattr(waiting, "GIVE_UP_AFTER_S", 2.0)
    said: list[str] = []
    cluster: Any = SimpleNamespace(gpus=2)
    board: Any = SimpleNamespace(say=said.append)
    driver = Driver(sweeps.sweep_at(tmp_path, "device=cuda", "train.workers=3"), board)
    with pytest.raises(
        UserError, match="no capacity for 3 workers, each with 1 CPU, 1 GPU, 1 train, within 2 s; nodes: "
    ):
        sweep_command._await_nodes(driver, cluster)
    assert [line.partition(",")[0] for line in said] == ["waiting for capacity for 3 workers"]
    driver.stop_requested.set()
    with pytest.raises(Preempted):
        sweep_command._await_nodes(driver, cluster)
    fitting = Driver(sweeps.sweep_at(tmp_path, "device=cuda", "train.workers=2"), board)
    sweep_command._await_nodes(fitting, cluster)


def test_the_second_autoscaler_reports_what_it_can_never_add(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a reply as it sends it; its provider for tests does not run next to other Rays on one machine."""
    reply = GetClusterStatusReply()
    reply.autoscaling_state.autoscaler_state_version = 7
    reply.autoscaling_state.infeasible_resource_requests.add().resources_bundle.update({"GPU": 64.0})
    gang = reply.autoscaling_state.infeasible_gang_resource_requests.add()
    gang.requests.add().resources_bundle.update({"GPU": 3.0})
    answer = SimpleNamespace(get_cluster_status=lambda timeout_s: reply.SerializeToString())
    monkeypatch.setattr(waiting, "global_worker", SimpleNamespace(gcs_client=answer))
    assert [hopeless({"GPU": count}) for count in (64.0, 3.0, 4.0)] == [True, True, False]


@pytest.mark.faults
def test_after_the_loss_of_a_node_its_replacement_is_awaited(nodes: Cluster, node: str) -> None:
    """The last test on this cluster: nothing on it is hopeless from then on."""
    assert hopeless({"GPU": 3.0})
    assert not hopeless({"GPU": 2.0})
    nodes.remove_node(next(iter(nodes.worker_nodes)))
    wait_until(lambda: len(waiting.alive_nodes()) == 1)
    assert not hopeless({"GPU": 2.0})


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
