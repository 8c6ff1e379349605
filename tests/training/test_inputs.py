"""Inputs of a step: the same for any number of workers; without classes they have no labels."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from dis_scale.data.latents import Latents
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import open_folder
from dis_scale.training.inputs import StepInput, step_inputs
from dis_scale.training.lanes import forward_passes
from tests.conftest import TINY
from tests.support.ranks import make_latents

UNCONDITIONAL = (
    "data.num_classes=none", "evaluate.extractor={kind: exported, name: x, path: x.pt}", "evaluate.guidance=1.0"
)  # fmt: skip


def first_step(recipe: Recipe, latents: Latents, world: int, passes: int) -> list[StepInput]:
    """The inputs of the first step, of all ranks in order."""
    ranks = [forward_passes(recipe.train.lanes, rank, world, passes) for rank in range(world)]
    each = [step_inputs(recipe, recipe.seed, torch.device("cpu"), latents, (0.5,), 0, passes) for passes in ranks]
    return [next(inputs) for inputs, passes in zip(each, ranks, strict=True) for _ in passes]


@pytest.mark.parametrize("more", [(), UNCONDITIONAL])
def test_a_step_has_the_same_inputs_for_any_number_of_workers(more: tuple[str, ...], tmp_path: Path) -> None:
    recipe = reading.load(TINY, list(more))
    latents = Latents(make_latents(open_folder(tmp_path), recipe), seed=0)
    (one,) = first_step(recipe, latents, world=1, passes=1)
    for world, passes in ((1, 4), (2, 1), (2, 2), (4, 1)):
        parts = first_step(recipe, latents, world, passes)
        assert len(parts) == world * passes
        assert torch.equal(torch.cat([part.t_B for part in parts]), one.t_B)
        masks = [part.drop for part in parts if part.drop is not None]
        assert one.drop is not None
        assert torch.equal(torch.cat(masks, 1), one.drop)
        assert torch.equal(torch.cat([part.micro.x_BCHW for part in parts]), one.micro.x_BCHW)
        assert torch.equal(torch.cat([part.micro.noise_BCHW for part in parts]), one.micro.noise_BCHW)
        labels = [part.micro.y_B for part in parts if part.micro.y_B is not None]
        if one.micro.y_B is None:
            assert not labels
        else:
            assert torch.equal(torch.cat(labels), one.micro.y_B)
    assert (one.micro.y_B is None) == (more == UNCONDITIONAL)


def test_times_and_masks_differ_from_lane_to_lane_and_from_step_to_step(tmp_path: Path) -> None:
    """A branch that is kept makes up for those that are dropped."""
    recipe = reading.load(TINY)
    latents, lanes = Latents(make_latents(open_folder(tmp_path), recipe), seed=0), recipe.train.lanes
    passes = forward_passes(lanes, 0, 1, lanes)
    inputs = [*islice(step_inputs(recipe, recipe.seed, torch.device("cpu"), latents, (0.0, 0.25), 0, passes), 2 * lanes)]
    masks = [one.drop for one in inputs if one.drop is not None]
    assert len({one.t_B.numpy().tobytes() for one in inputs}) == len(masks) == 2 * lanes
    assert len({mask.numpy().tobytes() for mask in masks}) > 2
    always, sometimes = torch.cat(masks, 1)
    assert always.eq(1).all()
    assert sometimes.unique().tolist() == pytest.approx([0, 4 / 3])
