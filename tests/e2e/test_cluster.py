"""On a cluster that has the wheel: the sweep as a Ray job with all state in an object store, stopped by Ray and rerun.

No file, object or process title has a secret.
"""

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from ray.job_submission import JobSubmissionClient

from dis_scale.process.machine import free_ports
from dis_scale.sweep import Sweep, state
from ops.drills import object_store
from pipelines import jobs
from tests.support import pods, secrets, stages, sweeps
from tests.support.exporters import scrape_all
from tests.support.waiting import wait_until

SETTINGS = ("train.resume_every_images=160", "evaluate.variants={}", "precompute.workers=1")
"""One way to sample: other tests cover more."""
SHARDED = (
    "models={dis: {kind: dis, width: 16, depth: 2, patch: 4}}", "train.zero_stage=3", "train.precision=bf16",
    "train.publish_images=[0, 800]",
)  # fmt: skip
"""Steps of a tenth of a second: 50 last long enough to stop them."""
NOT_SHARDED = (f"models={stages.ONE_MODEL}", "train.publish_images=[0, 3200]")
SECRETS = {name: secrets.SECRETS[name] for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN")}
"""Planted; those of the store are real."""


ENDED = "ray_dis_scale_sweep_ended_timestamp_seconds{"
RAY = ("-m", "ray.scripts.scripts")


class Head(NamedTuple):
    url: str
    """Of its dashboard."""
    folder: Path
    python: Path
    """Of the wheel's environment."""
    job: Path
    """The folder that a job is submitted from: the recipe, and nothing else."""

    @property
    def logs(self) -> Path:
        return (self.folder / "session_latest/logs").resolve()


class Store(NamedTuple):
    given: str
    """storage.root as the recipe gives it."""
    root: str
    """Where that is."""
    settings: tuple[str, ...]
    model: str

    @property
    def sweep(self) -> Sweep:
        return sweeps.sweep_at(self.root, *self.settings)


ON_DISK = () if object_store.missing() else pytest.mark.faults
"""A machine without an object store runs the other sweep, so that each runs one."""


@pytest.fixture(params=["object store", pytest.param("below the home", marks=ON_DISK)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An object store, whose sweep is sharded; and a relative root, which on one node is below the head's home."""
    if request.param == "object store":
        root = f"{request.getfixturevalue('bucket')}/prefix"
        return Store(root, root, (*SETTINGS, *SHARDED, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"), "dis")
    return Store("store", f"{tmp_path}/home/dis-scale/store", (*SETTINGS, *NOT_SHARDED), "dit")


@pytest.fixture
def head(store: Store, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    """A plain `ray start --head` of two CPUs with no named resources, outside of this repository."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (job := tmp_path / "job").mkdir()
    shutil.copy(sweeps.TINY, job)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    port, dashboard, agent, environments = free_ports(4)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))  # has the compiled scan
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # has no token for Ray
    monkeypatch.setenv(jobs.FINAL, "1")  # as in rayjob.yaml's head, and the next
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    folder = Path(f"/tmp/ray-test-{port}")
    command = [
        str(installed), *RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--object-store-memory=200000000",
        f"--runtime-env-agent-port={environments}",  # as in pipelines/cluster.py
    ]  # fmt: skip
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=job, stdout=log, stderr=log, start_new_session=True)
    url, deadline = f"http://127.0.0.1:{dashboard}", time.monotonic() + 90
    try:
        while True:
            try:
                JobSubmissionClient(url).submit_job(entrypoint="true")  # refused until the node's agent has started, too
                break
            except (ConnectionError, RuntimeError):
                assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
                time.sleep(0.3)
        yield Head(url, folder, installed, job)
    finally:
        sweeps.kill_all(process)


def entry(head: Head, store: Store, *settings: str) -> list[str]:
    overrides = [word for setting in (f"storage.root={store.given}", *settings, *store.settings) for word in ("--set", setting)]
    return [str(head.python), "-m", "dis_scale.sweep", "tiny.yaml", *overrides]


def submit(head: Head, name: str, store: Store, *settings: str) -> subprocess.CompletedProcess[str]:
    """Run `ray job submit` as docs/cluster.md shows it."""
    command = [str(head.python), *RAY, "job", "submit", "--address", head.url, "--working-dir", "."]
    command += ["--submission-id", name, "--", *entry(head, store, *settings)]
    return subprocess.run(command, cwd=head.job, env=os.environ.copy(), capture_output=True, text=True, timeout=800)


@pytest.mark.timeout(1500)
def test_submitted_stopped_and_submitted_again(head: Head, store: Store, tmp_path: Path) -> None:
    """`ray job stop` on the sweep stops its stages; a rerun makes the rest, and MLflow has everything once."""
    client, sweep = JobSubmissionClient(head.url), store.sweep
    run, search = sweep.run(store.model), secrets.Search(SECRETS | store_secrets())
    client.submit_job(entrypoint=shlex.join(entry(head, store)), submission_id="first", runtime_env={"working_dir": str(head.job)})
    deadline = time.monotonic() + 800
    while len(run.resume.list()) < 2:
        assert time.monotonic() < deadline, client.get_job_logs("first")
        assert client.get_job_status("first") not in jobs.ENDED, client.get_job_logs("first")
        time.sleep(0.2)
    search.processes()
    client.stop_job("first")
    wait_until(lambda: ENDED in scrape_all(head.folder), 100)  # for some 20 s, for Prometheus: it was no accident
    while not all(job.status in jobs.ENDED for job in client.list_jobs()):
        assert time.monotonic() < deadline, client.list_jobs()
        time.sleep(0.2)
    assert client.get_job_status("first") == "STOPPED"
    assert state.resumable_images(run) > 0
    assert state.published_counts(run) == [0]
    done = submit(head, "second", store)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ENDED in scrape_all(head.folder), "at once: Ray has forgotten it in 20 s"
    sweeps.assert_complete(store.root, *store.settings)
    sweeps.assert_mlflow_has_everything(store.root, *store.settings)
    printed = done.stdout
    assert printed.index("plan of tiny") < printed.index("Ray job")
    assert f"page     {store.root}/sweeps/tiny/report/index.html" in printed
    assert " INFO sdk.py" not in printed
    search.search("printed", (printed + done.stderr).encode())
    for folder in (head.logs, tmp_path):
        search.folder(folder)
    search.store(sweep.folder)
    search.assert_none()


def store_secrets() -> dict[str, str]:
    """Return the object store's keys, which the environment has."""
    return {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if name in os.environ}


@pytest.mark.faults  # tests/pipelines/test_jobs.py has it in `make test`, without Ray
def test_a_refused_sweep_is_a_stopped_job(head: Head, store: Store) -> None:
    """KubeRay tries again what has failed; so does the Job of raycluster-4x8.yaml, which then is not complete."""
    store.sweep.save_recipe()
    refused = submit_as_kubernetes(head, shlex.join(entry(head, store, "seed=1")), "a")
    assert "seed: stored 0, given 1" in refused.stdout + refused.stderr
    assert refused.returncode == 0
    assert {job.status for job in JobSubmissionClient(head.url).list_jobs()} == {"SUCCEEDED", "STOPPED"}
    assert submit_as_kubernetes(head, "false", "a").returncode == 0, "that of the same Job was stopped"
    assert submit_as_kubernetes(head, "false", "b").returncode == 1


def submit_as_kubernetes(head: Head, command: str, uid: str) -> subprocess.CompletedProcess[str]:
    """Run the Job of cluster/raycluster-4x8.yaml with another command, on the head instead of its service."""
    (job,) = [each["spec"] for each in pods.documents(pods.JOBS[1]) if each["kind"] == "Job"]
    (container,) = job["template"]["spec"]["containers"]
    shell, flag, script, _ = container["command"]
    script = re.sub(r"RAY_API_SERVER_ADDRESS=\S+", f"RAY_API_SERVER_ADDRESS={head.url}", script)
    script = script.replace("ray job", shlex.join([str(head.python), *RAY, "job"]))
    script = script.replace(" --no-wait ", " --no-wait --working-dir . ")
    return subprocess.run(
        [shell, flag, script, command], cwd=head.job, env=os.environ | {"JOB_UID": uid}, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
