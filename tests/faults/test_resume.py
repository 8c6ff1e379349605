"""Stop and continue: bit-equal at the same world size, with equal inputs at another; for each way to shard."""

from itertools import product
from pathlib import Path

import pytest

from dis_scale.recipe import Recipe, reading
from dis_scale.tracking.rows import RowReader
from tests.conftest import TINY
from tests.support import fault_plans, ranks

SHORT = ["models={dit: {kind: dit, width: 24, depth: 2, heads: 2, patch: 4}}", "train.publish_images=[0, 160]"]
"""Two blocks, so that checkpointing keeps only their inputs; sizes that do not divide evenly among ranks."""
MATRIX = list(product((1, 2, 3), ("fp32", "bf16"), (2, 4), ("none", "block")))
"""ZeRO stage, precision, lanes (two ranks accumulate one or two each) and activation checkpointing."""


def short(*settings: str) -> Recipe:
    return reading.load(TINY, [*SHORT, *settings])


@pytest.mark.faults
@pytest.mark.parametrize(("stage", "precision", "lanes", "checkpointing"), MATRIX)
def test_the_same_world_size_continues_bit_for_bit(
    tmp_path: Path, stage: int, precision: str, lanes: int, checkpointing: str
) -> None:
    """Weights, moments, averages and logged losses."""
    how = [f"train.zero_stage={stage}", f"train.precision={precision}", f"train.lanes={lanes}"]
    recipe = short(*how, f"train.checkpointing={checkpointing}")
    ranks.run(recipe, fault_plans.MODEL, tmp_path / "undisturbed", attempt=1)
    ranks.run(recipe, fault_plans.MODEL, tmp_path / "stopped", attempt=1, stop_at=48)
    assert not fault_plans.done(tmp_path / "stopped", recipe)
    ranks.run(recipe, fault_plans.MODEL, tmp_path / "stopped", attempt=2)
    assert fault_plans.made(tmp_path / "stopped", recipe) == fault_plans.made(tmp_path / "undisturbed", recipe)
    assert ranks.inputs(tmp_path / "stopped") == ranks.inputs(tmp_path / "undisturbed")


MOVES = {
    "1 -> 3 -> 2": (["train.workers=1"], ["train.workers=3"], ["train.workers=2", "train.micro_images=8"]),
    "1 -> 2 -> 1": (["train.workers=1"], ["train.workers=2"], ["train.workers=1"]),
    "2 -> 4": (["train.workers=2"], ["train.workers=4"]),
    "ZeRO 1 -> 3": (["train.zero_stage=1"], ["train.zero_stage=3"]),
    "two ranks of ZeRO 3 -> one of ZeRO 2": (["train.zero_stage=3"], ["train.zero_stage=2", "train.workers=1"]),
}


@pytest.mark.parametrize(
    "parts", [pytest.param(p, id=n, marks=[] if n == "1 -> 2 -> 1" else [pytest.mark.faults]) for n, p in MOVES.items()]
)
def test_another_world_size_gets_the_same_images_and_noise(tmp_path: Path, parts: tuple[list[str], ...]) -> None:
    """Each step's inputs are bit-equal. Losses agree to 1e-4, ten times the largest difference measured.

    Four lanes on three ranks are 1, 1 and 2; with micro_images two lanes share a forward pass. Float32 sums over ranks and lanes
    have another order: an error of 1e-7 per sum, which grows over the next steps with the learning rate (1e-3, the largest of our
    recipes).
    """
    ranks.run(short(*parts[0]), fault_plans.MODEL, tmp_path / "undisturbed", attempt=1)
    for attempt, settings in enumerate(parts, 1):
        last = attempt == len(parts)
        ranks.run(short(*settings), fault_plans.MODEL, tmp_path / "moved", attempt, None if last else 48 * attempt)
    assert fault_plans.done(tmp_path / "moved", short())
    assert ranks.inputs(tmp_path / "moved") == ranks.inputs(tmp_path / "undisturbed")
    assert len(ranks.inputs(tmp_path / "undisturbed")) == 160 // 16
    undisturbed, moved = losses(tmp_path / "undisturbed"), losses(tmp_path / "moved")
    assert moved.keys() == undisturbed.keys() == {160}
    assert moved[160] == pytest.approx(undisturbed[160], rel=1e-4)


def losses(root: Path) -> dict[int, float]:
    rows = RowReader(fault_plans.run_of(root, short()).log).new()
    return {row.images: row.value for row in rows if row.name == "loss"}
