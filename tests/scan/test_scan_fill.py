"""How the Triton scan fills a GPU: a function of programs, states, directions and multiprocessors."""

from itertools import pairwise

import pytest

from dis_scale.scan.triton_fill import FULL, Filling, filling

H200 = 132
"""Multiprocessors, as many as an H100 has."""
FORWARD_US = {512: {1: 263, 2: 368}, 384: {1: 229, 4: 263}, 64: {2: 67, 4: 54, 8: 65}, 32: {4: 39, 8: 40}}
BACKWARD_US = {256: {1: 436, 2: 488}, 128: {2: 246, 4: 301}, 64: {2: 128, 4: 153, 8: 263}, 32: {2: 91, 4: 77, 8: 133}}
"""Measured on an H100: both directions' kernels by programs (16 an image at L258 E2048 N16 in bf16), and by lanes of a channel."""


def test_enough_programs_keep_one_lane_per_channel() -> None:
    """DiS-L/2 with 32 images: 512 programs. Also with a few more, and with 100 images."""
    assert {filling(programs, 16, 2, H200) for programs in (512, 544, 1600)} == {FULL}
    assert Filling(1, 1, False) == FULL


@pytest.mark.parametrize(
    ("programs", "fill"),
    [(128, Filling(4, 2, True)), (32, Filling(4, 4, True)), (192, Filling(4, 2, True))],
    ids=["8 images", "2 images", "32 images of a narrow model"],
)
def test_few_programs_get_more_lanes_per_channel(programs: int, fill: Filling) -> None:
    assert filling(programs, 16, 2, H200) == fill


@pytest.mark.parametrize(("states", "most"), [(1, 1), (3, 1), (6, 2), (12, 4), (64, 4)])
def test_lanes_divide_the_states(states: int, most: int) -> None:
    assert filling(1, states, 2, H200) == Filling(most, most, most > 1)


@pytest.mark.parametrize(("states", "least"), [(16, 1), (24, 2), (64, 4), (256, 8), (33, 1)])
def test_a_lane_has_no_more_states_than_registers_hold(states: int, least: int) -> None:
    """Also on a full GPU; an odd number of states has one lane at any rate."""
    assert filling(9999, states, 2, H200) == Filling(least, least, False)


@pytest.mark.parametrize("directions", [1, 2])
def test_more_images_never_get_more_lanes(directions: int) -> None:
    """Each choice is a set of kernels to compile: no set has one lane for both directions, which takes longest."""
    each = [filling(programs, 16, directions, H200) for programs in range(1, 600)]
    assert all(a.forward >= b.forward and a.backward >= b.backward for a, b in pairwise(each))
    assert {fill.both for fill in each if fill.backward > 1} == {directions == 2}
    assert not any(fill.both for fill in each if fill.backward == 1)


@pytest.mark.parametrize(("way", "measured"), [("forward", FORWARD_US), ("backward", BACKWARD_US)])
def test_the_lanes_are_the_fastest_measured(way: str, measured: dict[int, dict[int, int]]) -> None:
    for programs, us in measured.items():
        assert us[getattr(filling(programs, 16, 2, H200), way)] == min(us.values())
