"""How a rank computes its lanes of a step: in forward passes of one or of several lanes.

Lanes fix the images, noise and times of a step, whatever the world size. How many of them share a forward pass is free: it changes
the speed, the memory and the rounding. Read next: loop.py, memory.py.
"""

from collections.abc import Iterable
from typing import NamedTuple


class ForwardPass(NamedTuple):
    """The lanes of one forward pass, and the factor of its mean loss."""

    lanes: range
    weight: float
    """Such that the mean over all passes of all ranks, which DeepSpeed takes, is the mean over all lanes; 1 for equal shares.
    0 for a repeated lane: it keeps this rank in step with ranks that have more lanes."""


def forward_passes(lanes: int, rank: int, world: int, at_once: int) -> list[ForwardPass]:
    """Return a rank's forward passes of a step: equally many on each rank, with at most `at_once` lanes each.

    The shares of two ranks differ by one lane at most. There are at least as many lanes as ranks.
    """
    first, end = rank * lanes // world, (rank + 1) * lanes // world
    passes, own = -(-largest_share(lanes, world) // at_once), end - first
    parts = [range(first + i * own // passes, first + (i + 1) * own // passes) for i in range(passes)]
    return [ForwardPass(part or range(first, first + 1), len(part) * passes * world / lanes) for part in parts]


def with_more_passes(lanes: int, world: int, at_once: int, more: int) -> int:
    """Return the lanes at once with which a step has at least `more` forward passes more; one if they cannot be as many."""
    share = largest_share(lanes, world)
    return max(1, share // (-(-share // at_once) + more)) if more else at_once


def image_counts(passes: Iterable[ForwardPass], lane_images: int) -> set[int]:
    """Return the images of these forward passes: one number, or two if the lanes cannot be shared evenly."""
    return {len(one.lanes) * lane_images for one in passes}


def largest_share(lanes: int, world: int) -> int:
    """Return the lanes of the rank that has most."""
    return -(-lanes // world)
