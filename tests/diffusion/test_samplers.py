"""Orders of accuracy and exact variances of the samplers on Gaussian data, in float64; and diffusers' steps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dis_scale.diffusion.gaussian import Chain
from dis_scale.diffusion.samplers import sample
from dis_scale.recipe import Flow, Gaussian
from dis_scale.recipe.evaluate import FLOW_SAMPLERS, GAUSSIAN_SAMPLERS, STOCHASTIC_SAMPLERS
from tests.support.gaussian_data import S, build, eps_model, exact_variance, final_variance, slopes, velocity_model

GAUSSIAN, FLOW = build(Gaussian(kind="gaussian")), build(Flow(kind="flow"))
EPS = eps_model(GAUSSIAN.chain)
ONE = torch.ones(1, 1, 1, 1, dtype=torch.float64)
KS = (40, 80, 160)


def deviation(alpha_bar: float) -> float:
    """Standard deviation of noisy data with this share of signal power. The flow map scales by the quotient of two."""
    return float((alpha_bar * S**2 + 1 - alpha_bar) ** 0.5)


def test_ddim_is_first_order() -> None:
    exact = S / deviation(GAUSSIAN.chain.alpha_bars_K[-1])
    errors = [abs(sample(EPS, GAUSSIAN, "ddim", K, ONE, noise).item() - exact) for K in KS]
    assert slopes(errors) == pytest.approx([1, 1], abs=0.15)


def log_snr_chain(count: int) -> Chain:
    """`count` steps of equal size in log-SNR, from the noisiest alpha_bar down to alpha_bar[0], short of 1.

    This is the grid of DPM-Solver's analysis. More steps cannot reduce the error of the jump from alpha_bar[0] to 1.
    """
    chain = GAUSSIAN.chain
    log_snr = np.log(chain.alpha_bars_K / (1 - chain.alpha_bars_K))
    grid = np.linspace(log_snr[0], log_snr[-1], count + 1)
    alpha_bars = 1 / (1 + np.exp(-grid))
    return Chain(np.interp(-grid[1:], -log_snr, chain.times_K), alpha_bars[1:], end=float(alpha_bars[0]))


def test_dpm_solver_is_second_order_without_the_last_jump() -> None:
    abar = GAUSSIAN.chain.alpha_bars_K
    exact = deviation(abar[0]) / deviation(abar[-1])
    errors = [abs(sample(EPS, GAUSSIAN, "dpm_solver", log_snr_chain(K), ONE, noise).item() - exact) for K in KS]
    assert slopes(errors) == pytest.approx([2, 2], abs=0.15)


@pytest.mark.parametrize(("s", "steps", "within"), [(0.25, 50, 0.03), (0.5, 20, 0.06), (0.5, 50, 0.01), (1.0, 20, 0.01)])
def test_dpm_solver_gives_the_datas_deviation_in_steps_that_users_have(s: float, steps: int, within: float) -> None:
    """Of even steps in time the last is by far the longest in log-SNR, and nothing may be extrapolated over it."""
    noisiest = GAUSSIAN.respaced(steps).alpha_bars_K[-1]
    exact = s / float((noisiest * s**2 + 1 - noisiest) ** 0.5)
    got = sample(eps_model(GAUSSIAN.chain, s), GAUSSIAN, "dpm_solver", steps, ONE, noise).item()
    assert got == pytest.approx(exact, rel=within)


ORDERS = {"ddim": 1, "dpm_solver": 2, "euler": 1, "heun": 2}
"""Of each sampler that draws no noise; of a flow's they are measured here, and of the others above."""


def test_each_sampler_has_an_order_or_draws_noise() -> None:
    assert {*ORDERS, *STOCHASTIC_SAMPLERS} == {*GAUSSIAN_SAMPLERS, *FLOW_SAMPLERS}


