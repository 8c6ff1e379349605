"""How many lanes a GPU computes at once, and the line for a GPU that is too small."""

import pytest

from dis_scale.process.errors import UserError
from dis_scale.training.lanes import forward_passes, largest_share
from dis_scale.training.memory import BUSY_BYTES, PassPlan, lanes_at_once, plan_passes, state_bytes, worker_bytes
from tests.support.prices import price_of, train

H, L = price_of("DiS-H/2"), price_of("DiS-L/2")
GIB = 2**30


def test_a_gpu_computes_as_many_lanes_as_its_memory_holds() -> None:
    block = train(checkpointing="block")
    lanes = [lanes_at_once("dis-h", H, block, 8, gib * GIB) for gib in (16, 24, 141)]
    assert lanes == sorted(lanes)
    assert 1 <= lanes[0] < lanes[2] <= 8
    assert worker_bytes(H, block, 8, 16 * lanes[0]) <= 0.85 * 16 * GIB < worker_bytes(H, block, 8, 16 * (lanes[0] + 1))
    assert lanes_at_once("dis-h", H, train(checkpointing="block", micro_images=16), 8, 141 * GIB) == 1


def test_scans_keep_their_states_in_memory_that_is_left() -> None:
    """Ten bytes an element in bf16: 8.3 GB for all blocks of L/2 at 32 images, 12.4 for H/2. Not where blocks are recomputed."""
    sizes = [32 * cost.kept_in("bf16").states / 1e9 for cost in (L, H)]
    assert sizes == pytest.approx([8.3, 12.4], abs=0.05)
    one = {"batch_images": 32, "lanes": 1, "workers": 1, "publish_images": (32,)}
    need = worker_bytes(L, train(**one), 1, 32)

    def plan(gpu_bytes: int | None, shared: float = 0.0, **settings: object) -> PassPlan:
        return plan_passes("dis-l", L, train(**one | settings), 1, gpu_bytes, shared)

    assert plan(141 * GIB) == (1, True)
    assert plan(int((need + 8.4e9) / 0.85)) == (1, True)
    assert plan(int((need + 8.2e9) / 0.85)) == (1, False)
    assert plan(141 * GIB, shared=0.75) == (1, False)
    assert plan(141 * GIB, checkpointing="block") == (1, False)
    assert plan(None) == (1, False), "on a CPU"


@pytest.mark.parametrize(
    ("world", "gib", "plan"),
    [
        (4, 139.8, (2, True)),  # as many images as fit would be 240, in two passes of 128
        (8, 79.1, (2, True)),  # 128 images fit, and 64 with the states of their scans
        (8, 50.0, (2, False)),  # three passes of 43 images would wait for Python
        (32, 79.1, (1, True)),
        (32, 24.0, (1, False)),  # 16 images would wait for Python
    ],
)
def test_passes_are_smaller_if_their_states_then_fit_and_the_gpu_stays_busy(world: int, gib: float, plan: tuple[int, bool]) -> None:
    assert plan_passes("dis-l", L, train(), world, int(gib * GIB)) == plan
    images = -(-64 // world // plan[0]) * 16
    assert (images * L.kept_in("bf16").states > BUSY_BYTES * len(L.kept.blocks)) or plan[0] == 1
    asked = plan_passes("dis-l", L, train(micro_images=images), world, int(gib * GIB))
    assert asked.passes == plan[0]


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("gib", [24.0, 50.0, 79.1, 139.8])
@pytest.mark.parametrize("world", [4, 7, 10, 13, 16, 22, 34, 64])
def test_after_an_out_of_memory_less_is_in_memory_until_a_pass_has_one_lane(world: int, gib: float, checkpointing: str) -> None:
    """Without the states of scans, or with a lane less in the largest pass: lanes and passes are whole numbers.

    A worker of each world has another number of the 64 lanes: 16, 10, 7, 5, 4, 3, 2 and 1.
    """

    def planned(short: bool) -> tuple[int, bool]:
        settings = train(checkpointing=checkpointing)
        plan = plan_passes("dis-l", L, settings, world, int(gib * GIB))
        passes, keeps = plan.smaller(largest_share(64, world)) if short else plan
        ranks = [forward_passes(64, rank, world, passes) for rank in range(world)]
        return max(len(part) for rank in ranks for part, _ in rank), keeps

    (lanes, keeps), (fewer, kept) = planned(False), planned(True)
    assert not kept
    assert fewer == lanes if keeps else fewer < lanes or lanes == 1


@pytest.mark.parametrize(("size", "images"), [("S", 178), ("B", 74), ("L", 55), ("H", 31)])
def test_a_pass_whose_states_are_large_keeps_the_gpu_busy(size: str, images: int) -> None:
    """As an H200 and its host took (benchmarks/results/kernels.md), within a factor of 1.6."""
    cost = price_of(f"DiS-{size}/2")
    assert 1 / 1.6 < BUSY_BYTES * len(cost.kept.blocks) / (images * cost.kept_in("bf16").states) < 1.6


def test_a_cpu_computes_one_lane_at_once_unless_asked() -> None:
    assert lanes_at_once("dis-h", H, train(), 8, None) == 1
    assert lanes_at_once("dis-h", H, train(micro_images=32), 8, None) == 2
    assert lanes_at_once("dis-h", H, train(micro_images=64), 32, None) == 2


def test_later_stages_hold_less() -> None:
    total = [sum(state_bytes(H, train(zero_stage=stage), 8).values()) for stage in (1, 2, 3)]
    assert total[0] > total[1] > total[2]


@pytest.mark.parametrize(
    ("settings", "gib", "line"),
    [
        ({"micro_images": 128}, 40, r"needs \d+\.\d GiB for 128 images.*34.0 GiB.*set train.micro_images=\d+$"),
        ({}, 24, r"for 16 images in a forward pass.*: set train.zero_stage=2$"),
        ({}, 18, r": set train.checkpointing=block$"),
        ({}, 8, r": set train.zero_stage=3 and train.checkpointing=block$"),
        ({}, 4, r": use more workers$"),
        ({"graphs": True}, 28, r": set train.graphs=False$"),
        ({"graphs": True, "zero_stage": 2}, 14, r": set train.checkpointing=block and train.graphs=False$"),
        ({"lanes": 8}, 4, r": use GPUs with more memory$"),
    ],
)
def test_a_gpu_that_is_too_small_is_one_line_with_what_fits(settings: dict[str, object], gib: int, line: str) -> None:
    with pytest.raises(UserError, match=line):
        lanes_at_once("dis-h", H, train(**settings), 8, gib * GIB)
