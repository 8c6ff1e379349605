"""Every fault in training ends with one question: is what the run leaves bit-equal to the undisturbed one's, and made once?"""

import re
from pathlib import Path
from typing import Any

import pytest

from dis_scale import recipe as recipes
from dis_scale.recipe import Recipe
from tests.conftest import TINY
from tests.faults import table


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return recipes.load(TINY, ["train.keep_resume=3"])


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> dict[str, Any]:
    """What the undisturbed run leaves."""
    root = tmp_path_factory.mktemp("calm")
    assert table.train_through(recipe, root, "") == []
    return table.made(root, recipe)


FAULTS = {
    "rank 0 killed": ("kill at step rank=0 images=112", "SIGKILL|gloo|closed"),
    "rank 1 killed": ("kill at step rank=1 images=112", "SIGKILL|gloo|closed"),
    "both killed, one after the other": ("kill at step rank=1 images=48\nkill at step rank=0 images=256", "SIGKILL"),
    "killed in a save after a file": ("kill at written path=resume/ rank=1 nth=9", "SIGKILL"),
    "killed before the manifest of a save": ("kill at write path=resume/000000000160 rank=0 nth=7", "SIGKILL"),
    "killed in publishing": ("kill at written path=published/000000000160 rank=0 nth=2", "SIGKILL"),
    "stopped in a save after a file": ("stop at written path=resume/ rank=1 nth=9", None),
    "stopped, then killed in the last save": (
        "stop at step rank=0 images=112\nkill at written path=resume/000000000144 rank=1 nth=2",
        "SIGKILL",
    ),
    "a byte of the newest resume point flips": (
        "flip at written path=resume/000000000160 rank=1 nth=3\nkill at step rank=0 images=208",
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
    "the clock jumps on a day": ("jump at step rank=0 images=96 seconds=86400", None),
}
FEW = ("killed before the manifest of a save", "stopped in a save after a file", "storage fails three times")
"""In `make test`; the others are in `make faults`."""


def rows() -> list[Any]:
    return [pytest.param(*FAULTS[name], id=name, marks=[] if name in FEW else [pytest.mark.faults]) for name in FAULTS]


@pytest.mark.parametrize(("faults", "ends"), rows())
def test_training_ends_as_undisturbed(
    tmp_path: Path, recipe: Recipe, calm: dict[str, Any], faults: str, ends: str | None
) -> None:
    ended = table.train_through(recipe, tmp_path, faults)
    assert table.left(tmp_path) == []
    assert bool(ended) == (ends is not None), ended
    assert all(re.search(ends or "", words) for words in ended), ended
    assert table.made(tmp_path, recipe) == calm
