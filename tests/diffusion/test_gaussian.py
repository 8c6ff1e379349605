"""The Gaussian process compared with its formulas in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from dis_scale.diffusion.gaussian import discretised_log_likelihood, spaced_times
from dis_scale.diffusion.samplers import sample
from dis_scale.process.errors import UserError
from dis_scale.recipe import Gaussian
from tests.support.gaussian_data import build, eps_model

PROCESS = build(Gaussian(kind="gaussian"))


def images(batch: int = 6, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, 3, 3, generator=rng, dtype=torch.float64) for _ in range(2)]


def test_linear_and_cosine_schedules() -> None:
    betas = PROCESS.chain.betas_K
    assert (betas[0], betas[-1], len(betas)) == (pytest.approx(1e-4), pytest.approx(0.02), 1000)
    cosine = build(Gaussian(kind="gaussian", betas="cosine")).chain
    assert cosine.betas_K.max() == pytest.approx(0.999)
    assert cosine.alpha_bars_K[499] == pytest.approx(np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) ** 2, rel=1e-3)


def test_respacing_keeps_both_ends_and_the_signal_left() -> None:
    assert spaced_times(1000, 10) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    chain = PROCESS.respaced(250)
    assert len(chain) == 250
    assert np.array_equal(chain.alpha_bars_K, PROCESS.chain.alpha_bars_K[chain.times_K.astype(int)])
    assert np.allclose(np.cumprod(1 - chain.betas_K), chain.alpha_bars_K)
    with pytest.raises(UserError, match="steps 1001: expected 1 to 1000"):
        PROCESS.respaced(1001)


@given(st.integers(1, 1000), st.data())
def test_respaced_times_rise_from_end_to_end(steps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, steps))
    times = spaced_times(steps, count)
    assert times == sorted(set(times))
    assert len(times) == count
    assert times[-1] == steps - 1, "sampling begins at the noisiest"
    assert times[0] == 0 or count == 1


def test_a_chain_of_one_step_works() -> None:
    x_T = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for name in ("ddpm", "ddim", "dpm_solver"):
        x0 = sample(eps_model(PROCESS.chain), PROCESS, name, 1, x_T, noise=lambda *_: pytest.fail("the last step has no noise"))
        assert bool(torch.isfinite(x0).all())


def test_times_come_from_the_callers_generator() -> None:
    def draw() -> Tensor:
        return PROCESS.sample_times(np.random.default_rng(5), 4000)

    assert torch.equal(draw(), draw())
    assert (int(draw().min()), int(draw().max())) == (0, 999)


def test_loss_against_float64_formulas() -> None:
    x0, noise = images()
    t = torch.tensor([0, 1, 10, 300, 700, 999])
    eps, v = images(seed=1)
    losses = PROCESS.losses(lambda *_: torch.cat([eps, v], dim=1), x0, t, noise)
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)
    for i in range(1, 6):
        k = int(t[i])
        before, beta = abar[k - 1], betas[k]
        small = beta * (1 - before) / (1 - abar[k])
        x, e, share = x0[i].numpy(), eps[i].numpy(), (v[i].numpy() + 1) / 2
        xt = np.sqrt(abar[k]) * x + np.sqrt(1 - abar[k]) * noise[i].numpy()
        predicted = (xt - np.sqrt(1 - abar[k]) * e) / np.sqrt(abar[k])
        error = np.sqrt(before) * beta / (1 - abar[k]) * (x - predicted)
        log_variance = share * np.log(beta) + (1 - share) * np.log(small)
        kl = 0.5 * (log_variance - np.log(small) - 1 + small / np.exp(log_variance) + error**2 / np.exp(log_variance))
        assert float(losses.vb[i]) == pytest.approx(kl.mean() / np.log(2), rel=1e-9)
        assert float(losses.mse[i]) == pytest.approx(((noise[i].numpy() - e) ** 2).mean(), rel=1e-12)
    log_scale = 0.5 * ((v[0] + 1) / 2 * np.log(1e-4) + (1 - v[0]) / 2 * np.log(PROCESS.chain.posterior_variance_K[1]))
    error = np.sqrt(1e-4 / (1 - 1e-4)) * (eps[0] - noise[0])
    decoder = -discretised_log_likelihood(x0[0], error, log_scale).mean() / np.log(2)
    assert float(losses.vb[0]) == pytest.approx(float(decoder), rel=1e-9)
    assert torch.equal(losses.total, losses.mse + losses.vb)


def test_the_bound_trains_only_the_variance() -> None:
    x0, noise = images()
    out = torch.zeros(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    PROCESS.losses(lambda *_: out, x0, torch.tensor([0, 1, 10, 300, 700, 999]), noise).vb.sum().backward()
    assert out.grad is not None
    assert float(out.grad[:, :2].abs().max()) == 0
    assert float(out.grad[:, 2:].abs().min()) > 0


def test_the_first_steps_bound_is_the_likelihood_of_8_bit_bins() -> None:
    grid = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean, scale = 0.3, torch.full((256,), np.log(0.05), dtype=torch.float64)
    log_probability = discretised_log_likelihood(grid, grid - mean, scale)
    assert float(log_probability.exp().sum()) == pytest.approx(1, abs=1e-6)
    exact = np.diff(norm.cdf((np.arange(-1, 256) * 2 / 255 - 1 + 1 / 255 - mean) / 0.05))[1:-1]
    assert np.allclose(log_probability.exp()[1:-1], exact, atol=1e-4)


def test_loss_of_the_perfect_denoiser_is_the_remaining_variance() -> None:
    s, t = 0.5, torch.tensor([1, 250, 999])
    one = torch.ones(3, 1, 1, 1, dtype=torch.float64)
    # The error is linear in x_0 and in the noise: its expected square is the sum of the squares for unit impulses.
    parts = [PROCESS.losses(eps_model(PROCESS.chain), s * one * a, t, one * b).mse for a, b in ((1, 0), (0, 1))]
    abar = PROCESS.chain.alpha_bars_K[t]
    assert np.allclose(sum(parts), abar * s**2 / (abar * s**2 + 1 - abar), rtol=1e-10)


def test_posterior_against_bayes_rule() -> None:
    """q(x_{t-1} | x_t, x_0) by multiplying the two densities, for a respaced chain."""
    chain = PROCESS.respaced(50)
    k = 20
    c = chain.at(torch.tensor([k]), torch.zeros(1, 1, 1, 1, dtype=torch.float64))
    before, beta = chain.before_K[k], chain.betas_K[k]
    precision = (1 - beta) / beta + 1 / (1 - before)
    assert chain.posterior_variance_K[k] == pytest.approx(1 / precision, rel=1e-12)
    assert float(c.min_log) == pytest.approx(-np.log(precision), rel=1e-12)
    assert float(c.max_log) == pytest.approx(np.log(beta), rel=1e-12)
    assert float(c.xt) == pytest.approx(np.sqrt(1 - beta) / beta / precision, rel=1e-12)
    assert float(c.x0) == pytest.approx(np.sqrt(before) / (1 - before) / precision, rel=1e-12)
