"""The linear path: its loss, its times and their shift."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from dis_scale import diffusion
from dis_scale.diffusion.flow import LEAST_DIVISOR
from dis_scale.diffusion.generate import SampleNoise
from dis_scale.diffusion.process import ModelFn
from dis_scale.diffusion.samplers import sample
from dis_scale.recipe import Flow, LatentShape
from dis_scale.recipe.evaluate import FLOW_SAMPLERS
from dis_scale.recipe.train import Prediction
from tests.support.gaussian_data import build, velocity_model

PROCESS = build(Flow(kind="flow"))


def test_perfect_velocitys_loss() -> None:
    s, t = 0.5, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    one = torch.ones(3, 1, 1, 1, dtype=torch.float64)
    parts = [PROCESS.losses(velocity_model(s), s * one * a, t, one * b).total for a, b in ((1, 0), (0, 1))]
    assert np.allclose(sum(parts), s**2 / ((1 - t) ** 2 * s**2 + t**2), rtol=1e-10)


@pytest.mark.parametrize("predicts", ["velocity", "image", "noise"])
def test_predictions_and_losses_convert_into_each_other(predicts: Prediction) -> None:
    """An exact output has no loss of any kind; an error of the velocity is one of t times that in the image, 1 - t in the noise.

    Where no divisor is bounded.
    """
    rng = torch.Generator().manual_seed(0)
    x0, noise, error = torch.randn(3, 2, 4, 3, 3, generator=rng, dtype=torch.float64)
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    at = t.view(-1, 1, 1, 1)
    factor: dict[Prediction, Tensor | int] = {"velocity": 1, "image": -at, "noise": 1 - at}
    exact = {"velocity": noise - x0, "image": x0, "noise": noise}[predicts]
    for loss, of_loss in factor.items():
        process = build(Flow(kind="flow", predicts=predicts, loss=loss))
        for size in (0, 1):
            out = exact + size * factor[predicts] * error
            losses = process.losses(lambda *_, out=out: torch.cat([out, out], 1), x0, t, noise)
            assert torch.allclose(losses.total, (size * of_loss * error).square().flatten(1).mean(1), atol=1e-12)
            assert torch.allclose(losses.mse, (size * error).square().flatten(1).mean(1), atol=1e-12)


def outputs_of(predicts: Prediction) -> ModelFn:
    """The output of a model that knows a Gaussian image of deviation 0.5, through the conversion that has a least divisor."""
    velocity_fn = velocity_model(0.5)

    def model_fn(x: Tensor, t: Tensor) -> Tensor:
        v, at = velocity_fn(x, t).chunk(2, 1)[0], (t / 1000).view(-1, 1, 1, 1)
        divisor = {"image": -at.clamp(min=LEAST_DIVISOR), "noise": (1 - at).clamp(min=LEAST_DIVISOR)}
        return torch.cat([v if predicts == "velocity" else x + divisor[predicts] * v] * 2, 1)

    return model_fn


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
@pytest.mark.parametrize("predicts", ["image", "noise"])
def test_samples_of_an_exact_model_do_not_depend_on_its_prediction(predicts: Prediction, sampler: str) -> None:
    noise = SampleNoise(0, range(4))
    start = noise.start((4, 4, 3, 3)).double()
    expected = sample(outputs_of("velocity"), PROCESS, sampler, 50, start, noise)
    made = sample(outputs_of(predicts), build(Flow(kind="flow", predicts=predicts)), sampler, 50, start, noise)
    assert torch.allclose(made, expected, atol=2e-3)  # Heun's last step to an image is Euler's


@pytest.mark.parametrize("t", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("loss", ["velocity", "image", "noise"])
@pytest.mark.parametrize("predicts", ["velocity", "image", "noise"])
def test_each_loss_is_least_for_the_output_that_samples_exactly(predicts: Prediction, loss: Prediction, t: float) -> None:
    """Where the conversion has its least divisor, too: an error along the velocity raises the loss as much as its opposite does."""
    rng = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 100_000, 2, 1, 1, generator=rng, dtype=torch.float64)
    at, process = torch.full((100_000,), t, dtype=torch.float64), build(Flow(kind="flow", predicts=predicts, loss=loss))

    def total(error: float) -> Tensor:
        return process.losses(lambda x, t: outputs_of(predicts)(x, t) + error * velocity_model(0.5)(x, t), x0 / 2, at, noise).total

    difference = total(0.1) - total(-0.1)
    assert abs(difference.mean()) < 4 * difference.std() / len(difference) ** 0.5


def test_the_models_input_is_1000_t_and_its_first_half_is_the_velocity() -> None:
    seen = list[Tensor]()

    def model_fn(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.cat([torch.full_like(x, 2.0), torch.full_like(x, 1e6)], dim=1)

    x0, noise = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    losses = PROCESS.losses(model_fn, x0, torch.tensor([0.25]), noise)
    assert seen[0].tolist() == [250.0]
    assert (losses.total.item(), losses.vb.item()) == (1.0, 0.0)


@pytest.mark.parametrize(("times", "cdf"), [("uniform", lambda t: t), ("logit_normal", lambda t: _normal_cdf(np.log(t / (1 - t))))])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_follow_their_distribution(
    times: Literal["uniform", "logit_normal"], cdf: Callable[[np.ndarray], np.ndarray], shift: float
) -> None:
    process = build(Flow(kind="flow", times=times, shift=shift))
    t = process.sample_times(np.random.default_rng(0), 20_000).double().numpy()
    assert kstest(cdf(t / (shift - (shift - 1) * t)), "uniform").pvalue > 0.01


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    return np.asarray(torch.special.ndtr(torch.from_numpy(x)))


def test_the_grid_runs_from_noise_to_data_and_is_shifted() -> None:
    assert PROCESS.grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    shifted = build(Flow(kind="flow", shift=3.0)).grid(2)
    assert shifted.tolist() == [1, pytest.approx(0.75), 0]


@pytest.mark.parametrize(("shape", "shift"), [((4, 32), 1.0), ((768, 16), 6.928), ((3, 64), 1.732)])
def test_an_automatic_shift_is_the_root_of_the_latents_values_over_4096(shape: tuple[int, int], shift: float) -> None:
    """RAE's own value for 768 x 16 x 16 is 6.93."""
    process = diffusion.build(Flow(kind="flow", shift="auto"), LatentShape(*shape))
    assert isinstance(process, diffusion.FlowMatching)
    assert process.grid(2)[1] == pytest.approx(shift / (1 + shift), abs=1e-4)


def test_times_come_from_the_callers_generator() -> None:
    draws = [PROCESS.sample_times(np.random.default_rng(5), 8) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].dtype == torch.float32
