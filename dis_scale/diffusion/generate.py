"""Samples by number: the latents of samples i, j, ... are the same whatever batch they are drawn in.

Axes: B samples, C channels, H W height and width. Read next: samplers.py, ../seeds.py.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dis_scale import seeds
from dis_scale.diffusion.flow import FlowMatching
from dis_scale.diffusion.gaussian import GaussianDiffusion
from dis_scale.diffusion.guidance import Labelled, guided
from dis_scale.diffusion.samplers import Progress, check_sampler, sample
from dis_scale.recipe import LatentShape


class Generator(Labelled, Protocol):
    """A model that knows what it sees."""

    shape: LatentShape


class SampleNoise:
    """A noise source for samples `numbers`: a function of (seed, number, step) alone, drawn on the CPU."""

    def __init__(self, seed: int, numbers: Sequence[int]):
        self.seed, self.numbers = seed, numbers

    def __call__(self, step: int, shape: Sequence[int]) -> Tensor:
        """float32 noise of `shape`, whose first axis runs over the samples."""
        return self._draw("sample-noise", shape, step)

    def start(self, shape: Sequence[int]) -> Tensor:
        """The noise that sampling starts from, float32."""
        return self._draw("sample-start", shape)

    def _draw(self, what: str, shape: Sequence[int], *where: int) -> Tensor:
        assert shape[0] == len(self.numbers), f"noise for {len(self.numbers)} samples asked in shape {tuple(shape)}"
        one = [
            seeds.generator(what, self.seed, number, *where).standard_normal(tuple(shape[1:]), np.float32)
            for number in self.numbers
        ]
        return torch.from_numpy(np.stack(one))


def generate(
    model: Generator,
    process: GaussianDiffusion | FlowMatching,
    labels: Sequence[int] | None,
    numbers: Sequence[int],
    *,
    sampler: str,
    steps: int,
    guidance: float = 1.0,
    interval: tuple[float, float] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Latents (B, C, H, W), float32, of the samples with these numbers and labels (None for a model without classes).

    Noise is the same bit for bit at any split of the numbers into batches; the model's sums may differ in the last
    digits. UserError before any work for weights, labels, steps or a sampler that will not do.
    """
    check_sampler(sampler, process)
    noise = SampleNoise(seed, numbers)
    y_B = None if labels is None else torch.tensor(list(labels), dtype=torch.int64, device=device)
    model_fn = guided(model, y_B, guidance, interval=interval)
    x_T = noise.start((len(numbers), model.shape.channels, model.shape.size, model.shape.size)).to(device)
    return sample(model_fn, process, sampler, steps, x_T, noise, progress)
