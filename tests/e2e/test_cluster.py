"""On a cluster that a user started: the sweep as a Ray job, stopped by Ray and rerun; evaluation that starts before training."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.job_submission import JobSubmissionClient

from dis_scale.storage.folder import open_folder
from dis_scale.sweep import state
from pipelines import jobs
from pipelines.cluster import free_ports, open_cluster
from tests.support import clusters, stages, sweeps

SETTINGS = (*sweeps.SLOW, f"models={stages.ONE_MODEL}", "evaluate.variants={}")
"""One model and one way to sample: other tests cover more."""
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A plain `ray start --head` of two CPUs with no named resources; its dashboard's URL."""
    port, dashboard, agent = free_ports(3)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(jobs.FINAL, "1")  # as in rayjob.yaml's head
    command = [
        RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--temp-dir=/tmp/ray-test-{port}", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--object-store-memory=200000000",
    ]  # fmt: skip
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    url, deadline = f"http://127.0.0.1:{dashboard}", time.monotonic() + 90
    while True:
        try:
            JobSubmissionClient(url).submit_job(entrypoint="true")  # refused until the node's agent has started, too
            break
        except (ConnectionError, RuntimeError):
            assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
            time.sleep(0.3)
    yield url
    sweeps.kill_all(process)


def submit(url: str, name: str, *settings: str) -> subprocess.CompletedProcess[str]:
    """Run `ray job submit` as the README shows it."""
    overrides = [word for setting in settings for word in ("--set", setting)]
    command = [RAY, "job", "submit", "--address", url, "--working-dir", ".", "--submission-id", name, "--"]
    command += [sys.executable, "-m", "dis_scale.sweep", "tests/support/tiny.yaml", *overrides]
    return subprocess.run(command, cwd=sweeps.ROOT, env=os.environ.copy(), capture_output=True, text=True, timeout=400)


def test_submitted_stopped_and_submitted_again(head: str, tmp_path: Path) -> None:
    """A relative root on one node is below the head's home; `ray job stop` on the sweep stops its stages."""
    client = JobSubmissionClient(head)
    overrides = ["--set", "storage.root=store", *[word for setting in SETTINGS for word in ("--set", setting)]]
    entry = [sys.executable, "-m", "dis_scale.sweep", "tests/support/tiny.yaml", *overrides]
    client.submit_job(
        entrypoint=shlex.join(entry),
        submission_id="first",
        runtime_env={"working_dir": str(sweeps.ROOT), "excludes": [".git", ".venv"]},
    )
    root = tmp_path / "home/dis-scale/store"
    resume = open_folder(root) / "sweeps/tiny/runs/dit/resume"
    deadline = time.monotonic() + 300
    while len(resume.list()) < 2:
        assert time.monotonic() < deadline, client.get_job_logs("first")
        assert client.get_job_status("first") not in jobs.ENDED, client.get_job_logs("first")
        time.sleep(0.2)
    client.stop_job("first")
    while not all(job.status in jobs.ENDED for job in client.list_jobs()):
        assert time.monotonic() < deadline, client.list_jobs()
        time.sleep(0.2)
    assert client.get_job_status("first") == "STOPPED"
    assert not open_folder(root).exists("sweeps/tiny/runs/dit/published/000000003200/manifest.json")
    done = submit(head, "second", "storage.root=store", *SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    sweeps.assert_complete(str(root), *SETTINGS)
    refused = submit(head, "refused", "storage.root=store", "seed=1", *SETTINGS)
    assert "seed: stored 0, given 1" in refused.stdout + refused.stderr
    assert client.get_job_status("refused") == "STOPPED", "KubeRay tries again what has failed"


def test_evaluation_first_does_not_block_training_and_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    sweep = sweeps.sweep_at(tmp_path, *SETTINGS, "train.publish_images=[0, 160, 6400]")
    stages.prepare_and_precompute(sweep, tmp_path / "faults")
    with open_cluster(sweep.recipe) as cluster:
        evaluation = jobs.submit(cluster, sweep, "evaluate")
        clusters.wait_until(lambda: bool(sweep.lease("evaluate").list()), evaluation)
        joined = jobs.submit(cluster, sweep, "evaluate")
        assert (joined.id, joined.ours) == (evaluation.id, False)
        events = clusters.Events(training := jobs.submit(cluster, sweep, "train", "dit"))
        clusters.wait_until(lambda: len(sweep.run("dit").resume.list()) > 1, training)
        _kill_one_trainer()
        events.wait("restart")
        assert clusters.wait_for_end(training) == "SUCCEEDED", training.reason()
        assert clusters.wait_for_end(evaluation) == "SUCCEEDED", evaluation.reason()
    assert sorted(state.evaluated(sweep, "dit")) == [0, 160, 6400]
    metrics = json.loads(sweep.folder.read("evaluation/dit/000000006400/metrics.json"))
    assert metrics["samples"] == sweep.recipe.evaluate.samples


def _kill_one_trainer() -> None:
    workers = [process for process in psutil.Process().children(recursive=True) if _is_trainer(process)]
    assert len(workers) == 2
    workers[1].kill()


def _is_trainer(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # other processes come and go
        return "Trainer" in process.name() + " ".join(process.cmdline())
    return False
