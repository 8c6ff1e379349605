"""Samples by number: the latents of a sample do not depend on the batch in which it is generated.

Axes: B samples, C channels, H W height and width. Read next: samplers.py, ../process/seeds.py.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dis_scale.diffusion.flow import FlowMatching
from dis_scale.diffusion.gaussian import GaussianDiffusion
from dis_scale.diffusion.guidance import Labelled, guided
from dis_scale.diffusion.samplers import Progress, check_sampler, sample
from dis_scale.models.tokens import check_labels
from dis_scale.process import seeds
from dis_scale.recipe import LatentShape, Sampling


class Generator(Labelled, Protocol):
    """A model with the shape of its input."""

    shape: LatentShape


class SampleNoise:
    """Noise source of the samples `numbers`. The noise depends only on (seed, number, step) and is generated on the CPU."""

    def __init__(self, seed: int, numbers: Sequence[int]):
        self.seed, self.numbers = seed, numbers

    def __call__(self, step: int, shape: Sequence[int]) -> Tensor:
        """Noise of `shape` in float32; the first axis is the samples."""
        return self._noise("sample-noise", shape, step)

    def start(self, shape: Sequence[int]) -> Tensor:
        """The initial noise of sampling, float32."""
        return self._noise("sample-start", shape)

    def _noise(self, purpose: str, shape: Sequence[int], *position: int) -> Tensor:
        assert shape[0] == len(self.numbers), f"noise for {len(self.numbers)} samples asked in shape {tuple(shape)}"
        one = [
            seeds.generator(purpose, self.seed, number, *position).standard_normal(tuple(shape[1:]), np.float32)
            for number in self.numbers
        ]
        return torch.from_numpy(np.stack(one))


def generate(
    model: Generator,
    process: GaussianDiffusion | FlowMatching,
    labels: Sequence[int] | None,
    numbers: Sequence[int],
    sampling: Sampling,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    guide: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Generate latents (B, C, H, W), float32, of the samples with these numbers and labels (None for a model without classes).

    `guide` is a worse model that guides in place of the model without labels. The noise is bit-equal for any split of the numbers
    into batches; the model's sums may differ in the last digits. Raises a UserError for invalid labels, steps or sampler before
    any computation. Exported pipelines import this function by name.
    """
    check_sampler(sampling.sampler, process)
    noise = SampleNoise(seed, numbers)
    y_B = None if labels is None else torch.tensor(list(labels), dtype=torch.int64)
    if y_B is not None and model.num_classes is not None:
        check_labels(y_B, model.num_classes)  # on the host: a check on the GPU would stall it
    model_fn = guided(model, None if y_B is None else y_B.to(device), sampling, guide)
    x_T = noise.start((len(numbers), model.shape.channels, model.shape.size, model.shape.size)).to(device)
    return sample(model_fn, process, sampling.sampler, sampling.steps, x_T, noise, progress)


def batch_sizes(total: int, batch: int) -> set[int]:
    """Return the sizes of the batches of `total` images, `batch` at a time: the full one, and the last one if it is smaller."""
    return {min(batch, total), total % batch} - {0}
