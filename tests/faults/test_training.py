"""Faults in training: is the result bit-equal to the undisturbed run's, and is each thing made once?"""

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch.multiprocessing.spawn import ProcessRaisedException

from dis_scale.process import faults
from dis_scale.process.errors import UserError
from dis_scale.recipe import Recipe, reading
from dis_scale.sweep import PointName
from dis_scale.sweep.documents import BadStep, BadStepManifest
from tests.conftest import TINY
from tests.support import fault_plans, ranks


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return reading.load(TINY, ["train.keep_resume=3"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> dict[str, Any]:
    """Results of the undisturbed run."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert fault_plans.train_through(recipe, root, "") == []
    return fault_plans.made(root, recipe)


FAULTS = {
    "rank 0 killed": ("kill at step rank=0 images=112", "SIGKILL|gloo|closed"),
    "rank 1 killed": ("kill at step rank=1 images=112", "SIGKILL|gloo|closed"),
    "both killed, one after the other": ("kill at step rank=1 images=48\nkill at step rank=0 images=256", "SIGKILL"),
    "killed in a save after a file": ("kill at written path=resume/000000000080-0001/exp_avg-00001", "SIGKILL"),
    "killed before the manifest of a save": ("kill at write path=resume/000000000160-0001/manifest.json", "SIGKILL"),
    "killed in publishing": ("kill at written path=published/000000000160/power-0.050", "SIGKILL"),
    "stopped in a save after a file": ("stop at written path=resume/000000000080-0001/exp_avg-00001", None),
    "stopped, then killed in the last save": (
        "stop at step rank=0 images=112\nkill at written path=resume/000000000144-0001/exp_avg-00001",
        "SIGKILL",
    ),
    "a byte of the newest resume point flips": (
        "flip at written path=resume/000000000160-0001/exp_avg_sq-00001\nkill at step rank=0 images=208",
        "SIGKILL",
    ),
    "storage fails three times": ("fail at write path=.safetensors times=3", None),
    "storage is gone for 20 s": ("gone at write rank=0 path=resume/000000000160 seconds=20", "storage is away"),
    "disk full": ("full at write path=resume/000000000080 rank=1", "no space left on the device"),
    "disk full while publishing": ("full at write path=published/000000000160", "no space left on the device"),
    "the clock jumps back an hour, then a kill": (
        "jump at step images=96 seconds=-3600 times=2\nkill at step rank=1 images=208",
        "SIGKILL",
    ),
    "the clock jumps forward a day": ("jump at step rank=0 images=96 seconds=86400", None),
}
FEW = ("killed before the manifest of a save",)
"""Run by `make test`; the others by `make faults`. tests/training/test_loop.py stops runs in `make test`."""


def rows() -> list[Any]:
    return [pytest.param(*FAULTS[name], id=name, marks=[] if name in FEW else [pytest.mark.faults]) for name in FAULTS]


@pytest.mark.parametrize(("plan", "ends"), rows())
def test_training_ends_as_undisturbed(
    tmp_path: Path, recipe: Recipe, undisturbed: dict[str, Any], plan: str, ends: str | None
) -> None:
    ended = fault_plans.train_through(recipe, tmp_path, plan)
    assert fault_plans.left(tmp_path) == []
    assert bool(ended) == (ends is not None), ended
    assert all(re.search(ends or "", words) for words in ended), ended
    assert fault_plans.made(tmp_path, recipe) == undisturbed


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path, recipe: Recipe) -> None:
    assert fault_plans.train_through(recipe, tmp_path, "nan at loss rank=1 images=112") == []
    made = fault_plans.made(tmp_path, recipe)
    images, adam_steps, _ = made["state"]
    assert (images, adam_steps) == (320, 19)
    assert [row for row in made["rows"] if row[0] == "skipped"] == [("skipped", 160, 1.0), ("skipped", 320, 1.0)]


def test_too_many_in_a_row_stop_the_run_and_are_dumped(tmp_path: Path) -> None:
    recipe = reading.load(TINY, ["train.skips_in_a_row=3"])
    (tmp_path / "faults").write_text("nan at loss rank=1 images=112 times=6")
    with pytest.raises(ProcessRaisedException, match="not finite in 3 steps in a row, up to 160 images: the last step's"):
        ranks.run(recipe, fault_plans.MODEL, tmp_path, 1, faults=tmp_path / "faults")
    dump = fault_plans.run_of(tmp_path, recipe).bad_step(PointName(160, 1))
    contents = BadStepManifest.require(dump)
    assert len(contents.files) == 6
    step = BadStep.read(dump, "step-00001.json")
    assert (len(step.loss_by_pass), step.weights_not_finite) == (2, ())
    batch = safetensors.torch.load(contents.read_file(dump, "batch-00001.safetensors"))
    assert batch["1/x_BCHW"].shape == (4, 4, 8, 8)


@pytest.mark.parametrize("line", ["kil at step", "kill step rank=1", "kill at step rnk=1", "kill at step rank=one", "kill at look"])
def test_an_invalid_fault_is_refused(line: str) -> None:
    with pytest.raises(UserError, match=f"fault {line!r}: "):
        faults.parse(line)
