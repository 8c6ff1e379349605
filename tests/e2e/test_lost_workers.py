"""Workers that hang, crash or are lost, all on one Ray: what others compute meanwhile, what is redone, what operators see."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from dis_scale import vae
from dis_scale.data import shards
from dis_scale.process import counts, faults
from dis_scale.recipe import reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep, state
from dis_scale.tracking import attempt_logs
from pipelines import metrics
from pipelines.cluster import Cluster, open_cluster
from tests.support import clusters, stages, sweeps
from tests.support.clusters import Events
from tests.support.commands import invoke
from tests.support.exporters import scrape_all
from tests.support.labelled_images import png, tar

SMALL = (
    "vae={kind: none}", "data.resolution=16", "data.num_classes=20", "precompute.shard_images=8",
    "precompute.encode_images=8", "precompute.workers=2",
)  # fmt: skip
NOT_OF_TRAINING = {name for name in metrics.GAUGES if name.startswith(("evaluation_", "models_", "sweep_", "waited_"))}
"""The last is exported after a wait of ten minutes."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray of this process, as a sweep starts it."""
    with open_cluster(reading.load(sweeps.TINY)) as cluster:
        yield cluster


def with_faults(cluster: Cluster, plan: Path) -> Cluster:
    """The cluster for jobs whose processes meet the plan's faults."""
    return replace(cluster, runtime_env={"env_vars": {faults.VARIABLE: str(plan)}})


@pytest.mark.faults
def test_evaluation_first_does_not_block_training_and_a_rank_that_hangs_is_replaced(cluster: Cluster, tmp_path: Path) -> None:
    """The training job's log has the stacks of all ranks, and the collective in which the others wait."""
    settings = (
        f"models={stages.ONE_MODEL}", "evaluate.variants={}", "train.publish_images=[0, 160]", "train.hang_after_s=20",
    )  # fmt: skip
    sweep, plan = sweeps.sweep_at(tmp_path, *settings), tmp_path / "faults"
    stages.prepare_and_precompute(sweep, tmp_path / "none")
    plan.write_text("hang at step rank=1 images=48\n")
    evaluation = clusters.submit(cluster, sweep, "evaluate")
    clusters.wait_until(lambda: bool(sweep.lease("evaluate").list()), evaluation)
    joined = clusters.submit(cluster, sweep, "evaluate")
    assert (joined.id, joined.ours) == (evaluation.id, False)
    events = Events(training := clusters.submit(with_faults(cluster, plan), sweep, "train", "dit"))
    events.wait("restart")
    assert clusters.wait_for_end(training) == "SUCCEEDED", training.reason()
    assert clusters.wait_for_end(evaluation) == "SUCCEEDED", evaluation.reason()
    assert sorted(state.evaluated(sweep, "dit")) == [0, 160]
    assert state.evaluated(sweep, "dit")[160].samples == sweep.recipe.evaluate.samples

    waiting, hanging = cluster.client.get_job_logs(training.id).split("stacks of worker ")[1:3]
    assert "train_model" in waiting
    assert "train_model" in hanging
    assert "gloo:" in waiting.partition("process group 0: ")[2]
    assert "_inject" in hanging


def precomputed_sweep(root: Path, images: Path) -> Sweep:
    source = f"data.source={{kind: tar, url: {images}, label: tar}}"
    sweep = sweeps.sweep_at(root, source, *SMALL)
    sweep.save_recipe()
    return sweep


def latents_of(sweep: Sweep) -> dict[str, bytes]:
    folder = shards.latents_folder(sweep, vae.PixelVae().identity)
    return {name: folder.read(name) for name in folder.list()}


@pytest.mark.faults  # tests/e2e/test_sharing.py loses workers, tests/pipelines/test_precompute.py encoders, in `make test`
def test_a_lost_encoder_and_a_lost_mixer_cost_what_they_had_begun(cluster: Cluster, tmp_path: Path) -> None:
    """The others continue, the next attempt makes the rest, and the set has the same bytes."""
    plan = tmp_path / "faults"
    plan.write_text("kill at written path=staged/000004.bin\nkill at written path=000003.tar\n")
    for n in range(20):
        open_folder(tmp_path / "images").write(f"{n:02d}.tar", tar({f"{i}.png": png(i) for i in range(8)}))
    sweep = precomputed_sweep(tmp_path / "lost", tmp_path / "images")
    job = clusters.submit(with_faults(cluster, plan), sweep, "precompute")
    assert clusters.wait_for_end(job) == "SUCCEEDED", job.reason()
    assert len(list(plan.with_name("faults.spent").iterdir())) == 2, "both faults have happened"
    log = "\n".join(job.lines())
    assert log.count("restart from the stored state") == 2
    assert log.index("the others (1) continue") < log.index("restart from the stored state")

    calm = precomputed_sweep(tmp_path / "calm", tmp_path / "images")
    none = tmp_path / "none"
    none.write_text("")
    code, output = stages.run("precompute", calm, none)
    assert code == 0, output
    assert latents_of(sweep) == latents_of(calm)


class Observed(NamedTuple):
    """A model's training, after its end; its metrics while it ran, and after it had ended."""

    sweep: Sweep
    running: dict[str, list[float]]
    ended: dict[str, list[float]]


