"""Forecasts of a training on a fleet: memory as measured, messages, the interval of resume points, and 1 to 1,024 GPUs."""

import json
import math
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from benchmarks import throughput
from dis_scale.models import build
from dis_scale.models.cost import Cost
from dis_scale.models.dit.settings import Dit
from dis_scale.planning.fleet import (
    ASSUMED_MFU,
    GPUS,
    GRAPHS_HOST_S,
    HOST_S,
    MEMORY_GB_S,
    MOST_GPUS,
    OPTIMIZER_BYTES,
    STEP_S,
    Fleet,
    forecast,
    memory_grid,
    pass_images,
    preemption,
    wire_bytes,
)
from dis_scale.planning.plan import on_fleet, price_sweep
from dis_scale.process.machine import free_ports
from dis_scale.recipe import LatentShape, reading
from dis_scale.training import engine, resume
from dis_scale.training.memory import most_images, plan_passes, worker_bytes
from tests.support import ranks
from tests.support.prices import price, price_of, train

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
SHAPE = LatentShape(4, 32)
H = price_of("DiS-H/2")
WEIGHTS = 4 * H.parameters
GIB = 2**30


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_a_forecast_has_the_forward_passes_of_training(gpu: str) -> None:
    """More than memory needs, where the scans' states then fit."""
    settings, fleet = train(zero_stage=2), Fleet(gpu, 8)
    passes = plan_passes("h", H, settings, 8, fleet.gpu_bytes)
    assert passes.keeps_states
    assert forecast(H, settings, 1024, fleet).wire_bytes == wire_bytes(H, settings, 8, passes.passes)


def test_memory_is_within_a_tenth_of_what_was_measured() -> None:
    """Peak of all tensors in real training steps, by `python -m benchmarks.record cpu memory`."""
    _, *rows = json.loads((RESULTS / "cpu.json").read_text())["benchmarks"]["memory"]
    assert len({row["size"] for row in rows}) >= 3
    assert {row["zero_stage"] for row in rows} == {1, 2, 3}
    assert {row["checkpointing"] for row in rows} > {"none", "block"}
    for row in rows:
        settings = train(
            batch_images=row["images"], lanes=1, workers=1, publish_images=(row["images"],), precision="fp32",
            zero_stage=row["zero_stage"], checkpointing=row["checkpointing"],
        )  # fmt: skip
        text = f"{{preset: {row['size']}}}"
        model = reading.load("imagenet256", [f"models={{model: {text}}}"]).models["model"]
        computed = worker_bytes(price(model, SHAPE, 1000), settings, 1, row["images"])
        assert computed / GIB == pytest.approx(row["measured_gib"], rel=0.1), row


def test_a_gpus_memory_is_within_a_tenth_of_what_was_measured() -> None:
    """On an H200, by the jobs of the bring-up, among them some with graphs."""
    measured = json.loads((RESULTS / "h200.json").read_text())["benchmarks"]
    rows = {row["name"]: row["memory_gib"] for part in ("throughput", "settings") for row in measured[part] if "memory_gib" in row}
    jobs = {f"train {job.name}": job for job in throughput.SIZED + throughput.VARIED}
    found = {name: jobs[name] for name in rows if name in jobs}
    assert len(found) >= 14
    assert {job.graphs for job in found.values()} == {False, True}
    for name, job in found.items():
        computed = throughput.computed(job, throughput.recipe_of(job, "cuda"), int(GPUS["h200"].memory_gib * GIB))
        assert computed["formula_gib"] == pytest.approx(rows[name], rel=0.1), name


@pytest.mark.parametrize(
    ("settings", "passes", "rounds"),
    [({"zero_stage": 1}, 4, 3), ({"zero_stage": 2}, 4, 9), ({"zero_stage": 3}, 4, 12)],
    ids=["1", "2", "3"],
)
def test_a_rank_sends_its_share_of_each_round(settings: dict[str, object], passes: int, rounds: int) -> None:
    assert wire_bytes(H, train(**settings), 1, passes) == 0
    assert wire_bytes(H, train(**settings), 4, passes) == rounds * WEIGHTS * 3 / 4


