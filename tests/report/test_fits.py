"""Correlation, power law and hull on points with known results."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dis_scale.report.fits import lower_hull, pearson, power_law, welch_margin
from dis_scale.report.points import Error


def test_correlation_is_on_log_gflops() -> None:
    assert pearson([1, 10, 100], [3, 2, 1]) == pytest.approx(-1)
    assert pearson([1, 2], [2, 1]) is None
    assert pearson([5, 5, 5], [3, 2, 1]) is None


def test_a_power_law_is_found_with_its_interval() -> None:
    costs = np.array([1.0, 3, 10, 30, 100])
    exact = power_law(list(costs), list(7 * costs**-0.4))
    assert exact is not None
    assert (exact.factor, *exact.exponent) == pytest.approx((7, -0.4, -0.4, -0.4))
    assert power_law(list(costs[:3]), [3.0, 2.0, 1.0]) is None


def test_two_different_costs_cannot_tell_whether_a_law_bends() -> None:
    """Two sizes, each with two rates."""
    found = power_law([1, 1, 2, 2], [100, 104, 50, 52])
    assert found
    assert found.exponent.low < -1 < found.exponent.high


def test_the_law_is_that_of_what_is_above_the_floor() -> None:
    costs = np.array([1.0, 3, 10, 30, 100])
    distances = 5 + 7 * costs**-0.4
    above = power_law(list(costs), list(distances), floor=5)
    assert above is not None
    assert above.exponent.value == pytest.approx(-0.4)
    assert above.at(costs) == pytest.approx(distances)
    assert power_law(list(costs), list(distances), floor=6.5) is None, "a distance is below the floor"


def test_the_interval_covers_the_exponent_in_95_percent() -> None:
    rng, costs, held = np.random.default_rng(0), np.geomspace(1, 100, 6), list[bool]()
    for _ in range(400):
        law = power_law(list(costs), list(7 * costs**-0.4 * np.exp(0.1 * rng.standard_normal(6))))
        assert law is not None
        if law.exponent.known:
            held.append(law.exponent.low <= -0.4 <= law.exponent.high)
    assert 0.92 < np.mean(held) < 0.98  # 95 % within three binomial errors of 400 tries
    assert len(held) > 0.9 * 400, "5 % of straight lines are taken for bent ones"


@pytest.mark.parametrize("limit", [0.0, 2.0, 10.0])
def test_the_interval_holds_the_mean_slope_over_the_sizes(limit: float) -> None:
    """Whatever the models' limit is: with four sizes nobody sees it, and no exponent of a law is claimed."""
    rng, costs, held = np.random.default_rng(0), np.geomspace(1, 64, 4), list[bool]()
    true = limit + 60 * costs**-0.5
    slope = np.polyfit(np.log(costs), np.log(true), 1)[0]
    for _ in range(400):
        law = power_law(list(costs), list(true * np.exp(0.02 * rng.standard_normal(4))))
        assert law is not None
        if law.exponent.known:
            held.append(law.exponent.low <= slope <= law.exponent.high)
    assert np.mean(held) > 0.92


def test_an_error_of_one_value_tells_nothing() -> None:
    assert welch_margin([Error(0.1, 1), Error(0.1, 3)]) == np.inf
    assert welch_margin([]) == welch_margin([Error(0.0, 20)]) == np.inf
    assert welch_margin([Error(0.0, 1), Error(0.1, 20)]) == pytest.approx(0.1 * 2.093, rel=1e-3)


@pytest.mark.parametrize("sizes", [[7.57, 30.6, 60.1, 104.9, 231.7], np.geomspace(6, 231, 4), np.geomspace(6, 231, 8)])
def test_models_that_have_a_limit_above_the_floor_have_no_exponent_with_an_interval(sizes: list[float]) -> None:
    """What their sampling or autoencoder adds to the distance bends the line: its ends have other exponents."""
    costs, refused, bent = np.array(sizes), 0, 10 + 130 * np.power(sizes, -0.6)
    for seed in range(200):
        noise = np.exp(0.005 * np.random.default_rng(seed).standard_normal(len(costs)))
        law, straight = (power_law(list(costs), list(1.8 + values * noise), 1.8) for values in (bent, 130 * costs**-0.6))
        assert law
        assert straight
        refused += not law.exponent.known
        assert law.exponent.known or "no interval" in law.exponent.words(".2f")
        assert straight.exponent.value == pytest.approx(-0.6, abs=0.02)
    assert refused > 170


def test_the_hull_leaves_out_points_above_it() -> None:
    costs, distances = [1, 2, 10, 50, 100, 200], [100, 90, 10, 9.5, 5, 6]
    assert lower_hull(costs, distances) == [0, 2, 4]


@given(st.lists(st.tuples(st.floats(0.1, 1e4), st.floats(0.1, 1e4)), min_size=1, max_size=20))
def test_no_point_is_below_the_hull(points: list[tuple[float, float]]) -> None:
    costs, distances = zip(*points, strict=True)
    hull = lower_hull(costs, distances)
    x, y = np.log(costs), np.log(distances)
    assert list(x[hull]) == sorted(x[hull])
    assert y[hull[-1]] == y.min()
    inside = (x >= x[hull[0]]) & (x <= x[hull[-1]])
    assert (y[inside] >= np.interp(x[inside], x[hull], y[hull]) - 1e-9).all()
