"""DDPM: noise prediction with a learned range variance (Ho et al. 2020; Nichol and Dhariwal 2021, "ADM family").

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. Tables are float64, and cast to the images' dtype (float32 at least) when used.
Axes: B samples, C channels, H W height and width, K steps of a chain. Read next: samplers.py.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dis_scale.diffusion.process import Losses, ModelFn, mean_flat
from dis_scale.process.errors import UserError
from dis_scale.recipe import Gaussian

Table = NDArray[np.floating]
LOG_2 = math.log(2.0)


class Coefficients(NamedTuple):
    """A step's factors, each (B, 1, 1, 1): x_t = signal x_0 + sigma eps; posterior mean = x0 x_0 + xt x_t.

    `min_log` and `max_log` are the logarithms of the least and the largest variance of the step that a network can learn.
    """

    signal: Tensor
    sigma: Tensor
    x0: Tensor
    xt: Tensor
    min_log: Tensor
    max_log: Tensor


class Chain:
    """A Markov chain of K Gaussian steps. The signal's power falls from `end` (1: all of it) to `alpha_bars_K[-1]`.

    `times_K` are the model's input times, 0 to 1000. Posterior as in Ho et al., equations 6 and 7.
    """

    def __init__(self, times_K: Table, alpha_bars_K: Table, end: float = 1.0):
        self.times_K, self.alpha_bars_K = times_K, alpha_bars_K
        self.before_K = np.append(end, alpha_bars_K[:-1])
        """alpha_bar after each step of sampling."""
        self.betas_K = 1 - alpha_bars_K / self.before_K
        self.posterior_variance_K = self.betas_K * (1 - self.before_K) / (1 - alpha_bars_K)
        # The first posterior variance is 0 if the chain ends without noise: ADM uses the second one's logarithm instead.
        first = self.posterior_variance_K[1:2] if len(alpha_bars_K) > 1 else self.betas_K[:1]
        clipped_K = np.append(first, self.posterior_variance_K[1:])
        columns = (
            np.sqrt(alpha_bars_K),
            np.sqrt(1 - alpha_bars_K),
            self.betas_K * np.sqrt(self.before_K) / (1 - alpha_bars_K),
            (1 - self.before_K) * np.sqrt(1 - self.betas_K) / (1 - alpha_bars_K),
            np.log(clipped_K),
            np.log(self.betas_K),
            times_K,
        )
        self._tables = torch.from_numpy(np.stack(columns))

    def __len__(self) -> int:
        return len(self.times_K)

    def at(self, k_B: Tensor, like_BCHW: Tensor) -> Coefficients:
        """Return the coefficients of the steps `k_B`, on the images' device and in their dtype, float32 at least."""
        dtype = torch.promote_types(like_BCHW.dtype, torch.float32)
        values = (
            self._tables_on(like_BCHW.device)[:-1, k_B]
            .to(dtype)
            .reshape(len(Coefficients._fields), -1, *[1] * (like_BCHW.ndim - 1))
        )
        return Coefficients(*values.unbind())

    def model_times(self, k_B: Tensor) -> Tensor:
        """The model's input times (B,) at steps `k_B`."""
        return self._tables_on(k_B.device)[-1, k_B].float()

    def _tables_on(self, device: torch.device) -> Tensor:
        """Return the tables on the device. They are copied once: a copy at each step would stall the device."""
        if self._tables.device != device:
            self._tables = self._tables.to(device)
        return self._tables


def predict_x0(c: Coefficients, xt_BCHW: Tensor, eps_BCHW: Tensor) -> Tensor:
    """The image implied by the predicted noise."""
    return (xt_BCHW - c.sigma * eps_BCHW) / c.signal


def learned_log_variance(c: Coefficients, v_BCHW: Tensor) -> Tensor:
    """Interpolate by v in [-1, 1] between the logarithms of the posterior variance and beta (Nichol and Dhariwal, equation 15)."""
    share = (v_BCHW + 1) / 2
    return share * c.max_log + (1 - share) * c.min_log


