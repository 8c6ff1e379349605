"""The order is a permutation for each epoch, for any rank, ranges and start; its time and memory are small."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dis_scale.data.order import Order
from dis_scale.process.errors import UserError

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)
BLOCKS = st.integers(1, 5)


def samples_at(order: Order, first: int, last: int) -> list[tuple[int, int]]:
    """(shard, row) at positions [first, last)."""
    locations = order.locate(np.arange(first, last))
    return list(zip(locations.shards.tolist(), locations.rows.tolist(), strict=True))


def everything(counts: list[int]) -> list[tuple[int, int]]:
    return [(shard, row) for shard, count in enumerate(counts) for row in range(count)]


@given(COUNTS, st.integers(0, 3), BLOCKS, st.data())
def test_each_epoch_has_each_sample_once_except_held_out_ones(
    counts: list[int], seed: int, block: int, data: st.DataObject
) -> None:
    held = data.draw(st.integers(0, sum(counts) - 1))
    order = Order(counts, seed, block, held)
    kept_out = list(zip(*(column.tolist() for column in order.held_out), strict=True))
    assert len(set(kept_out)) == held
    for epoch in range(2):
        seen = samples_at(order, epoch * order.total, (epoch + 1) * order.total)
        assert sorted(seen + kept_out) == everything(counts)


@given(COUNTS, st.integers(0, 10_000), BLOCKS)
def test_a_position_does_not_depend_on_earlier_requests(counts: list[int], position: int, block: int) -> None:
    walked = Order(counts, 1, block)
    samples_at(walked, max(0, position - 20), position)
    assert samples_at(walked, position, position + 5) == [
        samples_at(Order(counts, 1, block), p, p + 1)[0] for p in range(position, position + 5)
    ]


@given(COUNTS, BLOCKS, st.integers(0, 100), st.integers(0, 20))
def test_the_shards_near_are_those_of_the_current_blocks_and_the_next(
    counts: list[int], block: int, first: int, width: int
) -> None:
    order = Order(counts, 2, block)
    near, size = order.shards_near(first, first + width), max(counts) * block
    touched = {shard for shard, _ in samples_at(order, first, first + width + 1)}
    assert touched <= set(near)
    assert len(near) == len(set(near)) <= block * (width + 3)
    assert all(counts[shard] for shard in near)
    around = samples_at(order, max(0, first - size), first + 2 * size + width)  # a block's shard may come before `first`
    assert {shard for shard, _ in around} >= set(near)


def test_shards_are_needed_block_by_block() -> None:
    order = Order([10] * 12, seed=0, block_shards=3)
    blocks = [{shard for shard, _ in samples_at(order, first, first + 30)} for first in range(0, 120, 30)]
    assert [len(block) for block in blocks] == [3, 3, 3, 3]
    assert set.union(*blocks) == set(range(12))
    assert set(order.shards_near(0, 5)) == blocks[0] | blocks[1]
    assert order.shards_near(0, 5)[:3] == order.shards_near(29, 29)[:3]


def test_epochs_and_seeds_differ() -> None:
    first = samples_at(Order([8] * 4, 0), 0, 32)
    assert first != samples_at(Order([8] * 4, 0), 32, 64)
    assert first != samples_at(Order([8] * 4, 1), 0, 32)


def test_the_order_is_frozen() -> None:
    """Stored runs can continue only while this holds."""
    order = Order([3, 2, 4], seed=7, block_shards=2, held_out=1)
    assert samples_at(order, 6, 12) == [(0, 1), (0, 0), (1, 1), (2, 3), (2, 1), (2, 2)]


def test_holding_out_everything_is_refused() -> None:
    with pytest.raises(UserError, match="held_out_images: 8 of 8 images would leave none to train on"):
        Order([5, 3], 0, held_out=8)


def test_ten_million_samples_take_little_time_and_memory() -> None:
    """A tenth of the size in benchmarks/results/data.md; the time limit is ten times that of two busy cores."""
    tracemalloc.start()
    began = time.process_time()
    order = Order([1000] * 10_000, 0, held_out=5_000)
    middle = order.total * 7 // 2
    for first in range(middle, middle + 100_000, 256):
        order.locate(np.arange(first, first + 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - began < 5
    assert peak < 4e6


def test_another_order_has_the_same_held_out_images() -> None:
    first, other = (Order([8] * 4, 0, held_out=11, order_seed=seed) for seed in (None, 3))
    assert all(np.array_equal(a, b) for a, b in zip(first.held_out, other.held_out, strict=True))
    assert samples_at(first, 0, 21) != samples_at(other, 0, 21)
    assert sorted(samples_at(first, 0, 21)) == sorted(samples_at(other, 0, 21))
