"""Every fault in prepare, precompute and evaluate: is everything bit-equal to the undisturbed run, and made once?"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dis_scale import models
from dis_scale.recipe import LatentShape, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from tests.conftest import TINY
from tests.support import fault_plans, stages
from tests.support.documents import put_published
from tests.support.events import events

SMALL = [
    f"models={stages.ONE_MODEL}", "train.publish_images=[0, 160]",
    "train.power_ema=null", "evaluate.variants={}", "evaluate.extractor.steps=4",
]  # fmt: skip
STAGES = ("prepare", "precompute", "evaluate")


def sweep_of(root: Path) -> Sweep:
    return Sweep.below(open_folder(root) / "store", reading.load(TINY, SMALL))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the undisturbed sweep as it was before a stage; `end` is after the last stage."""
    base = tmp_path_factory.mktemp("undisturbed")
    plan, now, recipe = base / "faults", base / "now", reading.load(TINY, SMALL)
    plan.write_text("")
    sweep_of(now).save_recipe()
    torch.manual_seed(0)
    for images in recipe.train.publish_images:
        model = models.build(recipe.models["dit"], LatentShape(4, 8), 10, seed=images)
        weights = {name: torch.randn_like(p) * 0.1 for name, p in model.named_parameters()}
        put_published(sweep_of(now).run("dit").published_at(images), safetensors.torch.save(weights), images=images)
    for stage in STAGES:
        shutil.copytree(now, base / stage)
        code, output = stages.run(stage, sweep_of(now), plan)
        assert code == 0, output
    now.rename(base / "end")
    return lambda stage: base / stage


def through(stage: str, root: Path, plan: str) -> tuple[list[int], str]:
    """Rerun the stage until it ends well; return exit codes and output. What was final before is not written again."""
    (root / "faults").write_text(plan)
    codes, words, before = list[int](), "", dict[str, int]()
    while 0 not in codes and len(codes) < 4:
        code, output = stages.run(stage, sweep_of(root), root / "faults")
        codes, words, now = [*codes, code], words + output, stages.finished(root / "store")
        again = [name for name in before if now[name] != before[name]]
        assert not again or "flip" in plan, again
        before = now
    return codes, words


def expected(undisturbed: Callable[[str], Path], stage: str) -> dict[str, Any]:
    after = dict(zip(STAGES, [*STAGES[1:], "end"], strict=True))[stage]
    return stages.made(undisturbed(after) / "store")


KILLED, STOPPED, FAILED = [-9, 0], [75, 0], [1, 0]
FULL = "no space left on the device: free some, then run the same command again"
FAULTS: dict[str, tuple[str, str, list[int], str]] = {
    "prepare: killed in the autoencoder's files": ("prepare", "kill at written path=vae/", KILLED, ""),
    "prepare: killed before a classifier's manifest": (
        "prepare", "kill at create path=extractors/digits/manifest", KILLED, "",
    ),
    "prepare: killed before the reference": ("prepare", "kill at write path=reference/", KILLED, ""),
    "prepare: stop request": ("prepare", "stop at written path=vae/manifest", STOPPED, "stopped as requested"),
    "prepare: storage fails three times": ("prepare", "fail at write path=extractors/ times=3", [0], ""),
    "prepare: storage gone for 20 s": ("prepare", "gone at write path=reference/ seconds=20", [0], ""),
    "prepare: disk full": ("prepare", "full at write path=vae/", FAILED, FULL),
    "prepare: the clock jumps back an hour": ("prepare", "jump at written path=vae/ seconds=-3600", [0], ""),
    "precompute: killed between tar and sidecar": ("precompute", "kill at written path=000001.tar", KILLED, ""),
    "precompute: the driver dies before the manifest": (
        "precompute", "kill at write path=manifest.json", KILLED, "",
    ),
    "precompute: stop request": ("precompute", "stop at written path=000001.tar", STOPPED, "stopped as requested"),
    "precompute: storage fails three times": ("precompute", "fail at write path=.tar times=3", [0], ""),
    "precompute: storage gone for 20 s": ("precompute", "gone at write path=000001.tar seconds=20", [0], ""),
    "precompute: disk full": ("precompute", "full at write path=000002.tar", FAILED, FULL),
    "precompute: a byte of a sidecar flips, then a kill": (
        "precompute", "flip at written path=000000.json\nkill at written path=000002.tar", KILLED, "",
    ),
    "precompute: the clock jumps on a day, then a kill": (
        "precompute", "jump at written path=000000.tar seconds=86400\nkill at written path=000001.tar", KILLED, "",
    ),
    "evaluate: killed between two blocks": ("evaluate", "kill at written path=block-00000.npz nth=2", KILLED, ""),
    "evaluate: the driver dies before the metrics": ("evaluate", "kill at write path=metrics.json", KILLED, ""),
    "evaluate: stop request": ("evaluate", "stop at written path=block-00000.npz", STOPPED, "stopped as requested"),
    "evaluate: storage fails three times": ("evaluate", "fail at write path=block-00001.npz times=3", [0], ""),
    "evaluate: storage gone for 20 s": ("evaluate", "gone at read path=block-00001.npz seconds=20", [0], ""),
    "evaluate: disk full": ("evaluate", "full at write path=block-00001.npz", FAILED, FULL),
    "evaluate: a byte of a block of features flips, then a kill": (
        "evaluate", "flip at written path=block-00000.npz\nkill at written path=block-00001.npz", KILLED,
        "made again: .*block-00000.npz: damaged",
    ),
    "evaluate: the clock jumps back an hour": ("evaluate", "jump at written path=block-00001.npz seconds=-3600", [0], ""),
}  # fmt: skip
FEW = (
    "prepare: killed before a classifier's manifest",
    "precompute: a byte of a sidecar flips, then a kill",
    "evaluate: a byte of a block of features flips, then a kill",
)
"""Run by `make test`; the others by `make faults`."""


def rows() -> list[Any]:
    return [pytest.param(*row, id=name, marks=[] if name in FEW else [pytest.mark.faults]) for name, row in FAULTS.items()]


@pytest.mark.parametrize(("stage", "plan", "codes", "line"), rows())
def test_the_stage_ends_as_undisturbed(
    tmp_path: Path, undisturbed: Callable[[str], Path], stage: str, plan: str, codes: list[int], line: str
) -> None:
    shutil.copytree(undisturbed(stage), tmp_path / "root")
    ended, output = through(stage, tmp_path / "root", plan)
    assert fault_plans.left(tmp_path / "root") == [], output
    assert ended == codes, output
    assert re.search(line, output), output
    assert stages.made(tmp_path / "root/store") == expected(undisturbed, stage)


def test_a_flipped_byte_of_a_published_file_is_named_and_the_others_are_evaluated(
    tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    """After the file is restored, as from a copy, a rerun ends as undisturbed."""
    root = tmp_path / "root"
    shutil.copytree(undisturbed("evaluate"), root)
    weights = root / "store/sweeps/tiny/runs/dit/published/000000000000/weights-0001.safetensors"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    _, output = through("evaluate", root, "")
    assert [(event["model"], event["images"]) for event in events(output, "skip")] == [("dit", 0)]
    assert f"{weights}: damaged: its sha256 differs from the manifest's" in output
    wanted, made = expected(undisturbed, "evaluate"), stages.made(root / "store")
    at_160 = [name for name in wanted if "evaluation/dit/000000000160" in name]
    assert at_160
    assert {name: made[name] for name in at_160} == {name: wanted[name] for name in at_160}
    weights.write_bytes(intact)
    assert through("evaluate", root, "")[0] == [0]
    assert stages.made(root / "store") == wanted
