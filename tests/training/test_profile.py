"""`dis-scale profile`: a few steps on this machine; the sweep keeps nothing of them."""

import json
import subprocess
import sys
from pathlib import Path

from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep, state
from dis_scale.training.profile import one_share
from tests.conftest import TINY
from tests.support.commands import invoke
from tests.support.ranks import make_latents


def made(root: Path, recipe: Recipe) -> Sweep:
    """A sweep with latents, before training."""
    sweep = Sweep.below(open_folder(root), recipe)
    sweep.save_recipe()
    state.use_latents(sweep, make_latents(open_folder(root) / "latents/some", recipe), "v")
    return sweep


def test_steps_are_timed_and_traced_and_nothing_is_kept(tmp_path: Path) -> None:
    sweep = made(tmp_path, reading.load(TINY, ["data.held_out_images=0"]))
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "dis_scale", "profile", str(sweep), "dis", "--steps", "3"]
    trace = tmp_path / "trace.json"
    done = subprocess.run([*command, "--trace", str(trace)], check=True, capture_output=True, text=True)
    assert "dis: one worker's share of a step, 2 lanes of 4 images, on cpu" in done.stdout
    (speed,) = [line for line in done.stdout.splitlines() if line.startswith("speed ")]
    assert all(unit in speed for unit in ("images/s", "tokens/s", "MFU", "TFLOP/s (the fastest product", "GiB per worker"))
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names
    assert "Self CPU time total" in done.stdout  # which operators come first depends on the machine
    assert sorted(tmp_path.rglob("*")) == sorted([*before, trace])


def test_what_cannot_be_profiled_is_refused(tmp_path: Path) -> None:
    sweep = made(tmp_path, reading.load(TINY))
    assert invoke("profile", str(sweep), "dos") == (
        2,
        f"error: {sweep} has no model 'dos' (did you mean 'dis'?): it has dis, dit\n",
    )
    code, output = invoke("profile", str(sweep), "dis", "--steps", "39")
    assert (code, "39 steps, and the training of dis has 38 beside the first 2: time fewer" in output) == (2, True), output
    code, output = invoke("profile", str(sweep), "dis", "--trace", str(tmp_path / "none/trace.json"))
    assert (code, "--trace" in output, "there is no folder" in output) == (2, True, True)


def test_a_share_is_one_workers_part_in_micro_batches_of_the_same_size(tiny: Recipe) -> None:
    share, whole = one_share(tiny, "dis").train, tiny.train
    assert (share.batch_images, share.lanes, share.most_workers) == (whole.batch_images // 2, whole.lanes // 2, 1)
    assert share.lane_images == whole.lane_images
