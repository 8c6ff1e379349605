"""From noise to latents: one interface for the samplers of the Gaussian process and those of the linear path.

A sampler is deterministic, given `x_T` and the noise source. The noise is a function of the step, not of a generator's state.
Axes: B samples, C channels, H W height and width, K steps. Read next: guidance.py, generate.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dis_scale.diffusion.flow import FlowMatching
from dis_scale.diffusion.gaussian import Chain, Coefficients, GaussianDiffusion, learned_log_variance, predict_x0
from dis_scale.diffusion.process import ModelFn
from dis_scale.process.errors import UserError, nearest
from dis_scale.recipe.evaluate import FLOW_SAMPLERS, GAUSSIAN_SAMPLERS

NoiseSource = Callable[[int, Sequence[int]], Tensor]
"""(step, shape) to standard normal noise; step 0 is the noisiest."""
Progress = Callable[[int, int], None]
"""Called with (steps done, total steps) after each step."""


def check_sampler(name: str, process: GaussianDiffusion | FlowMatching) -> None:
    """Raise a UserError for an unknown sampler, or one that does not fit the process."""
    known = GAUSSIAN_SAMPLERS + FLOW_SAMPLERS
    if name not in known:
        raise UserError(f"unknown sampler {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    gaussian = isinstance(process, GaussianDiffusion)
    kind, fitting = ("gaussian", GAUSSIAN_SAMPLERS) if gaussian else ("flow", FLOW_SAMPLERS)
    if name not in fitting:
        raise UserError(f"sampler {name} does not fit the process {kind}: choose {', '.join(fitting)}")


def sample(
    model_fn: ModelFn,
    process: GaussianDiffusion | FlowMatching,
    name: str,
    steps: int | Chain,
    x_T: Tensor,
    noise: NoiseSource,
    progress: Progress | None = None,
) -> Tensor:
    """Sample latents (B, C, H, W) from the noise `x_T`, in its dtype and on its device. The model function gets times on the host.

    `steps` is a number of steps; a Gaussian process also takes a chain. Raises a UserError before any computation for a sampler
    that does not fit, or a wrong number of steps.
    """
    check_sampler(name, process)
    if isinstance(steps, int) and steps < 1:
        raise UserError(f"steps {steps}: expected 1 or more")
    with torch.no_grad():
        if isinstance(process, FlowMatching):
            if not isinstance(steps, int):
                raise UserError("a chain does not fit the process flow: give a number of steps")
            return _flow(model_fn, process, steps, name, x_T, noise, progress)
        chain = process.respaced(steps) if isinstance(steps, int) else steps
        return _gaussian(model_fn, chain, name, x_T, noise, progress)


def pass_times(process: GaussianDiffusion | FlowMatching, name: str, steps: int) -> NDArray[np.floating]:
    """Return the model's time of each pass of a sampler: first the beginnings of all steps, then the ends that need a pass."""
    times_K = process.times(steps)
    return np.array([*times_K, *(end for end in (*times_K[1:], 0.0) if _has_second_pass(process, name, end))])


def _gaussian(model_fn: ModelFn, chain: Chain, name: str, x_T: Tensor, noise: NoiseSource, progress: Progress | None) -> Tensor:
    x_BCHW, x0_before = x_T, None
    for step, k in enumerate(reversed(range(len(chain)))):
        c = chain.at(torch.full((1,), k, device=x_T.device), x_T)  # filled there: a copy would wait for the GPU
        time_B = torch.full((len(x_T),), chain.times_K[k], dtype=_real(x_T))
        eps_BCHW, v_BCHW = model_fn(x_BCHW, time_B).to(x_T.dtype).chunk(2, dim=1)
        x0_BCHW = predict_x0(c, x_BCHW, eps_BCHW)
        if name == "ddpm":
            x_BCHW = _ddpm(c, x_BCHW, x0_BCHW, v_BCHW, noise, step, last=k == 0)
        elif name == "ddim":
            after = float(chain.before_K[k])  # Song, Meng and Ermon 2020, equation 12 without noise
            x_BCHW = after**0.5 * x0_BCHW + (1 - after) ** 0.5 * eps_BCHW
        elif name == "dpm_solver":
            x_BCHW = _dpm_solver(chain, k, x_BCHW, x0_BCHW, x0_before)
        else:
            raise AssertionError(f"the sampler {name} has no step")
        x0_before = x0_BCHW
        if progress is not None:
            progress(step + 1, len(chain))
    return x_BCHW


