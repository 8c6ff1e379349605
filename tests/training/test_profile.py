"""`dis-scale train`: a few steps on this machine, of which the sweep keeps nothing."""

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from dis_scale.cli import app
from dis_scale.data import shards
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.training.profile import one_share
from tests.conftest import TINY
from tests.support.ranks import make_latents


def made(root: Path, recipe: Recipe) -> Folder:
    """A sweep with latents, before training."""
    sweep = open_folder(root) / "sweeps/tiny"
    sweep.write(reading.FILE, reading.dump(recipe).encode())
    shards.point_to(sweep, make_latents(open_folder(root) / "latents/some", recipe), "v")
    return sweep


def test_steps_are_taken_timed_and_traced_and_nothing_is_kept(tmp_path: Path) -> None:
    sweep = made(tmp_path, reading.load(TINY, ["data.held_out_images=0"]))
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "dis_scale.cli", "train", str(sweep), "dis", "--steps", "3"]
    trace = tmp_path / "trace.json"
    done = subprocess.run([*command, "--profile", str(trace)], check=True, capture_output=True, text=True)
    assert "dis: one worker's share of a step, 2 x 4 images, on cpu" in done.stdout
    (speed,) = [line for line in done.stdout.splitlines() if line.startswith("speed ")]
    assert all(unit in speed for unit in ("images/s", "tokens/s", "MFU", "TFLOP/s (the best product", "GiB a worker"))
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names
    assert "aten::mm" in done.stdout
    assert sorted(tmp_path.rglob("*")) == sorted([*before, trace])


def test_what_cannot_be_tried_is_said(tmp_path: Path) -> None:
    sweep = made(tmp_path, reading.load(TINY))
    run = CliRunner().invoke(app, ["train", str(sweep), "dos"])
    assert (run.exit_code, run.stderr) == (
        2,
        f"error: no model 'dos' in {sweep} (did you mean 'dis'?); it has dis, dit\n",
    )
    run = CliRunner().invoke(app, ["train", str(sweep), "dis", "--profile", str(tmp_path / "none/trace.json")])
    assert run.exit_code == 2
    assert "--profile" in run.stderr
    assert "there is no folder" in run.stderr


def test_a_share_is_one_workers_part_in_micro_batches_of_the_same_size(tiny: Recipe) -> None:
    share, whole = one_share(tiny).train, tiny.train
    assert (share.batch_images, share.lanes, share.most_workers) == (whole.batch_images // 2, whole.lanes // 2, 1)
    assert share.micro_images == whole.micro_images
