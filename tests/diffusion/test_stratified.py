"""Stratified times: one in each of as many equal parts as the batch has images, whatever lanes a worker computes."""

import numpy as np
import pytest
import torch

from dis_scale.diffusion import build
from dis_scale.process import seeds
from dis_scale.recipe import Flow, Gaussian

LANES, IMAGES = 4, 8
"""Lanes of a batch, and images of a lane."""
PROCESSES = {
    "gaussian": Gaussian(kind="gaussian"),
    "flow": Flow(kind="flow"),
    "logit_normal": Flow(kind="flow", times="logit_normal"),
    "shifted": Flow(kind="flow", shift=3.0),
}


def batch(settings: Gaussian | Flow, step: int, stratified: bool) -> torch.Tensor:
    """The times of a step, lane by lane."""
    process = build(settings.model_copy(update={"stratified": stratified}))
    lanes = [process.sample_times(seeds.generator("time", 0, step, i), IMAGES, i, LANES) for i in range(LANES)]
    return torch.stack(lanes).double()


@pytest.mark.parametrize("name", PROCESSES)
def test_each_part_of_the_distribution_has_one_time(name: str) -> None:
    """Parts of equal probability, by the quantiles of independent times."""
    settings = PROCESSES[name]
    process = build(settings)
    many = np.sort(process.sample_times(np.random.default_rng(0), 400_000).double().numpy())
    for step in range(3):
        times = batch(settings, step, stratified=True)
        low, high = (np.searchsorted(many, times.flatten().numpy(), side) / len(many) for side in ("left", "right"))
        parts = np.sort((low + high) / 2) * LANES * IMAGES
        assert np.abs(parts - (np.arange(LANES * IMAGES) + 0.5)).max() < 0.5 + 0.15, "up to the quantiles' own error"
        assert all(float(lane.double().median()) == pytest.approx(float(times.median()), rel=0.5) for lane in times)


@pytest.mark.parametrize("name", PROCESSES)
def test_times_are_distributed_as_independent_ones(name: str) -> None:
    """The mean over many steps is that of independent times, and a batch's mean varies less."""
    means = {kind: [float(batch(PROCESSES[name], step, kind).mean()) for step in range(200)] for kind in (False, True)}
    error = np.std(means[False]) / 200**0.5
    assert abs(np.mean(means[True]) - np.mean(means[False])) < 4 * error
    assert np.std(means[True]) < 0.2 * np.std(means[False])


def test_by_default_times_do_not_depend_on_the_lane() -> None:
    for settings in PROCESSES.values():
        process = build(settings)
        one, other = (process.sample_times(np.random.default_rng(5), IMAGES, lane, LANES) for lane in (0, 3))
        assert torch.equal(one, other)
