"""Distributes the lanes of a step over ranks and their forward passes of one or several lanes.

Lanes fix the images, noise and times of a step, whatever the world size. The number of lanes per forward pass is free: it changes
the speed, the memory and the rounding. Read next: loop.py, memory.py.
"""

from collections.abc import Iterable
from typing import NamedTuple


class ForwardPass(NamedTuple):
    """The lanes of one forward pass, and the factor of its mean loss."""

    lanes: range
    weight: float
    """Factor that turns DeepSpeed's mean over all passes of all ranks into the mean over all lanes; 1 for equal shares.
    0 for a repeated lane: it keeps this rank in step with ranks that have more lanes."""


def forward_passes(lanes: int, rank: int, world: int, passes: int) -> list[ForwardPass]:
    """Return a rank's forward passes of a step. Their number is `passes` on each rank; their lanes differ by one at most.

    The lanes of two ranks also differ by one at most. There are at least as many lanes as ranks.
    """
    first, end = rank * lanes // world, (rank + 1) * lanes // world
    own = end - first
    parts = [range(first + i * own // passes, first + (i + 1) * own // passes) for i in range(passes)]
    return [ForwardPass(part or range(first, first + 1), len(part) * passes * world / lanes) for part in parts]


def image_counts(passes: Iterable[ForwardPass], lane_images: int) -> set[int]:
    """Return the images of these forward passes: one number, or two if the lanes cannot be shared evenly."""
    return {len(one.lanes) * lane_images for one in passes}


def image_counts_of_all(lanes: int, world: int, passes: int, lane_images: int) -> set[int]:
    """Return the images of the forward passes of all ranks."""
    return set().union(*(image_counts(forward_passes(lanes, rank, world, passes), lane_images) for rank in range(world)))


def largest_share(lanes: int, world: int) -> int:
    """Return the largest number of lanes of a rank."""
    return -(-lanes // world)
