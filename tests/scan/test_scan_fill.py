"""How the Triton scan fills a GPU: a function of programs, states, directions and multiprocessors."""

import pytest

from dis_scale.scan.triton_fill import FULL, Filling, busy, filling

H200 = 132


def test_enough_programs_keep_one_lane_per_channel() -> None:
    """DiS-L/2 with 32 images: 512 programs. Also with a few more, and with 100 images."""
    assert {filling(programs, 16, 2, H200) for programs in (512, 544, 1600)} == {FULL}
    assert Filling(1, 1, False) == FULL


@pytest.mark.parametrize(
    ("programs", "fill"),
    [(128, Filling(2, 1, True)), (32, Filling(8, 4, True)), (192, Filling(2, 2, True))],
    ids=["8 images", "2 images", "32 images of a narrow model"],
)
def test_few_programs_get_more_lanes_per_channel(programs: int, fill: Filling) -> None:
    assert filling(programs, 16, 2, H200) == fill


@pytest.mark.parametrize(("states", "most"), [(1, 1), (3, 1), (6, 2), (12, 4), (64, 8)])
def test_lanes_divide_the_states(states: int, most: int) -> None:
    assert filling(1, states, 2, H200) == Filling(most, most, True)


def test_a_single_direction_has_no_other_one_at_once() -> None:
    assert not any(filling(programs, 16, 1, H200).both for programs in range(1, 600))


def test_the_busiest_multiprocessor_runs_rounds_of_programs() -> None:
    """A program alone in a round takes as long as two."""
    assert [busy(programs, 2, 3) for programs in (1, 2, 3, 4, 6, 7, 8, 9)] == [2, 2, 2, 2, 3, 5, 5, 5]
