"""How the Triton scan fills a GPU: a function of programs, states, directions and multiprocessors."""

from itertools import pairwise

import pytest

from dis_scale.scan.triton_fill import FULL, Filling, filling
from tests.support.scans import BACKWARD_CYCLES, FORWARD_CYCLES

H200 = 132


def test_enough_programs_keep_one_lane_per_channel() -> None:
    """DiS-L/2 with 32 images: 512 programs. Also with a few more, and with 100 images."""
    assert {filling(programs, 16, 2, H200) for programs in (512, 544, 1600)} == {FULL}
    assert Filling(1, 1, False) == FULL


@pytest.mark.parametrize(
    ("programs", "fill"),
    [(128, Filling(2, 2, True)), (32, Filling(8, 4, True)), (192, Filling(2, 2, True))],
    ids=["8 images", "2 images", "32 images of a narrow model"],
)
def test_few_programs_get_more_lanes_per_channel(programs: int, fill: Filling) -> None:
    assert filling(programs, 16, 2, H200) == fill


@pytest.mark.parametrize(("states", "most"), [(1, 1), (3, 1), (6, 2), (12, 4), (64, 8)])
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


def test_the_lanes_cost_little_more_than_the_best_for_each_number_of_programs() -> None:
    """By the counted cycles, with 4 programs forward and 2 backward at a time on a multiprocessor; one alone takes two's time."""
    pytest.importorskip("triton", reason="Triton comes only with PyTorch's builds for Linux")
    from benchmarks.instructions import busy

    def forward(programs: int, lanes: int) -> float:
        return FORWARD_CYCLES[lanes] * busy(programs * lanes, H200, 4) / lanes

    def backward(programs: int, lanes: int, both: int) -> float:
        return BACKWARD_CYCLES[lanes] * busy(programs * lanes * (1 + both), H200, 2) / (lanes * (1 + both))

    assert [busy(programs, 2, 3) for programs in (1, 2, 3, 4, 6, 7, 8, 9)] == [2, 2, 2, 2, 3, 5, 5, 5]
    losses = list[tuple[float, float]]()
    for programs in range(1, 3 * H200):
        fill = filling(programs, 16, 2, H200)
        best = min(forward(programs, n) for n in FORWARD_CYCLES)
        best_back = min(backward(programs, n, both) for n in BACKWARD_CYCLES for both in (0, 1))
        losses.append(
            (forward(programs, fill.forward) / best, backward(programs, fill.backward, fill.both) / best_back)
        )
    for loss, most, average in zip(zip(*losses, strict=True), (1.12, 1.19), (1.031, 1.066), strict=True):
        assert max(loss) == pytest.approx(most, abs=0.01)
        assert sum(loss) / len(loss) == pytest.approx(average, abs=0.005)
