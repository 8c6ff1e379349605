"""From a folder of images to a sweep, as a new user does it: `init`, then `sweep` of the recipe that it wrote."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dis_scale.recipe import reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep, state
from tests.support.sweeps import ROOT, TIMEOUT_S

SHORT = (
    "train.publish_images=[64]", "evaluate.extractor={kind: trained, name: photos, steps: 10}", "evaluate.samples=80",
    "evaluate.steps=1", "evaluate.block_images=40", "vae.steps=10",
)  # fmt: skip
"""Settings of a sweep that ends within a minute."""


def dis_scale(*words: str) -> str:
    """Run the command; return what it printed."""
    done = subprocess.run([sys.executable, "-m", "dis_scale", *words], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow  # tests/e2e/test_cluster.py has the command, tests/planning/test_first_recipe.py what init writes
def test_a_folder_of_images_becomes_a_finished_sweep(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0)
    for i in range(90):
        path = tmp_path / "photos" / ("cat" if i % 3 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(path)
    (tmp_path / "photos" / "cat" / "broken.jpg").write_bytes(b"")
    recipe = tmp_path / "photos.yaml"
    dis_scale("init", str(tmp_path / "photos"), "--out", str(recipe))
    settings = (*SHORT, f"storage.root={tmp_path}/outputs")
    overrides = [word for setting in settings for word in ("--set", setting)]
    printed = dis_scale("sweep", str(recipe), *overrides)
    assert "source   91 images in 2 classes" in printed
    sweep = Sweep.below(open_folder(tmp_path / "outputs"), reading.load(recipe, list(settings)))
    assert state.all_evaluated(sweep)
