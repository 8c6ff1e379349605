"""Every lane counts once, and all ranks run equally many forward passes."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dis_scale.training.lanes import forward_passes, image_counts, image_counts_of_all, largest_share


@given(st.integers(1, 64).flatmap(lambda lanes: st.tuples(st.just(lanes), st.integers(1, lanes))), st.integers(1, 9))
def test_the_mean_over_passes_and_ranks_is_the_mean_over_lanes(lanes_and_world: tuple[int, int], passes: int) -> None:
    lanes, world = lanes_and_world
    passes = min(passes, largest_share(lanes, world))
    ranks = [forward_passes(lanes, rank, world, passes) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {passes}
    shares: defaultdict[int, float] = defaultdict(float)
    for part, weight in (each for rank in ranks for each in rank):
        assert 1 <= len(part) <= -(-largest_share(lanes, world) // passes)
        for lane in part:
            shares[lane] += weight / len(part) / (passes * world)
    assert shares == pytest.approx(dict.fromkeys(range(lanes), 1 / lanes))


def test_equal_shares_have_the_weight_one_exactly() -> None:
    passes = forward_passes(64, 3, 8, 4)
    assert passes == [(range(24, 26), 1.0), (range(26, 28), 1.0), (range(28, 30), 1.0), (range(30, 32), 1.0)]


def test_seven_of_eight_nodes_train() -> None:
    """64 lanes on 56 workers: eight of them have two, and no worker runs more than two passes."""
    shares = [forward_passes(64, rank, 56, 2) for rank in range(56)]
    assert Counter(sum(weight > 0 for _, weight in rank) for rank in shares) == {1: 48, 2: 8}


def test_lanes_that_cannot_be_shared_evenly_make_passes_of_two_sizes() -> None:
    """Seven lanes of four images: one rank has three of them in two passes, the other four."""
    assert [image_counts(forward_passes(7, rank, 2, passes=2), 4) for rank in (0, 1)] == [{4, 8}, {8}]
    assert image_counts(forward_passes(8, 0, 2, passes=2), 4) == {8}
    assert image_counts_of_all(7, 2, 2, 4) == {4, 8}
