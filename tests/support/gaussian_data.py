"""Gaussian data of standard deviation s: its perfect denoiser is known, so samplers are tested without a network."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import overload

import numpy as np
import torch
from torch import Tensor

from dis_scale import diffusion
from dis_scale.diffusion.gaussian import Chain
from dis_scale.diffusion.process import ModelFn
from dis_scale.diffusion.samplers import NoiseSource
from dis_scale.recipe import Flow, Gaussian, LatentShape

S = 0.5
"""Standard deviation of the data."""


@overload
def build(settings: Gaussian) -> diffusion.GaussianDiffusion: ...
@overload
def build(settings: Flow) -> diffusion.FlowMatching: ...
def build(settings: Gaussian | Flow) -> diffusion.Process:
    """Return the process of latents of 4 x 32 x 32 values."""
    return diffusion.build(settings, LatentShape(4, 32))


def eps_model(chain_of_training: Chain, s: float = S) -> ModelFn:
    """The perfect noise prediction, with the lower end of the learned variance range.

    Model times may lie between those of the chain: alpha_bar is interpolated in log-SNR, as in test_samplers.py's `log_snr_chain`.
    """
    log_snr = np.log(chain_of_training.alpha_bars_K / (1 - chain_of_training.alpha_bars_K))

    def model_fn(x: Tensor, t: Tensor) -> Tensor:
        abar = 1 / (1 + np.exp(-np.interp(t.numpy(), chain_of_training.times_K, log_snr)))
        abar = torch.from_numpy(abar).reshape(-1, 1, 1, 1)
        eps = (1 - abar).sqrt() * x / (abar * s**2 + 1 - abar)
        return torch.cat([eps, -torch.ones_like(eps)], dim=1)

    return model_fn


def exact_variance(chain: Chain, model_fn: ModelFn, s: float = S) -> ModelFn:
    """`model_fn` with the learned range at the true variance of each reverse step of `chain`."""
    abar, before, beta = chain.alpha_bars_K, chain.before_K, chain.betas_K
    posterior = chain.posterior_variance_K
    remaining = s**2 * (1 - abar) / (abar * s**2 + 1 - abar)  # variance of x_0 given x_t
    true = posterior + (np.sqrt(before) * beta / (1 - abar)) ** 2 * remaining
    log_small = np.log(np.append(posterior[1], posterior[1:]))
    shares = 2 * (np.log(true) - log_small) / (np.log(beta) - log_small) - 1

    def with_variance(x: Tensor, t: Tensor) -> Tensor:
        out = model_fn(x, t)
        k = int(np.argmin(np.abs(chain.times_K - float(t[0]))))
        out[:, out.shape[1] // 2 :] = shares[k]
        return out

    return with_variance


def velocity_model(s: float = S) -> ModelFn:
    """The perfect velocity on the linear path; the model's time is 1000 t."""

    def model_fn(x: Tensor, t: Tensor) -> Tensor:
        t = (t.double() / 1000).reshape(-1, 1, 1, 1)
        v = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) * x
        return torch.cat([v, torch.zeros_like(v)], dim=1)

    return model_fn


def final_variance(sample: Callable[[Tensor, NoiseSource], Tensor], variance_T: float, steps: int) -> float:
    """Exact variance of `sample(x_T, noise)`. Sampling is linear in x_T and in each step's noise, so unit impulses suffice.

    Sample 0 starts from 1 without noise. Sample i + 1 starts from 0 and gets only the noise of step i.
    """
    rows = torch.eye(steps + 1, dtype=torch.float64).reshape(steps + 1, steps + 1, 1, 1, 1)
    gains = sample(rows[0], lambda step, shape: rows[step + 1].reshape(shape)).flatten().numpy()
    return float(gains[0] ** 2 * variance_T) + float(np.square(gains[1:]).sum())


def slopes(errors: Sequence[float]) -> list[float]:
    """Orders of accuracy between doublings of the number of steps."""
    return [float(np.log2(a / b)) for a, b in pairwise(errors)]