def _ddpm(c: Coefficients, x: Tensor, x0: Tensor, v: Tensor, noise: NoiseSource, step: int, *, last: bool) -> Tensor:
    """Take an ancestral step with the learned variance; no noise in the last step (Ho et al., algorithm 2)."""
    mean = c.x0 * x0 + c.xt * x
    if last:
        return mean
    return mean + (0.5 * learned_log_variance(c, v)).exp() * noise(step, x.shape).to(x)


def _dpm_solver(chain: Chain, k: int, x: Tensor, x0: Tensor, x0_before: Tensor | None) -> Tensor:
    """Take a step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); the first is of first order. Return x0 if no noise is left.

    The step to the first time of training is also of first order. With 20 steps it is four times as long in log-SNR as the step
    before it, from which algorithm 2 would extrapolate: the deviation of Gaussian data would be a quarter too large.
    """
    now, after = float(chain.alpha_bars_K[k]), float(chain.before_K[k])
    if after == 1.0:
        return x0
    h = _half_log_snr(after) - _half_log_snr(now)
    if x0_before is not None and k > 1:
        r = (_half_log_snr(now) - _half_log_snr(float(chain.alpha_bars_K[k + 1]))) / h
        x0 = (1 + 0.5 / r) * x0 - 0.5 / r * x0_before
    x_after: Tensor = ((1 - after) / (1 - now)) ** 0.5 * x - after**0.5 * np.expm1(-h) * x0
    return x_after


def _half_log_snr(alpha_bar: float) -> float:
    return 0.5 * float(np.log(alpha_bar / (1 - alpha_bar)))


def _flow(
    model_fn: ModelFn, process: FlowMatching, steps: int, name: str, x_T: Tensor, noise: NoiseSource, progress: Progress | None
) -> Tensor:
    x_BCHW, velocity = x_T, partial(process.velocity, model_fn)
    for step, (now, after) in enumerate(pairwise(process.grid(steps).tolist())):
        now_B, after_B = (torch.full((len(x_T),), t, dtype=_real(x_T)) for t in (now, after))
        v_BCHW = velocity(x_BCHW, now_B)
        if name == "euler_maruyama":
            x_BCHW = _euler_maruyama(x_BCHW, v_BCHW, now, after, noise, step)
        elif _has_second_pass(process, name, after):
            guess_BCHW = x_BCHW + (after - now) * v_BCHW
            x_BCHW = x_BCHW + (after - now) / 2 * (v_BCHW + velocity(guess_BCHW, after_B))
        elif name in ("euler", "heun"):
            x_BCHW = x_BCHW + (after - now) * v_BCHW
        else:
            raise AssertionError(f"the sampler {name} has no step")
        if progress is not None:
            progress(step + 1, steps)
    return x_BCHW


def _has_second_pass(process: GaussianDiffusion | FlowMatching, name: str, after: float) -> bool:
    """Return whether the model is also evaluated at a step's end. At time 0 a predicted image gives no velocity."""
    return name == "heun" and isinstance(process, FlowMatching) and (after > 0 or process.settings.predicts != "image")


def _euler_maruyama(x: Tensor, v: Tensor, now: float, after: float, noise: NoiseSource, step: int) -> Tensor:
    """Take a step of the reverse SDE with diffusion w(t) = t (SiT, equation 5, "sigma"); no noise in the last step.

    The score is -(x + (1 - t) v) / t, since eps = x + (1 - t) v. Multiplied by w(t) it has no pole at t = 0.
    """
    drift = v + 0.5 * (x + (1 - now) * v)
    mean = x + (after - now) * drift
    return mean if after == 0 else mean + (now * (now - after)) ** 0.5 * noise(step, x.shape).to(x)


def _real(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
