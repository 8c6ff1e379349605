"""The exponential average's ramp; power-function averages: their widths, their recurrence, and other widths rebuilt from two."""

import numpy as np
import pytest

from dis_scale.process.errors import UserError
from dis_scale.recipe import Train
from dis_scale.weights import ema
from dis_scale.weights.ema import Snapshot

SETTINGS = Train(publish_images=(0, 1000), batch_images=10, lanes=1, ema=0.99, power_ema=(0.05, 0.1))


def profile(step: int, width: float) -> np.ndarray:
    """Return the share of each of steps 1 to `step` in the tracked average, by the recurrence itself."""
    weight = np.zeros(step)
    for t in range(1, step + 1):
        decay = ema.decays(SETTINGS.model_copy(update={"power_ema": (width, width)}), t)[ema.power_name(width)]
        weight *= decay
        weight[t - 1] += 1 - decay
    return weight


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_the_profile_has_the_width_that_names_it(width: float) -> None:
    weight, time = profile(4000, width), np.arange(1, 4001) / 4000
    assert weight.sum() == pytest.approx(1, abs=1e-9)
    mean = (weight * time).sum()
    assert np.sqrt((weight * (time - mean) ** 2).sum()) == pytest.approx(width, rel=2e-3)


def test_published_widths_have_the_published_exponents() -> None:
    """Karras et al. 2023, section 3.1: 16.97 and 6.94."""
    assert [ema.exponent(0.05), ema.exponent(0.1)] == pytest.approx([16.97, 6.94], abs=5e-3)


@pytest.mark.parametrize("width", [0.07, 0.12, 0.15])
def test_any_width_is_rebuilt_from_two(width: float) -> None:
    steps = range(100, 1001, 100)
    snapshots = [Snapshot(step, tracked) for step in steps for tracked in (0.05, 0.1)]
    shares = ema.coefficients(snapshots, Snapshot(1000, width))
    rebuilt = sum(share * np.pad(profile(*s), (0, 1000 - s.images)) for share, s in zip(shares, snapshots, strict=True))
    wanted = profile(1000, width)
    error = np.linalg.norm(rebuilt - wanted) / np.linalg.norm(wanted)
    assert error < 0.05
    assert ema.misfit(snapshots, Snapshot(1000, width)) == pytest.approx(error, abs=2e-3)


def test_a_width_far_from_those_tracked_cannot_be_rebuilt_from_one_count() -> None:
    once = [Snapshot(1000, 0.05), Snapshot(1000, 0.1)]
    assert ema.misfit(once, Snapshot(1000, 0.07)) < 0.1
    assert ema.misfit(once, Snapshot(1000, 0.02)) > 0.3
    assert ema.coefficients(once, Snapshot(1000, 0.07)).sum() == pytest.approx(1)


def test_a_tracked_width_is_its_own_snapshot() -> None:
    snapshots = [Snapshot(step, width) for step in (50, 100) for width in (0.05, 0.1)]
    assert ema.coefficients(snapshots, Snapshot(100, 0.1)) == pytest.approx([0, 0, 0, 1], abs=1e-9)


@pytest.mark.parametrize("width", [0.001, 0.3])
def test_a_width_that_no_power_function_has_is_refused(width: float) -> None:
    with pytest.raises(UserError, match=r"expected a relative width from 0\.005 to 0\.28"):
        ema.exponent(width)


def test_with_a_ramp_no_average_is_the_random_start() -> None:
    ramped, plain = (SETTINGS.model_copy(update={"ema": 0.9999, "ema_ramp": ramp}) for ramp in (0.05, None))
    assert ema.start_share(plain, 100) == pytest.approx(0.9999**10)
    assert ema.start_share(ramped, 100) < 1e-9
    assert ema.start_share(ramped, 0) == ema.start_share(plain, 0) == 1
    shares = [ema.decays(ramped, step)[ema.EXPONENTIAL] for step in range(1, 11)]
    assert ema.start_share(ramped, 100) == pytest.approx(np.prod(shares))


def test_the_ramp_ends_at_the_decay() -> None:
    """Its half-life is a twentieth of the steps so far: that of 0.99, 69 steps, is reached at step 1,380."""
    before, after = (ema.decays(SETTINGS, step)[ema.EXPONENTIAL] for step in (1379, 1380))
    assert before == pytest.approx(0.5 ** (1 / (0.05 * 1379)))
    assert before < 0.99 == after
