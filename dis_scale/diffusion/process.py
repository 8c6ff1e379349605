"""Interface of a diffusion process to training and samplers; shared by gaussian.py and flow.py.

Axes: B samples, C channels, H W height and width, K steps. A model function maps noisy images
and the model's input times (0 to 1000) to (B, 2C, H, W).
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

ModelFn = Callable[[Tensor, Tensor], Tensor]
"""(x_BCHW, t_B) to (B, 2C, H, W)."""


class Losses(NamedTuple):
    """Loss of each sample, (B,) in float32 or better, and its parts. `vb` is zero if the process has no bound."""

    total: Tensor
    mse: Tensor
    vb: Tensor


class Process(Protocol):
    """A process as the training loop uses it."""

    @property
    def num_steps(self) -> int:
        """Length of the chain, 0 for continuous time."""
        ...

    def sample_times(self, rng: np.random.Generator, n: int) -> Tensor:
        """Sample times (n,) of training from the caller's generator."""
        ...

    def losses(self, model_fn: ModelFn, x0_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Losses:
        """The loss of each sample at the given times and noise. Uses no random numbers."""
        ...


def per_sample(values_B: Tensor, like_BCHW: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1), to be broadcast over images."""
    return values_B.reshape(-1, *[1] * (like_BCHW.ndim - 1))


def mean_flat(x_BCHW: Tensor) -> Tensor:
    """Mean over all axes except the batch."""
    return x_BCHW.flatten(1).mean(dim=1)
