"""Copies of training images among samples whose number is known."""

import numpy as np
import pytest

from dis_scale.evaluation import sets

COPIED = 0.1
"""Share of the samples that copy a training image, with a little noise."""


def samples_of(real_MD: np.ndarray, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    new, copies = rng.standard_normal((count, real_MD.shape[1])), real_MD[rng.integers(0, len(real_MD), count)]
    copied = rng.random(count)[:, None] < COPIED
    return np.where(copied, copies + 1e-3 * rng.standard_normal(copies.shape), new).astype(np.float32)


def test_a_part_of_the_training_images_tells_the_rate_of_all() -> None:
    """A quarter of the images is compared: without the scale, the rate would be a quarter of the true one."""
    rng, estimates, inside = np.random.default_rng(0), [], []
    for seed in range(20):
        real = rng.standard_normal((2000, 16)).astype(np.float32)
        found = sets.nearest_ratios(samples_of(real, 1000, 1 + seed), real[::4])
        rate, error = sets.copy_rate(*found, known=500, images=2000)
        estimates.append(rate)
        inside.append(abs(rate - COPIED) < 2 * error)
    assert np.mean(estimates) == pytest.approx(COPIED, abs=0.015)
    assert np.mean(inside) >= 0.85


def test_exact_copies_have_no_distance_even_far_from_zero() -> None:
    """Products of features of this size lose distances under one."""
    real = (1e3 + np.random.default_rng(0).standard_normal((1500, 64))).astype(np.float32)
    ratios, nearest = sets.nearest_ratios(real[:1200], real)
    assert ratios.max() == 0
    assert nearest.tolist() == list(range(1200))
    assert sets.copy_rate(ratios, nearest, 1500, 1500)[0] == 1


def test_new_images_are_no_copies_and_the_error_is_that_of_one() -> None:
    rng = np.random.default_rng(0)
    new, real = (rng.standard_normal((500, 16)).astype(np.float32) for _ in range(2))
    rate, error = sets.copy_rate(*sets.nearest_ratios(new, real), known=500, images=5000)
    assert rate == 0
    assert error == pytest.approx(10 / 500)


def test_copies_of_few_images_have_the_error_of_few() -> None:
    """All samples copy one of four images of 2,000, of which a quarter is compared: none, one or a few of the four are in it."""
    rng, estimates, errors = np.random.default_rng(1), [], []
    for _ in range(200):
        real = rng.standard_normal((2000, 16)).astype(np.float32)
        samples = real[rng.choice(2000, 4, replace=False)][rng.integers(0, 4, 400)]
        rate, error = sets.copy_rate(*sets.nearest_ratios(samples, real[:500]), known=500, images=2000)
        estimates.append(rate)
        errors.append(error)
    assert np.mean(np.array(estimates) > 0) == pytest.approx(1 - 0.75**4, abs=0.1)
    assert max(estimates) <= 1
    assert np.median([e for r, e in zip(estimates, errors, strict=True) if r]) > 0.5, "of samples alone it would be 0.08"
