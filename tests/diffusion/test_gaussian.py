"""The Gaussian process against its formulas in float64."""

import numpy as np
import pytest
import torch

from dis_scale.diffusion import build
from dis_scale.diffusion.gaussian import spaced_times
from dis_scale.errors import UserError
from dis_scale.recipe import Gaussian

PROCESS = build(Gaussian(kind="gaussian"))


def images(batch=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, 3, 3, generator=rng, dtype=torch.float64) for _ in range(2)]


def test_linear_and_cosine_schedules():
    betas = PROCESS.chain.betas_K
    assert (betas[0], betas[-1], len(betas)) == (pytest.approx(1e-4), pytest.approx(0.02), 1000)
    cosine = build(Gaussian(kind="gaussian", betas="cosine")).chain
    assert cosine.betas_K.max() == pytest.approx(0.999)
    assert cosine.alpha_bars_K[499] == pytest.approx(np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) ** 2, rel=1e-3)


def test_respacing_keeps_both_ends_and_the_signal_left():
    assert spaced_times(1000, 10) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    chain = PROCESS.respaced(250)
    assert len(chain) == 250
    assert np.array_equal(chain.alpha_bars_K, PROCESS.chain.alpha_bars_K[chain.times_K.astype(int)])
    assert np.allclose(np.cumprod(1 - chain.betas_K), chain.alpha_bars_K)
    with pytest.raises(UserError, match="steps 1001: expected 1 to 1000"):
        PROCESS.respaced(1001)


def test_times_come_from_the_callers_generator():
    draw = lambda: PROCESS.draw_times(np.random.default_rng(5), 4000)  # noqa: E731
    assert torch.equal(draw(), draw())
    assert (int(draw().min()), int(draw().max())) == (0, 999)


def test_loss_against_float64_formulas():
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
    assert torch.equal(losses.total, losses.mse + losses.vb)


def test_the_bound_trains_the_variance_alone():
    x0, noise = images()
    out = torch.zeros(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    PROCESS.losses(lambda *_: out, x0, torch.tensor([0, 1, 10, 300, 700, 999]), noise).vb.sum().backward()
    assert float(out.grad[:, :2].abs().max()) == 0
    assert float(out.grad[:, 2:].abs().min()) > 0


def test_min_snr_weighs_the_mse():
    x0, noise = images()
    t = torch.tensor([0, 1, 10, 300, 700, 999])
    model_fn = lambda *_: torch.zeros(6, 4, 3, 3, dtype=torch.float64)  # noqa: E731
    plain = PROCESS.losses(model_fn, x0, t, noise)
    weighed = build(Gaussian(kind="gaussian", min_snr_gamma=5.0)).losses(model_fn, x0, t, noise)
    snr = PROCESS.chain.alpha_bars_K[t] / (1 - PROCESS.chain.alpha_bars_K[t])
    assert np.allclose(weighed.mse / plain.mse, np.minimum(snr, 5) / snr)
    assert torch.equal(weighed.vb, plain.vb)
