"""The command as a user runs it, in its own process, and its results in storage."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dis_scale.recipe import reading
from dis_scale.storage.folder import open_folder
from dis_scale.storage.manifest import read_verified
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.documents import LatentsManifest, TrackingIds
from dis_scale.tracking.mlflow import open_client
from dis_scale.weights.published import load_published
from ops.drills.processes import kill_all as kill_all

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/support/tiny.yaml"
TIMEOUT_S = 900
"""A sweep takes 400 s beside 18 other processes on two slow cores. Only one that hangs takes longer than this."""
SLOW = ("train.publish_images=[0, 160, 3200]", "train.resume_every_images=160")
"""Training that takes seconds, so that a test can interrupt it."""


def command(root: str, *settings: str) -> list[str]:
    overrides = [word for setting in (f"storage.root={root}", *settings) for word in ("--set", setting)]
    return [sys.executable, "-m", "dis_scale.sweep", str(TINY), *overrides]


def run(root: str, *settings: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the sweep to its end."""
    return subprocess.run(
        command(root, *settings), cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def start(root: str, *settings: str, log: Path, options: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """Start the sweep in the background, in its own process group, so that a test can kill it with all its children."""
    with log.open("wb") as out:
        return subprocess.Popen([*command(root, *settings), *options], cwd=ROOT, stdout=out, stderr=out, start_new_session=True)


def wait_until(true: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert process.poll() is None, f"the sweep ended too early:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"it did not come:\n{log.read_text()}"
        time.sleep(0.05)


def sweep_at(root: str | Path, *settings: str) -> Sweep:
    """Return the tiny sweep below a storage root, with these settings."""
    return Sweep.below(open_folder(root), reading.load(TINY, [f"storage.root={root}", *settings]))


def times(root: str) -> dict[str, float]:
    """Return the modification times of everything that is made once, by name (on disk)."""
    base = Path(root)
    patterns = (
        "latents/*/*.tar",
        "sweeps/tiny/runs/*/published/*/*",
        "sweeps/tiny/evaluation/*/*/metrics.json",
        "sweeps/tiny/vae/*",
    )
    return {str(path.relative_to(base)): path.stat().st_mtime for pattern in patterns for path in base.glob(pattern)}


def assert_complete(root: str, *settings: str) -> None:
    """Assert that every shard, published folder and evaluation exists once and agrees with its manifest."""
    sweep = sweep_at(root, *settings)
    recipe = sweep.recipe
    counts = list(recipe.train.publish_images)
    for model in recipe.models:
        assert state.published_counts(sweep.run(model)) == counts
        for images in counts:
            load_published(sweep.run(model), images)
        measured = state.evaluated(sweep, model)
        assert sorted(measured) == counts
        assert all(metrics.values[recipe.evaluate.metric] > 0 for metrics in measured.values())
    (name,) = (open_folder(root) / "latents").list()
    latents = open_folder(root) / "latents" / name
    manifest = LatentsManifest.require(latents)
    assert manifest.count == 1797
    for shard in manifest.shards:
        read_verified(latents, shard.name, shard.digest)
    assert {"index.html", "gflops_fid.csv", "gflops_fid.png", "gflops_fid.svg"} <= set(sweep.report.list())


def assert_mlflow_has_everything(root: str, *settings: str) -> None:
    """Assert that MLflow has parameters, each row once, each metric, each grid and the report."""
    sweep = sweep_at(root, *settings)
    ids = TrackingIds.read(sweep.folder)
    client, counts = open_client(ids.uri), list(sweep.recipe.train.publish_images)
    folders = ["samples", *(f"samples/{name}" for name in sweep.recipe.evaluate.variants)]
    assert set(ids.models) == set(sweep.recipe.models)
    for run_id in ids.models.values():
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert {"gmacs_forward", "parameters", "tokens", "global_batch", "seed"} <= run.data.params.keys()
        losses = client.get_metric_history(run_id, "loss")
        assert sorted(m.step for m in losses) == list(range(160, counts[-1] + 1, 160)), "each row once, whatever was stopped"
        distances = client.get_metric_history(run_id, sweep.recipe.evaluate.metric)
        assert sorted(m.step for m in distances) == counts
        grids = [a.path for folder in folders for a in client.list_artifacts(run_id, folder)]
        assert len([path for path in grids if path.endswith(".png")]) == len(folders) * len(counts)
    stored = [f"report/{name}" for name in sweep.report.list()]
    assert [a.path for a in client.list_artifacts(ids.sweep, "report")] == stored