SENT = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
"""Collectives of a step, and how often a ring sends what they are given."""
PASSES = 2


def test_two_ranks_send_what_the_formula_says(tmp_path: Path) -> None:
    """Elements that DeepSpeed gives to its collectives in a real step, at each stage; small weights are kept at stage 3."""
    (port,) = free_ports(1)
    ranks.start_server()
    start_processes(_rank, (2, port, tmp_path), 2, start_method="forkserver")
    counted = json.loads((tmp_path / "counted.json").read_text())
    cost = price(SENDER, LatentShape(4, 4), 10)
    for stage in (1, 2, 3):
        sent = sum(SENT[name] * elements for name, elements in counted[str(stage)].items()) * 4 / 2
        assert wire_bytes(cost, train(zero_stage=stage), 2, PASSES) == pytest.approx(sent, rel=0.1), stage


SENDER = Dit(kind="dit", width=512, depth=2, heads=8, patch=2)


def _rank(rank: int, world: int, port: int, folder: Path) -> None:
    """Take a step at each stage, and count what its collectives are given."""
    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.set_num_threads(1)
    cpu, counts = torch.device("cpu"), Counter[str]()
    for name in SENT:
        setattr(dist, name, _counting(getattr(dist, name), name, counts))
    engine.connect(cpu)
    found = {}
    for stage in (1, 2, 3):
        model = build(SENDER, LatentShape(4, 4), 10)
        sharded = engine.start(model, train(zero_stage=stage), cpu, resume.fresh(model), 0, PASSES)
        for _ in range(2):  # the second is counted: the first gathers more
            counts.clear()
            for _ in range(PASSES):
                out = sharded.deepspeed(torch.randn(1, 4, 4, 4), torch.rand(1), torch.zeros(1, dtype=torch.long))
                sharded.micro_step(out.square().mean())
        found[stage] = dict(counts)
    if rank == 0:
        (folder / "counted.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # DeepSpeed's threads do not end


def _counting(collective: Any, name: str, counts: Counter[str]) -> Any:
    def counted(*arguments: Any, **named: Any) -> Any:
        tensors = [each for each in (*arguments, *named.values()) if isinstance(each, torch.Tensor)]
        counts[name] += max(tensor.numel() for tensor in tensors)  # of all ranks together, in and out
        return collective(*arguments, **named)

    return counted


def test_resume_points_come_at_the_interval_of_least_loss() -> None:
    """Daly's interval is Young's for short pauses, and no other interval loses less by his model of the run time."""
    best_s, loss = preemption(4, pause_s=2.0, write_s=0.0, restart_s=0.0)
    mean_s = 86_400 / 4
    assert best_s == pytest.approx(math.sqrt(2 * 2.0 * mean_s), rel=0.01)

    def run_time(every_s: float) -> float:
        """Daly 2006, equation 20, for one second of work, without restarts."""
        return mean_s * math.expm1((every_s + 2.0) / mean_s) / every_s

    assert run_time(best_s) <= min(run_time(factor * best_s) for factor in (0.5, 0.9, 1.1, 2))
    assert loss == pytest.approx(run_time(best_s) - 1, rel=0.02)


def test_without_preemption_nothing_is_lost_and_a_constant_one_loses_all() -> None:
    assert preemption(0, 2.0, 1.0, 60.0) == (math.inf, 0.0)
    assert preemption(86_400, 2.0, 1.0, 60.0)[1] == 1
    assert preemption(4, 0.0, 30.0, 60.0)[0] == 30, "a resume point is written before the next one"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_gpus_take_less_time_up_to_the_lanes(stage: int) -> None:
    counts = [2**n for n in range(11)]
    assert counts[-1] == MOST_GPUS
    found = {n: forecast(H, train(zero_stage=stage), 102_400_000, Fleet("h100", n)) for n in counts}
    days = [each.days for each in found.values()]
    assert all(more <= 1.05 * fewer for fewer, more in pairwise(days)), "a rank of a larger ring sends a little more"
    assert {n: each.gpus for n, each in found.items()} == {n: min(n, 64) for n in counts}
    flops = 102_400_000 * H.training_flops(16)
    steps = 102_400_000 / train().batch_images
    optimizer_s = steps * (STEP_S + H.parameters * OPTIMIZER_BYTES / (1e9 * MEMORY_GB_S))
    assert found[1].days == pytest.approx((flops / (989e12 * ASSUMED_MFU) + optimizer_s) / 86_400)
    assert found[64].days >= found[1].days / 64
    assert all(each.fits for each in found.values())


def test_python_sets_the_pace_of_a_small_model_on_many_gpus() -> None:
    """On 2 GPUs S/2 is paced by them, on 64 by Python: a pass of 25 blocks takes 90 ms, whatever its images."""
    small, settings = price_of("DiS-S/2"), train()
    few, many = (forecast(small, settings, 1024, Fleet("h200", count)) for count in (2, 64))
    assert few.steps_per_s == pytest.approx(
        1 / (512 * small.training_flops(512) / Fleet("h200", 2).flops("bf16") + optimizer(small, 2))
    )
    assert many.steps_per_s == pytest.approx(1 / (25 * HOST_S + optimizer(small, 64)))
    graphs = forecast(small, train(graphs=True), 1024, Fleet("h200", 64))
    assert graphs.steps_per_s == pytest.approx(1 / (25 * GRAPHS_HOST_S + optimizer(small, 64)))


def optimizer(cost: Cost, world: int) -> float:
    return STEP_S + cost.parameters / world * OPTIMIZER_BYTES / (1e9 * MEMORY_GB_S)


def test_the_most_images_are_those_that_fit() -> None:
    for settings in (train(), train(zero_stage=3, checkpointing="block")):
        usable = 60 * GIB
        most = most_images(H, settings, 8, usable)
        assert worker_bytes(H, settings, 8, most) <= usable < worker_bytes(H, settings, 8, most + 1)
    assert most_images(H, train(), 8, GIB) == 0
    assert not forecast(H, train(micro_images=128), 1024, Fleet("a100-40", 8)).fits


def test_a_branch_begins_when_its_trunk_is_there_and_its_resume_point_is_stored() -> None:
    """On many GPUs a sweep takes as long as its longest chain; the end of a trunk is far from the end of its branches."""
    cooldowns = "train.cooldowns={images: [25600000, 51200000, 102400000], share: 0.3}"
    recipe = reading.load(Path("configs/imagenet256.yaml"), [cooldowns, "train.publish_images=[92160000]"])
    plan = price_sweep(recipe, SHAPE)
    found = on_fleet(plan, Fleet(gpu="h100", count=1024))
    branches = {name: model.branch for name, model in recipe.models.items() if model.branch}
    assert branches
    trunk = next(iter(branches.values())).of
    ends = [
        found.models[trunk].expected_days * b.at / recipe.train_of(trunk).images + found.models[name].expected_days
        for name, b in branches.items()
        if b.of == trunk
    ]
    assert max(ends) > found.models[trunk].expected_days
    assert found.by_gpus[-1].days == pytest.approx(max(ends), rel=1e-3)
    points = recipe.train.keep_resume + recipe.train.keep_spaced + len(recipe.branches_at(trunk))
    assert found.models[trunk].stored_bytes >= points * 4 * plan.costs[trunk].parameters * 4


def test_the_memory_of_a_pass_is_that_of_a_workers_share() -> None:
    assert pass_images(train(micro_images=256), 64) == 16
    assert memory_grid(H, train(micro_images=256), 64) == memory_grid(H, train(), 64)
    assert memory_grid(H, train(micro_images=32), 8)["ZeRO 1, none"] > memory_grid(H, train(), 8)["ZeRO 1, none"]


def test_a_gpu_has_the_peak_of_the_meters_table() -> None:
    from dis_scale.training.throughput import DATASHEET_TFLOPS

    peaks = {(bf16, fp32) for bf16, fp32 in DATASHEET_TFLOPS.values()}
    assert {(gpu.bf16, gpu.fp32) for gpu in GPUS.values()} == peaks