@pytest.mark.parametrize("name", [name for name in FLOW_SAMPLERS if name not in STOCHASTIC_SAMPLERS])
def test_flow_samplers_orders(name: str) -> None:
    order = ORDERS[name]
    errors = [abs(sample(velocity_model(), FLOW, name, K, ONE, noise).item() - S) for K in KS]
    assert slopes(errors) == pytest.approx([order, order], abs=0.15)


def test_ancestral_steps_with_the_true_variance_give_the_datas_variance() -> None:
    chain = GAUSSIAN.respaced(10)
    start = deviation(chain.alpha_bars_K[-1]) ** 2
    model = exact_variance(chain, EPS)
    true = final_variance(lambda x_T, noise: sample(model, GAUSSIAN, "ddpm", 10, x_T, noise), start, 10)
    # The last step adds no noise, so the remaining variance at alpha_bar[0] = 0.9999 is missing.
    assert true == pytest.approx(0.25, abs=2e-4)


def test_the_fixed_small_variance_is_wrong_at_ten_steps() -> None:
    start = deviation(GAUSSIAN.respaced(10).alpha_bars_K[-1]) ** 2
    small = final_variance(lambda x_T, noise: sample(EPS, GAUSSIAN, "ddpm", 10, x_T, noise), start, 10)
    assert small == pytest.approx(0.104, abs=5e-4)


def test_euler_maruyama_converges_to_the_datas_variance() -> None:
    errors = []
    for K in KS:
        draw = lambda x_T, noise, K=K: sample(velocity_model(), FLOW, "euler_maruyama", K, x_T, noise)  # noqa: E731
        errors.append(abs(final_variance(draw, 1.0, K) - S**2))
    assert slopes(errors) == pytest.approx([1, 1], abs=0.15)


def wavy_model(x: Tensor, t: Tensor) -> Tensor:
    """The perfect noise, and a variance that varies over its whole range."""
    return torch.cat([EPS(x, t).chunk(2, dim=1)[0], torch.cos(3 * x + t.reshape(-1, 1, 1, 1))], dim=1)


def noise(step: int, shape: Sequence[int]) -> Tensor:
    rng = torch.Generator().manual_seed(step)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def in_float64(scheduler: Any) -> Any:
    """diffusers' formulas on tables in float64 instead of its float32."""
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def diffusers_loop(scheduler: Any, x: Tensor, eta: float | None = None) -> Tensor:
    """diffusers' own loop, with our noise for each step."""
    for step, t in enumerate(scheduler.timesteps):
        out = wavy_model(x, torch.full((len(x),), float(t), dtype=torch.float64))
        extra = {} if eta is None else {"eta": eta}
        generator = torch.Generator().manual_seed(step)
        x = scheduler.step(out if eta is None else out.chunk(2, dim=1)[0], t, x, generator=generator, **extra).prev_sample
    return x


BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


@pytest.mark.parametrize("K", [10, 250, 1000])
def test_ddpm_equals_diffusers(K: int) -> None:
    from diffusers import DDPMScheduler

    theirs = in_float64(DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace", **BETAS))
    theirs.set_timesteps(K)
    x_T = noise(10_000, (2, 3, 4, 4))
    expected = diffusers_loop(theirs, x_T)
    assert torch.allclose(sample(wavy_model, GAUSSIAN, "ddpm", K, x_T, noise), expected, atol=1e-9)


def test_ddim_equals_diffusers() -> None:
    from diffusers import DDIMScheduler

    theirs = in_float64(DDIMScheduler(timestep_spacing="leading", **BETAS))
    theirs.set_timesteps(50)
    x_T = noise(10_000, (2, 3, 4, 4))
    expected = diffusers_loop(theirs, x_T, eta=0.0)
    leading = np.arange(0, 1000, 20)
    chain = Chain(GAUSSIAN.chain.times_K[leading], GAUSSIAN.chain.alpha_bars_K[leading])
    got = sample(wavy_model, GAUSSIAN, "ddim", chain, x_T, noise)
    assert torch.allclose(got, expected, atol=1e-9)
