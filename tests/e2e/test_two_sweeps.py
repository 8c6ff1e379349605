"""Two sweeps of one name at once, with all state in a real object store: the second joins or is refused; never do both write."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dis_scale.sweep import state
from tests.support import sweeps
from tests.support.clusters import RayNodes, driver
from tests.support.stages import ONE_MODEL

LONG = (f"models={ONE_MODEL}", "train.publish_images=[0, 160, 16000]", "train.resume_every_images=160")
REFUSED = 69


def start(
    root: str, log: Path, *settings: str, address: str = "", options: tuple[str, ...] = (), monkeypatch: pytest.MonkeyPatch
) -> subprocess.Popen[bytes]:
    with monkeypatch.context() as patch:
        if address:
            patch.setenv("RAY_ADDRESS", address)
        return sweeps.start(root, f"tracking.uri=sqlite:///{log.parent}/mlflow.db", *settings, log=log, options=options)


@pytest.mark.faults
def test_a_sweep_in_an_object_store_ends_and_a_second_on_another_cluster_is_refused_before_it_writes(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labelled images to the curve, sharded by ZeRO 3 in bf16, with all state in the store."""
    settings = ("train.zero_stage=3", "train.precision=bf16")
    root, logs = f"{bucket}/prefix", (tmp_path / "a", tmp_path / "b")
    sweep = sweeps.sweep_at(root, *settings)
    first = start(root, logs[0], *settings, monkeypatch=monkeypatch)
    sweeps.wait_until(lambda: bool(sweep.lease("prepare").list()), first, logs[0])
    before = {name: sweep.folder.read(name) for name in ("recipe.yaml", "tracking.json", "ray.json")}
    second = start(root, logs[1], *settings, "grace_s=20", monkeypatch=monkeypatch)
    assert second.wait(120) == REFUSED, logs[1].read_text()
    words = " ".join(logs[1].read_text().split())
    assert f"error: {sweep}/leases/sweep: held by process {first.pid} on" in words
    assert {name: sweep.folder.read(name) for name in before} == before
    assert first.wait(sweeps.TIMEOUT_S) == 0, logs[0].read_text()
    sweeps.assert_complete(root, *settings)


@pytest.fixture
def nodes(ceph: Any) -> Iterator[RayNodes]:
    """A cluster whose nodes reach the object store."""
    made = RayNodes(cpus=2)
    yield made
    made.stop()


@pytest.mark.faults
def test_on_one_cluster_it_joins_and_jobs_that_outlive_their_sweep_keep_others_out(
    bucket: str, nodes: RayNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"{bucket}/prefix"
    sweep = sweeps.sweep_at(root, *LONG)
    first = start(root, tmp_path / "first", *LONG, address=nodes.address, monkeypatch=monkeypatch)
    sweeps.wait_until(lambda: len(sweep.run("dit").resume.list()) > 1, first, tmp_path / "first")
    first.kill()
    first.wait()
    drivers = [driver(sweep, stage) for stage in ("train", "evaluate")]
    for each in drivers:  # their jobs last until all others have come
        each.suspend()
    elsewhere = start(root, tmp_path / "elsewhere", *LONG, options=("--here",), monkeypatch=monkeypatch)
    assert elsewhere.wait(sweeps.TIMEOUT_S) == REFUSED, (tmp_path / "elsewhere").read_text()
    assert "/leases/evaluate: held by process" in " ".join((tmp_path / "elsewhere").read_text().split())
    assert state.ended(sweep, "dit") is None

    logs = [tmp_path / "second", tmp_path / "third"]
    both = [start(root, log, *LONG, address=nodes.address, monkeypatch=monkeypatch) for log in logs]
    for sweep_process, log in zip(both, logs, strict=True):
        sweeps.wait_until(lambda log=log: "evaluate: Ray job" in log.read_text(), sweep_process, log)  # type: ignore[misc]
    for each in drivers:
        each.resume()
    assert [each.wait(sweeps.TIMEOUT_S) for each in both] == [0, 0], [log.read_text() for log in logs]
    texts = [log.read_text() for log in logs]
    assert sum("which runs this sweep on the same Ray" in text for text in texts) == 1
    assert all("(running already: joined)" in text for text in texts)
    sweeps.assert_complete(root, *LONG)
    assert [name for name in sweep.run("dit").lease.list() if name.isdigit()] == ["0001"]