class GaussianDiffusion:
    """The chain and the loss of training, and the shorter chains of the samplers."""

    def __init__(self, settings: Gaussian):
        self.settings, self.num_steps = settings, settings.steps
        betas = (linear_betas if settings.betas == "linear" else cosine_betas)(settings.steps)
        # Times always have the range of a chain of 1000 steps, for which the model's time features are designed.
        times_K = np.arange(settings.steps) * (1000 / settings.steps)
        self.chain = Chain(times_K, np.cumprod(1 - betas))

    def sample_times(self, rng: np.random.Generator, n: int) -> Tensor:
        """Sample steps (n,), uniform, int64."""
        return torch.from_numpy(rng.integers(self.num_steps, size=n))

    def losses(self, model_fn: ModelFn, x0_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Losses:
        """Return the MSE of the noise plus the bound in bits per dimension. The bound trains only the variance."""
        c = self.chain.at(t_B, x0_BCHW)
        xt_BCHW = c.signal * x0_BCHW + c.sigma * noise_BCHW
        eps_BCHW, v_BCHW = model_fn(xt_BCHW, self.chain.model_times(t_B)).to(xt_BCHW.dtype).chunk(2, dim=1)
        mse_B = mean_flat((noise_BCHW - eps_BCHW).square())
        vb_B = variational_bound(c, x0_BCHW, xt_BCHW, eps_BCHW.detach(), v_BCHW, t_B == 0)
        return Losses(mse_B + vb_B, mse_B, vb_B)

    def times(self, steps: int) -> Table:
        """Return the model's times in a sampler's chain of this many steps."""
        return self.respaced(steps).times_K

    def respaced(self, count: int) -> Chain:
        """Return a chain of `count` of the steps, including both ends, as ADM's SpacedDiffusion does."""
        used = spaced_times(self.num_steps, count)
        return Chain(self.chain.times_K[used], self.chain.alpha_bars_K[used])


def linear_betas(steps: int) -> Table:
    """1e-4 to 0.02 over 1000 steps (Ho et al.), scaled so that chains of other lengths end equally noisy (ADM)."""
    scale = 1000 / steps
    return np.minimum(np.linspace(scale * 1e-4, scale * 0.02, steps), 0.999)


def cosine_betas(steps: int) -> Table:
    """abar(u) = cos^2((u + 0.008) / 1.008 pi / 2), betas at most 0.999 (Nichol and Dhariwal, equation 17)."""
    abar: Table = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


def spaced_times(steps: int, count: int) -> list[int]:
    """Return `count` equally spaced times of `steps` with both ends, rounded like ADM's `space_timesteps`; for 1 the noisiest."""
    if not 1 <= count <= steps:
        raise UserError(f"steps {count}: expected 1 to {steps}, the length of the chain")
    if count == 1:
        return [steps - 1]
    stride = (steps - 1) / (count - 1)
    position, times = 0.0, []
    for _ in range(count):
        times.append(round(position))
        position += stride
    return times


def variational_bound(
    c: Coefficients, x0_BCHW: Tensor, xt_BCHW: Tensor, eps_BCHW: Tensor, v_BCHW: Tensor, first_B: Tensor
) -> Tensor:
    """Return the KL divergence of the posterior from the model's step, in bits per dimension; at the first step the decoder's NLL.

    Pass the noise detached, so that the bound trains only the variance (Nichol and Dhariwal's L_hybrid).
    """
    error_BCHW = c.x0 * (x0_BCHW - predict_x0(c, xt_BCHW, eps_BCHW))  # posterior mean minus the model's
    log_variance = learned_log_variance(c, v_BCHW)
    ratio = c.min_log - log_variance
    kl_B = mean_flat(0.5 * (ratio.exp() - 1 - ratio + error_BCHW.square() * (-log_variance).exp())) / LOG_2
    if first_B.device.type == "cpu" and not bool(first_B.any()):  # on a GPU the check would cost more than the computation
        return kl_B
    # At the first step the posterior's mean is x_0, so the error is x_0 minus the model's mean.
    decoder_B = mean_flat(-discretised_log_likelihood(x0_BCHW, error_BCHW, 0.5 * log_variance)) / LOG_2
    return torch.where(first_B, decoder_B, kl_B)


def discretised_log_likelihood(x_BCHW: Tensor, error_BCHW: Tensor, log_scale_BCHW: Tensor) -> Tensor:
    """Return the log-probability of the bin of width 2 / 255 around x, open at -1 and 1, under a normal at x - error.

    Ho et al., equation 13, with ADM's approximation of the normal's integral. The bins are those of 8-bit images;
    ADM, DiT and DiS also use them for latents.
    """
    inverse = (-log_scale_BCHW).exp()
    below_upper = _normal_cdf(inverse * (error_BCHW + 1 / 255))
    below_lower = _normal_cdf(inverse * (error_BCHW - 1 / 255))
    inside = torch.where(x_BCHW > 0.999, 1 - below_lower, below_upper - below_lower)
    return torch.where(x_BCHW < -0.999, below_upper, inside).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
