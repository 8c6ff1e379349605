"""How the scan fills a GPU if there are few images or channels: `filling` depends only on the shape and the GPU.

A program computes 128 channels of an image, so a small batch has fewer programs than a GPU can run. Two methods give more
programs, and neither computes an exponential twice:

    lanes       a channel's states are distributed over 2, 4 or 8 lanes; a program has fewer channels
    both        the backward pass computes both directions in one launch

Another number of lanes sums in another order. So results differ in the last bits between batch sizes and between kinds of GPU, but
never between two runs of one shape on one kind of GPU. More images never get more lanes, so that few kernels are compiled.
benchmarks/results/kernels.md has the counts.
"""

from typing import NamedTuple

FORWARD = {1: 1.9, 2: 1.9, 4: 0.0, 8: 0.0}
BACKWARD = {1: 1.5, 2: 0.35, 4: 0.0, 8: 0.0}
"""Programs per multiprocessor, counted with one lane, above which this many lanes are enough: the fastest on an H100
(tests/scan/test_scan_fill.py). The forward pass's last version was not measured with one lane between 1 and 2.9 programs. In the
forward pass two lanes were never the fastest; eight lanes were the fastest in neither pass."""
MOST_STATES = 16
"""States of a lane: with 64 a thread needs more registers than it has, and the compiler a minute and a half."""


class Filling(NamedTuple):
    """Lanes of a channel in both passes, and whether the backward pass computes both directions at once."""

    forward: int
    backward: int
    both: bool


FULL = Filling(1, 1, False)
"""Enough programs: the kernels with the fewest instructions."""


def filling(programs: int, states: int, directions: int, multiprocessors: int) -> Filling:
    """Return the fewest lanes that fill the GPU; `programs` is that of a launch with one lane per channel.

    With one lane the directions follow each other: their common kernel takes twice as long to compile as with two.
    """
    dividing = [lanes for lanes in FORWARD if states % lanes == 0]
    possible = [lanes for lanes in dividing if states <= lanes * MOST_STATES] or dividing[-1:]
    each = programs / multiprocessors
    forward = next((lanes for lanes in possible if each > FORWARD[lanes]), possible[-1])
    at_once = {1: each, 2: each * directions / 2}
    backward = next((lanes for lanes in possible if at_once[min(lanes, 2)] > BACKWARD[lanes]), possible[-1])
    return Filling(forward, backward, directions == 2 and backward > 1 and each <= BACKWARD[1])
