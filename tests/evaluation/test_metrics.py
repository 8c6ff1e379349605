"""The distance against its closed form, its error against repeated sampling, and invalid inputs."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from dis_scale.evaluation.metrics import Frechet, Groups, MeanCovariance, Sums, infinity
from dis_scale.evaluation.sampling import GOLDEN
from dis_scale.process.errors import DisScaleError
from tests.support.metrics import fit, frechet


def random_statistics(seed: int, d: int = 6) -> MeanCovariance:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((d, d))
    return MeanCovariance(100, rng.standard_normal(d), root @ root.T)


def test_equals_the_formula_with_a_matrix_root() -> None:
    a, b = random_statistics(0), random_statistics(1)
    root = sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)


def test_equals_the_closed_form_if_covariances_commute() -> None:
    a = MeanCovariance(9, np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    b = MeanCovariance(9, np.array([0.0, 0.0]), np.diag([1.0, 1.0]))
    assert frechet(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 1) ** 2, rel=1e-12)


def test_is_zero_for_the_same_and_symmetric() -> None:
    a, b = random_statistics(2), random_statistics(3)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)


def test_the_jackknife_error_is_the_spread_of_repeated_samples() -> None:
    reference, rng = Frechet(MeanCovariance(10**6, np.zeros(3), np.eye(3))), np.random.default_rng(0)
    sets = [rng.standard_normal((600, 3)) + 0.5 for _ in range(200)]
    spread = np.std([reference(fit(x)) for x in sets])
    errors = [grouped(x).distance(reference)[1] for x in sets[:40]]
    # 200 sets give the spread to 5 %, 20 groups the error to 3 % over 40
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)  # type: ignore[arg-type]


def grouped(features: np.ndarray, cut: int = 7) -> Groups:
    groups = Groups(len(features))
    groups.add(features[:cut])
    groups.add(features[cut:])
    return groups


def test_the_jackknife_leaves_out_each_twentieth() -> None:
    features, reference = np.random.default_rng(1).standard_normal((107, 4)), Frechet(random_statistics(4, 4))
    group = np.arange(107) * 20 // 107
    left_out = np.array([reference(fit(features[group != g])) for g in range(20)])
    expected = np.sqrt(19 / 20 * ((left_out - left_out.mean()) ** 2).sum())
    distance, error, _ = grouped(features).distance(reference)
    assert distance == pytest.approx(reference(fit(features)), rel=1e-12)
    assert error == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("samples", "has_error"), [(21, False), (22, True)])
def test_no_error_if_a_left_out_set_has_a_singular_covariance(samples: int, has_error: bool) -> None:
    features = np.random.default_rng(1).standard_normal((samples, 19))  # leaves 19 and 20 samples
    assert (grouped(features).distance(Frechet(random_statistics(4, 19)))[1] is not None) == has_error


def test_too_few_samples_for_the_covariance_say_how_many() -> None:
    with pytest.raises(DisScaleError, match="6 samples are too few for the covariance of 6 features: expected at least 7"):
        grouped(np.random.default_rng(0).standard_normal((6, 6)), 3).distance(Frechet(random_statistics(4)))


def test_infinity_is_right_of_samples_with_balanced_labels() -> None:
    """A perfect model of ten classes that are far apart: the limit is 0. By random subsets it is 0.02 below, at 0.004."""
    rng = np.random.default_rng(0)
    means = 1.8 * rng.standard_normal((10, 16))
    perfect = Frechet(MeanCovariance(10**9, means.mean(0), np.eye(16) + np.cov(means.T, bias=True)))
    limits = []
    for seed in range(40):
        labels = (10 * ((rng.random() + np.arange(4000) * GOLDEN) % 1)).astype(int)
        limits.append(infinity(means[labels] + rng.standard_normal((4000, 16)), perfect, seed).value)
    assert abs(np.mean(limits)) < 0.01
    assert np.std(limits) < 0.015


def test_infinity_removes_the_bias_of_few_samples_and_knows_its_spread() -> None:
    reference, rng = Frechet(MeanCovariance(10**6, np.zeros(8), np.eye(8))), np.random.default_rng(0)
    for scale, truth in ((1.0, 0.0), (1.5, 8 * 0.5**2)):
        sets = [scale * rng.standard_normal((400, 8)) for _ in range(120)]
        bias = np.mean([reference(fit(x)) for x in sets]) - truth
        limits, errors, _ = zip(*(infinity(x, reference, 0) for x in sets), strict=True)
        assert abs(np.mean(limits) - truth) < 0.2 * bias
        # 120 sets give the spread to 6 %; near the reference the jackknife is on the safe side
        assert 0.85 < np.mean(errors) / np.std(limits) < (1.25 if truth else 2)


def test_infinity_says_how_many_samples_it_needs() -> None:
    with pytest.raises(DisScaleError, match="39 samples are too few for 8 features: expected at least 40"):
        infinity(np.zeros((39, 8)), Frechet(random_statistics(0, 8)), 0)


def test_sums_merge_to_the_statistics_of_all() -> None:
    features = np.random.default_rng(0).standard_normal((101, 4)) * 3 + 10
    merged = Sums().plus(features[:40]).merge(Sums().plus(features[40:70]).plus(features[70:])).mean_covariance()
    np.testing.assert_allclose(merged.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(features, rowvar=False), rtol=1e-10)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(DisScaleError, match="a covariance needs at least 2 samples, got 1"):
        fit(np.zeros((1, 4)))


def test_features_that_are_not_finite_are_named() -> None:
    features = np.zeros((9, 4))
    features[5, 2] = np.nan
    with pytest.raises(DisScaleError, match="features of sample 5 are not finite"):
        fit(features)
