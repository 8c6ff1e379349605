"""The distance against its closed form, its error against repeated draws, and what cannot be measured."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from dis_scale.errors import DisScaleError
from dis_scale.evaluation.metrics import Gaussian, Sums, fit, frechet, frechet_error


def random_gaussian(seed: int, d: int = 6) -> Gaussian:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((d, d))
    return Gaussian(100, rng.standard_normal(d), root @ root.T)


def test_equals_the_formula_with_a_matrix_root() -> None:
    a, b = random_gaussian(0), random_gaussian(1)
    root = sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)


def test_equals_the_closed_form_where_covariances_commute() -> None:
    a = Gaussian(9, np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    b = Gaussian(9, np.array([0.0, 0.0]), np.diag([1.0, 1.0]))
    assert frechet(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 1) ** 2, rel=1e-12)


def test_is_zero_for_the_same_and_symmetric() -> None:
    a, b = random_gaussian(2), random_gaussian(3)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)


def test_the_jackknife_error_is_the_spread_of_repeated_draws() -> None:
    reference, rng = Gaussian(10**6, np.zeros(3), np.eye(3)), np.random.default_rng(0)
    draws = [rng.standard_normal((600, 3)) + 0.5 for _ in range(200)]
    spread = np.std([frechet(fit(x), reference) for x in draws])
    estimate = np.mean([frechet_error(x, reference) for x in draws[:40]])
    assert estimate == pytest.approx(
        spread, rel=0.15
    )  # 200 draws know the spread to 5 %, 20 groups the error to 3 % over 40


def test_sums_merge_to_the_statistics_of_all() -> None:
    features = np.random.default_rng(0).standard_normal((101, 4)) * 3 + 10
    parts = [Sums(), Sums()]
    parts[0].add(features[:40])
    parts[1].add(features[40:70])
    parts[1].add(features[70:])
    merged = parts[0].merge(parts[1]).gaussian()
    np.testing.assert_allclose(merged.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(features, rowvar=False), rtol=1e-10)


def test_too_few_samples_are_said() -> None:
    with pytest.raises(DisScaleError, match="a covariance needs at least 2 samples, got 1"):
        fit(np.zeros((1, 4)))


def test_features_that_are_not_finite_are_named() -> None:
    features = np.zeros((9, 4))
    features[5, 2] = np.nan
    with pytest.raises(DisScaleError, match="features of sample 5 are not finite"):
        fit(features)
