"""Flow matching on the linear path: x_t = (1 - t) x_0 + t eps, velocity v = eps - x_0 (SiT, arXiv 2401.08740).

Data is at t = 0, noise at t = 1. The model's input time is 1000 t. The first half of its 2C output channels is the velocity, as in
SiT with a backbone that learns a variance; or it is the image or the noise, from which the velocity follows.

Axes: B samples, C channels, H W height and width. Read next: samplers.py.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dis_scale.diffusion.process import Losses, ModelFn, mean_flat
from dis_scale.recipe import Flow, LatentShape

SHIFTED_FROM = 4096
"""Values of a latent for which `shift: auto` is 1: 4 x 32 x 32 (RAE, arXiv 2510.11690)."""

LEAST_DIVISOR = 0.05
"""Least divisor in the conversion of a prediction to a velocity; a smaller one would amplify the prediction's error without limit.
Nearer to the end than this, even an exact prediction has a loss. The loss is least where sampling, which uses the same conversion,
is exact. JiT also bounds the target's divisor."""


class FlowMatching:
    """Times and loss of training, and the time grid of the samplers."""

    num_steps = 0
    """Number of discrete times: 0, since time is continuous."""

    def __init__(self, settings: Flow, shape: LatentShape):
        self.settings = settings
        values = shape.channels * shape.size**2
        self.shift = math.sqrt(values / SHIFTED_FROM) if settings.shift == "auto" else settings.shift

    def sample_times(self, rng: np.random.Generator, n: int) -> Tensor:
        """Sample times (n,) in (0, 1), float32: uniform or logit-normal (Esser et al. 2024), then shifted."""
        if self.settings.times == "uniform":
            t = rng.uniform(size=n)
        else:
            t = 1 / (1 + np.exp(-rng.standard_normal(n)))
        return torch.from_numpy(self._shift(t)).float()

    def losses(self, model_fn: ModelFn, x0_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Losses:
        """Return mean squared errors by sample: `total` of the quantity that the setting `loss` names, `mse` of the velocity."""
        t = t_B.reshape(-1, *[1] * (x0_BCHW.ndim - 1)).to(torch.promote_types(x0_BCHW.dtype, torch.float32))
        xt_BCHW = (1 - t) * x0_BCHW + t * noise_BCHW
        v_BCHW = self._velocity(_output(model_fn, xt_BCHW, t_B), xt_BCHW, t)  # the velocity of sampling's steps
        mse_B = mean_flat((v_BCHW - (noise_BCHW - x0_BCHW)).square())
        loss = self.settings.loss
        if loss == "velocity":
            return Losses(mse_B, mse_B, torch.zeros_like(mse_B))
        ours_BCHW = xt_BCHW - t * v_BCHW if loss == "image" else xt_BCHW + (1 - t) * v_BCHW
        exact_BCHW = x0_BCHW if loss == "image" else noise_BCHW
        return Losses(mean_flat((ours_BCHW - exact_BCHW).square()), mse_B, torch.zeros_like(mse_B))

    def velocity(self, model_fn: ModelFn, xt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return the model's velocity in the dtype of the images. All samples have the same time, given on the host."""
        return self._velocity(_output(model_fn, xt_BCHW, t_B), xt_BCHW, t_B[0])

    def _velocity(self, out_BCHW: Tensor, xt_BCHW: Tensor, t: Tensor) -> Tensor:
        match self.settings.predicts:
            case "velocity":
                return out_BCHW
            case "image":
                return (xt_BCHW - out_BCHW) / t.clamp(min=LEAST_DIVISOR)
            case "noise":
                return (out_BCHW - xt_BCHW) / (1 - t).clamp(min=LEAST_DIVISOR)

    def times(self, steps: int) -> NDArray[np.float32]:
        """Return the model's times at the beginnings of a sampler's steps."""
        return 1000 * self.grid(steps)[:-1].astype(np.float32)

    def grid(self, steps: int) -> NDArray[np.float64]:
        """Return times from 1 to 0 in `steps` steps, equally spaced before the shift."""
        return self._shift(np.linspace(1.0, 0.0, steps + 1))

    def _shift(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        """Move times towards the noise, for larger images (Esser et al. 2024, equation 23)."""
        return self.shift * t / (1 + (self.shift - 1) * t)


def _output(model_fn: ModelFn, xt_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """Return the first half of the model's channels, in the dtype of the images."""
    return model_fn(xt_BCHW, 1000 * t_B).to(xt_BCHW.dtype).chunk(2, dim=1)[0]
