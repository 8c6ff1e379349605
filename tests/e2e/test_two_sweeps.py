"""Two sweeps of one name at once, with all state in a real object store: the second joins or is refused, and never both write."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dis_scale.evaluation import results
from dis_scale.storage.folder import Folder
from tests.support import sweeps
from tests.support.clusters import Rays, driver

ONE_MODEL = "models={dit: {kind: dit, width: 16, depth: 1, heads: 2, patch: 4}}"
LONG = (ONE_MODEL, "train.publish_images=[0, 160, 16000]", "train.resume_every_images=160")
REFUSED = 69


def start(
    root: str, log: Path, *settings: str, address: str = "", monkeypatch: pytest.MonkeyPatch
) -> subprocess.Popen[bytes]:
    with monkeypatch.context() as patch:
        if address:
            patch.setenv("RAY_ADDRESS", address)
        return sweeps.start(root, f"tracking.uri=sqlite:///{log.parent}/mlflow.db", *settings, log=log)


def training(sweep: Folder) -> bool:
    return len((sweep / "runs/dit/resume").list()) > 1


def test_on_two_clusters_the_second_is_refused_before_it_writes(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, sweep, logs = f"{bucket}/prefix", sweeps.sweep_folder(f"{bucket}/prefix"), (tmp_path / "a", tmp_path / "b")
    first = start(root, logs[0], *LONG, monkeypatch=monkeypatch)
    sweeps.wait_until(lambda: bool((sweep / "leases/prepare").list()), first, logs[0])
    before = {name: sweep.read(name) for name in ("recipe.yaml", "tracking.json", "ray.json")}
    second = start(root, logs[1], *LONG, "grace_s=20", monkeypatch=monkeypatch)
    assert second.wait(120) == REFUSED, logs[1].read_text()
    said = " ".join(logs[1].read_text().split())
    assert f"error: {sweep}/leases/sweep: held by process {first.pid} on" in said
    assert {name: sweep.read(name) for name in before} == before
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 75, logs[0].read_text()


@pytest.fixture
def rays(ceph: Any) -> Iterator[Rays]:
    """A cluster whose nodes know the object store."""
    made = Rays(cpus=2)
    yield made
    made.stop()


@pytest.mark.faults
def test_on_one_cluster_it_joins_and_jobs_that_outlive_their_sweep_keep_others_out(
    bucket: str, rays: Rays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, sweep = f"{bucket}/prefix", sweeps.sweep_folder(f"{bucket}/prefix")
    first = start(root, tmp_path / "first", *LONG, address=rays.address, monkeypatch=monkeypatch)
    sweeps.wait_until(lambda: training(sweep), first, tmp_path / "first")
    first.kill()
    first.wait()
    drivers = [driver(sweep, stage) for stage in ("train", "evaluate")]
    for each in drivers:  # their jobs last until all others have come
        each.suspend()
    elsewhere = start(root, tmp_path / "elsewhere", *LONG, monkeypatch=monkeypatch)
    assert elsewhere.wait(120) == REFUSED, (tmp_path / "elsewhere").read_text()
    assert "/leases/evaluate: held by process" in " ".join((tmp_path / "elsewhere").read_text().split())
    assert results.ended(sweep, "dit") is None

    logs = [tmp_path / "second", tmp_path / "third"]
    both = [start(root, log, *LONG, address=rays.address, monkeypatch=monkeypatch) for log in logs]
    for sweep_process, log in zip(both, logs, strict=True):
        sweeps.wait_until(lambda log=log: "evaluate: Ray job" in log.read_text(), sweep_process, log)
    for each in drivers:
        each.resume()
    assert [each.wait(sweeps.TIMEOUT_S) for each in both] == [0, 0], [log.read_text() for log in logs]
    words = [log.read_text() for log in logs]
    assert sum("which runs this sweep on the same Ray" in said for said in words) == 1
    assert all("(running already: joined)" in said for said in words)
    sweeps.assert_whole(root, *LONG)
    assert [name for name in (sweep / "runs/dit/lease").list() if name.isdigit()] == ["0001"]
