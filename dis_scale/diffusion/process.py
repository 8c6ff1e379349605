"""Common parts of gaussian.py and flow.py: the model as a function, and the losses of training.

Axes: B samples, C channels, H W height and width, K steps. A model function maps noisy images
and the model's input times (0 to 1000) to (B, 2C, H, W).
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

ModelFn = Callable[[Tensor, Tensor], Tensor]
"""(x_BCHW, t_B) to (B, 2C, H, W)."""


class Losses(NamedTuple):
    """Loss of each sample, (B,) in float32 or better, and its parts. `vb` is zero if the process has no bound."""

    total: Tensor
    mse: Tensor
    vb: Tensor


def mean_flat(x_BCHW: Tensor) -> Tensor:
    """Mean over all axes except the batch."""
    return x_BCHW.flatten(1).mean(dim=1)
