"""On a cluster that a user started: the sweep as a Ray job, stopped by Ray, given again; evaluation that starts before training."""

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

from dis_scale.evaluation import results
from dis_scale.recipe import reading
from dis_scale.storage.folder import open_folder
from pipelines import jobs
from tests.support import sweeps

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A plain `ray start --head` of two CPUs with no named resources; its dashboard's URL."""
    port, dashboard, agent = jobs.free_ports(3)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
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
            JobSubmissionClient(url).list_jobs()
            break
        except (ConnectionError, RuntimeError):
            assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
            time.sleep(0.3)
    yield url
    sweeps.kill_all(process)


def submit(url: str, name: str, *settings: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` as the README gives it, and what it printed at the end."""
    overrides = [word for setting in settings for word in ("--set", setting)]
    command = [RAY, "job", "submit", "--address", url, "--working-dir", ".", "--submission-id", name, "--"]
    command += [sys.executable, "-m", "dis_scale.sweep", "tests/support/tiny.yaml", *overrides]
    return subprocess.run(command, cwd=sweeps.ROOT, env=os.environ.copy(), capture_output=True, text=True, timeout=400)


def test_submitted_stopped_and_submitted_again(head: str, tmp_path: Path) -> None:
    """Ends on the head's own home, as a relative root on one node does; `ray job stop` on the sweep stops its stages."""
    client = JobSubmissionClient(head)
    overrides = ["--set", "storage.root=store", *[word for setting in sweeps.SLOW for word in ("--set", setting)]]
    entry = [sys.executable, "-m", "dis_scale.sweep", "tests/support/tiny.yaml", *overrides]
    client.submit_job(
        entrypoint=shlex.join(entry),
        submission_id="first",
        runtime_env={"working_dir": str(sweeps.ROOT), "excludes": [".git", ".venv"]},
    )
    root = tmp_path / "home/dis-scale/store"
    resume = open_folder(root) / "sweeps/tiny/runs/dis/resume"
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
    assert not open_folder(root).exists("sweeps/tiny/runs/dis/published/000000003200/manifest.json")
    done = submit(head, "second", "storage.root=store", *sweeps.SLOW)
    assert done.returncode == 0, done.stdout + done.stderr
    sweeps.assert_whole(str(root), *sweeps.SLOW)


def test_evaluation_first_keeps_no_training_waiting_and_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    longer = "train.publish_images=[0, 160, 16000]"
    recipe = reading.load(sweeps.TINY, [f"storage.root={tmp_path}", longer, "train.resume_every_images=160"])
    recipe = recipe.model_copy(update={"models": {"dit": recipe.models["dit"]}})
    sweep = sweeps.sweep_folder(str(tmp_path))
    sweep.write("recipe.yaml", reading.dump(recipe).encode())
    with jobs.cluster(recipe) as cluster:
        for stage in ("prepare", "precompute"):
            assert _end(jobs.submit(cluster, recipe, sweep, stage)) == "SUCCEEDED"
        evaluation = jobs.submit(cluster, recipe, sweep, "evaluate")
        while not any("evaluation on" in line for line in evaluation.lines()):
            time.sleep(0.3)
        joined = jobs.submit(cluster, recipe, sweep, "evaluate")
        assert (joined.id, joined.ours) == (evaluation.id, False)
        training = jobs.submit(cluster, recipe, sweep, "train", "dit")
        while len((sweep / "runs/dit/resume").list()) < 2:
            assert not training.ended(), training.why()
            time.sleep(0.05)
        _kill_one_trainer()
        assert _end(training) == "SUCCEEDED", training.why()
        assert any("a worker was lost" in line for line in training.lines())
        assert _end(evaluation) == "SUCCEEDED", evaluation.why()
    assert sorted(results.evaluated(sweep, "dit")) == [0, 160, 16000]
    assert json.loads(sweep.read("evaluation/dit/000000016000/metrics.json"))["samples"] == recipe.evaluate.samples


def _kill_one_trainer() -> None:
    workers = [p for p in psutil.Process().children(recursive=True) if "Trainer" in p.name() + " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[1].kill()


def _end(job: jobs.Job) -> str:
    while not job.ended():
        time.sleep(0.3)
    return str(job.status())
