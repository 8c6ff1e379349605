"""How the scan fills a GPU if there are few images or channels: `filling`, a function of the shape and the GPU alone.

A program computes 128 channels of an image, so a small batch has fewer programs than a GPU has capacity. Two ways give more,
and neither computes an exponential twice:

    lanes       a channel's states are distributed over 2, 4 or 8 lanes; a program has fewer channels
    both        the backward pass computes both directions in one launch

Other lanes sum in another order, so results differ in the last bits between batch sizes and GPUs, never between two runs of one
shape on one kind of GPU. benchmarks/results/kernels.md has the counts.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

FORWARD_CYCLES = {1: 18.0, 2: 18.0, 4: 19.3, 8: 23.3}
BACKWARD_CYCLES = {1: 22.4, 2: 24.4, 4: 25.8, 8: 28.9}
"""Cycles per state, step and warp by lanes of a channel, counted by benchmarks/instructions.py: both directions forward, one
backward."""
FORWARD_RESIDENT, BACKWARD_RESIDENT = 4, 2
"""Programs of 128 threads that a multiprocessor holds at a time, by their registers."""
ALONE = 2
"""Time of a program alone on a multiprocessor, relative to its share of a full one: a single warp per scheduler is assumed to
issue every second cycle, since nothing hides its latency."""


ENOUGH = 3
"""Programs of a multiprocessor from which on a GPU counts as full: one more or less in the last round is no reason for other
kernels."""


class Filling(NamedTuple):
    """Lanes of a channel in both passes, and whether the backward pass computes both directions at once."""

    forward: int
    backward: int
    both: bool


FULL = Filling(1, 1, False)
"""Enough programs: the kernels with the fewest instructions."""


@functools.cache
def filling(programs: int, states: int, directions: int, multiprocessors: int) -> Filling:
    """Return the way of the least time by the count of instructions; `programs` is that of a launch with one lane per channel."""

    def forward_time(lanes: int) -> float:
        return FORWARD_CYCLES[lanes] * busy(programs * lanes, multiprocessors, FORWARD_RESIDENT) / lanes

    def backward_time(way: tuple[int, int]) -> float:
        lanes, at_once = way
        programs_at_once = programs * lanes * at_once
        return BACKWARD_CYCLES[lanes] * busy(programs_at_once, multiprocessors, BACKWARD_RESIDENT) / (lanes * at_once)

    if programs >= ENOUGH * multiprocessors:
        return FULL
    possible = [lanes for lanes in FORWARD_CYCLES if states % lanes == 0]
    lanes, at_once = min(((lanes, n) for lanes in possible for n in range(1, directions + 1)), key=backward_time)
    return Filling(min(possible, key=forward_time), lanes, at_once == 2)


def busy(programs: int, multiprocessors: int, resident: int) -> int:
    """Time that the busiest multiprocessor takes, in programs at full issue; `resident` programs run at a time."""
    return sum(max(ALONE, together) for together in _rounds(-(-programs // multiprocessors), resident))


def _rounds(programs: int, resident: int) -> Iterator[int]:
    for done in range(0, programs, resident):
        yield min(resident, programs - done)