def observe(cluster: Cluster, root: Path) -> Observed:
    """Crash rank 1. Each attempt hangs after its first rows, so that it computes nothing while it is observed."""
    sweep = clusters.sweep_to_train(
        root, "name=crashed", f"models={stages.ONE_MODEL}", "train.publish_images=[0, 160, 3200000]",
        "train.resume_every_images=160", "grace_s=2",
    )  # fmt: skip
    plan = root / "faults"
    plan.write_text("hang at step rank=1 images=480\nhang at step rank=1 images=960\n")
    events = Events(job := clusters.submit(with_faults(cluster, plan), sweep, "train", "dit"))
    events.wait("work")
    os.kill(pid_of_rank_1(sweep), signal.SIGSEGV)
    events.wait("restart")
    events.wait("work")
    expected = (metrics.GAUGES.keys() - NOT_OF_TRAINING) | {f"{name}_total" for name in counts.MEANINGS}
    running = scrape_until(cluster, lambda values: expected <= values.keys() and values["attempts"] == [2])
    job.stop()
    assert clusters.wait_for_end(job) == "STOPPED"
    ended = scrape_until(cluster, lambda values: not values.keys() & metrics.GAUGES.keys())
    return Observed(sweep, running, ended)


def pid_of_rank_1(sweep: Sweep) -> int:
    """Return the process id that its stored log names."""
    folder, deadline = sweep.logs("train", "dit"), time.monotonic() + sweeps.TIMEOUT_S
    while True:
        for name in attempt_logs.listed(folder):
            if name.process == "0001":
                return int(json.loads(folder.read(str(name)).splitlines()[0])["pid"])
        assert time.monotonic() < deadline
        time.sleep(0.2)


def scrape_until(cluster: Cluster, true: Callable[[dict[str, list[float]]], bool]) -> dict[str, list[float]]:
    """Return the crashed sweep's metrics of model dit by name, each without its prefix, as Prometheus would read them."""
    deadline = time.monotonic() + 200
    while True:
        values: dict[str, list[float]] = {}
        for line in scrape_all(Path(f"/tmp/{cluster.id}/ray")).splitlines():
            if found := re.fullmatch(r'ray_dis_scale_(\w+)\{.*model="dit".*sweep="crashed".*\} (\S+)', line):
                values.setdefault(found[1], []).append(float(found[2]))
        if true(values):
            return values
        assert time.monotonic() < deadline, values
        time.sleep(2)


def logs_of(sweep: Sweep) -> list[str]:
    """Return when each attempt's logs begin."""
    return sorted({n.begun for n in attempt_logs.listed(sweep.logs("train", "dit")) if n.process != "driver"})


def test_what_operators_see_of_a_crash(cluster: Cluster, tmp_path: Path, subtests: pytest.Subtests) -> None:
    """Stacks of the crash handler in storage, JSON logs, metrics at Ray's exporter."""
    observed = observe(cluster, tmp_path)
    for part in (stacks_are_kept, events_are_json, metrics_are_exported, gauges_of_an_ended_run_disappear):
        with subtests.test(part.__name__):
            part(observed)


def stacks_are_kept(observed: Observed) -> None:
    first, second = logs_of(observed.sweep)
    texts = attempt_logs.read_attempt(observed.sweep.logs("train", "dit"), first)
    (crashed,) = [text for name, text in texts.items() if name.process.endswith("-end")]
    assert "Fatal Python error: Segmentation fault" in crashed
    driver = next(text for name, text in texts.items() if name.process == "driver")
    assert "a worker was lost" in driver
    _, printed = invoke("logs", observed.sweep.folder.url, "dit", "--attempt", second)
    assert "attempt 2, rank 0, " in printed
    assert "attempt 2, rank 1, " in printed


def events_are_json(observed: Observed) -> None:
    folder = observed.sweep.logs("train", "dit")
    (driver,) = [name for name in attempt_logs.listed(folder) if name.process == "driver"]
    lines = folder.read(str(driver)).decode().splitlines()
    entries = [json.loads(line) for line in lines if line.startswith('{"kind"')]
    (crash,) = [entry for entry in entries if entry.get("event") == "restart"]
    assert (crash["sweep"], crash["stage"], crash["model"]) == ("crashed", "train", "dit")
    of_ranks = [entry for entry in entries if entry["rank"] == 0]
    assert {entry["attempt"] for entry in of_ranks} == {1, 2}
    assert of_ranks[-1]["images"] > 0


def metrics_are_exported(observed: Observed) -> None:
    values, now = observed.running, time.time()
    assert {name: len(values[name]) for name in metrics.GAUGES if name in values} == dict.fromkeys(
        metrics.GAUGES.keys() - NOT_OF_TRAINING, 1
    ), "each gauge comes from one process"
    (rate,), (step_s,), (interval_s,) = (values[n] for n in ("images_per_second", "step_seconds", "resume_interval_seconds"))
    assert rate > 0
    assert 0.1 < step_s * rate / 16 < 10, "two gauges of one scrape may be of two rows, one of them beside other work"
    assert 1 < interval_s / step_s < 100
    assert now - 600 < values["resume_point_timestamp_seconds"][0] < now
    assert 0 < values["goodput_ratio"][0] <= 1
    assert sum(values["restarts_total"]) == 1
    assert sum(values["lease_takeovers_total"]) == sum(values["storage_retries_total"]) == 0
    assert values["mlflow_away"] == [0], "this training has no run in MLflow, so none is away"
    assert values["skipped_steps"] == values["failed_nodes"] == [0]


def gauges_of_an_ended_run_disappear(observed: Observed) -> None:
    assert observed.ended.keys() == {f"{name}_total" for name in counts.MEANINGS}
