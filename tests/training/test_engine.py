"""What the engine gives to DeepSpeed, and what it reads from it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from dis_scale.models import build, transfer
from dis_scale.models.diffussm.s4d import S4D
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dit.settings import Dit
from dis_scale.process.errors import BrokenDevice, DisScaleError, WrongKernel
from dis_scale.recipe import LatentShape, Train, reading
from dis_scale.scan import FALLBACK, Choice
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Run
from dis_scale.training import devices, engine, resume
from dis_scale.training.attempt import require_one_scan
from dis_scale.training.engine import Engine, Segment
from tests.conftest import TINY
from tests.support import ranks
from tests.support.ranks import at_each_stage, on_ranks

SHAPE = LatentShape(4, 8)
DIS = Dis(kind="dis", width=16, depth=2, patch=2)
DIFFUSSM = DiffuSsm(kind="diffussm", width=16, depth=1)


def train(**settings: Any) -> Train:
    return Train(**(dict[str, Any](publish_images=(8,), batch_images=8, lanes=1) | settings))


def require_time_limits(state: Engine) -> None:
    """Each group has the connection's, also the one that DeepSpeed makes to reduce: NCCL's own is ten minutes, gloo's thirty."""
    own: Any = dist.group.WORLD, dist.new_group(backend="gloo")
    groups = [*own, state.deepspeed.optimizer.dp_process_group, state.hosts]
    limits = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    assert limits == [ranks.WAITS_S] * 4
    assert dist.distributed_c10d._get_default_timeout(dist.Backend("nccl")).total_seconds() == ranks.WAITS_S


def test_a_check_that_fails_on_one_rank_is_the_fault_of_its_device() -> None:
    """And a mistake where it fails on all: a model would end on every node that it is placed on."""
    on_ranks(3, checks_on_all)


def test_a_scan_that_falls_back_on_one_rank_is_the_fault_of_its_node() -> None:
    """All others waited for it, and nobody said so: one rank logs what it runs."""
    on_ranks(3, falls_back, {1})
    on_ranks(2, falls_back, {0, 1})


def falls_back(without_compiler: set[int]) -> None:
    chosen = Choice(FALLBACK, "auto: no compiler") if dist.get_rank() in without_compiler else Choice("native", "auto: cpu")
    if dist.get_rank() not in without_compiler or len(without_compiler) == dist.get_world_size():
        require_one_scan(chosen)
    else:
        with pytest.raises(BrokenDevice, match=r"scan would be chunked \(auto: no compiler\), that of others is native"):
            require_one_scan(chosen)
    dist.barrier()


def checks_on_all() -> None:
    """By an error of ours, of CUDA, and of Triton, which is neither."""
    for kind in (DisScaleError, RuntimeError, AssertionError):
        for failing in ({1}, {0, 1, 2}, set[int]()):
            checks(failing, kind)


def checks(failing: set[int], kind: type[Exception]) -> None:
    def check() -> None:
        if dist.get_rank() in failing:
            raise kind("the scan is wrong")

    expected = BrokenDevice if len(failing) == 1 else kind
    if dist.get_rank() not in failing:
        devices.check_on_all_ranks(check)
    else:
        with pytest.raises(expected, match="the scan is wrong") as caught:
            devices.check_on_all_ranks(check)
        assert type(caught.value) is expected
    dist.barrier()


def test_a_kernel_that_fails_on_all_nodes_is_the_fault_of_none() -> None:
    """CUDA's words for it are those of a failed device: each node in turn would be excluded, and a model end after two days."""
    on_ranks(2, fails_on_all_nodes, "CUDA error: unspecified launch failure", WrongKernel)
    on_ranks(2, fails_on_all_nodes, "CUDA error: out of memory", RuntimeError)
    on_ranks(2, fails_on_all_nodes, "unable to mmap 4096 bytes", RuntimeError)


def fails_on_all_nodes(words: str, expected: type[Exception]) -> None:
    def check() -> None:
        raise RuntimeError(words)

    for nodes, raised in (("1", RuntimeError), ("2", expected)):
        os.environ["GROUP_WORLD_SIZE"] = nodes
        with pytest.raises(raised, match=words) as caught:
            devices.check_on_all_ranks(check)
        assert type(caught.value) is raised
    dist.barrier()


def test_bf16_training_computes_the_scans_kernels_in_float32() -> None:
    """Rounded to bfloat16, S4D's parameters give a kernel that is 31 % off at 1,024 taps (median over channels)."""
    on_ranks(1, at_each_stage, kernels_are_exact)


def kernels_are_exact(stage: int) -> None:
    exact = [scan.kernel(1024) for scan in build(DIFFUSSM, SHAPE, 10).modules() if isinstance(scan, S4D)]
    model, kernels = build(DIFFUSSM, SHAPE, 10, precision="bf16"), list[torch.Tensor]()
    for scan in model.modules():
        if isinstance(scan, S4D):
            scan.register_forward_hook(lambda scan, *_: kernels.append(scan.kernel(1024)))
    settings = train(zero_stage=stage, precision="bf16")
    state = engine.start(model, settings, torch.device("cpu"), resume.fresh(model), adam_step=0)
    out = state.deepspeed(torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2))
    assert out.dtype == torch.bfloat16
    errors = [torch.linalg.norm(a - b) / torch.linalg.norm(b) for a, b in zip(kernels, exact, strict=True)]
    assert len(errors) == 2
    assert max(errors) < 1e-6


@pytest.mark.parametrize(
    ("stage", "precision", "lanes", "workers", "tolerance"),
    [
        pytest.param(1, "bf16", 64, 8, 1e-3, marks=pytest.mark.slow),
        pytest.param(2, "bf16", 16, 4, 1e-3, marks=pytest.mark.slow),
        (3, "bf16", 16, 2, 1e-3),
    ],
)
def test_the_gradient_does_not_depend_on_the_number_of_workers(
    tmp_path: Path, stage: int, precision: str, lanes: int, workers: int, tolerance: float
) -> None:
    """64 lanes on one worker and on eight; 16 on one, two and four: gradients are added in float32. test_oracle.py has float32."""
    first_moments = []
    for world in (1, workers):
        how = [
            "train.clip=0",
            f"train.precision={precision}",
            f"train.lanes={lanes}",
            f"train.batch_images={lanes}",
            f"train.zero_stage={stage}",
            f"train.workers={world}",
        ]
        recipe = reading.load(TINY, [*how, f"train.publish_images=[{lanes}]", f"train.resume_every_images={lanes}"])
        ranks.run(recipe, "dis", tmp_path / f"{world}", attempt=1)
        run = Run(open_folder(tmp_path / f"{world}/sweep/runs/dis"))
        point = resume.newest_point(run, print)
        assert point is not None
        sizes = {name: p.numel() for name, p in build(recipe.models["dis"], LatentShape(4, 8), 10).named_parameters()}
        first_moments.append(torch.cat([point.read("exp_avg", name, 0, size) for name, size in sizes.items()]))
    one, more = first_moments
    assert torch.linalg.norm(one - more) < tolerance * torch.linalg.norm(one) > 0


def test_the_base_width_divides_the_rate_of_sums_over_the_width() -> None:
    on_ranks(1, at_each_stage, moves_by_growth)


def moves_by_growth(stage: int) -> None:
    """Adam's first step moves each weight that has a gradient by its rate, whatever the gradient."""
    for tiny in (DIFFUSSM, DIS):
        settings = train(zero_stage=stage, learning_rate=1e-3, clip=0.0, base_width=tiny.width // 2)
        model = build(tiny, SHAPE, 10)
        with torch.no_grad():  # a last product of zeros would hide the others' gradients
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        growth = transfer.fan_in_growth(model, tiny.width // 2)
        assert set(growth.values()) == {1.0, 2.0}
        state = engine.start(model, settings, torch.device("cpu"), resume.fresh(model), adam_step=0)
        state.set_learning_rate(1e-3)
        assert state.learning_rate == pytest.approx(1e-3)
        predicted = state.deepspeed(torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2))
        state.micro_step((predicted * torch.randn_like(predicted)).sum())
        moved = dict.fromkeys(growth, 0.0)
        for segment, flat in state.segments(engine.WEIGHTS).items():
            change = float((flat - before[segment.name].flatten()).abs().max())
            moved[segment.name] = max(moved[segment.name], change)
        assert moved == {name: pytest.approx(1e-3 / factor, rel=1e-2) for name, factor in growth.items()}


def test_weight_decay_spares_dynamics_norms_biases_and_positions() -> None:
    on_ranks(1, at_each_stage, only_products_decay)


def only_products_decay(stage: int) -> None:
    """A step whose gradient is zero changes a weight by the decay alone. Clipping is off."""
    settings = train(zero_stage=stage, weight_decay=0.1, learning_rate=0.5, clip=0.0)
    products = {DIFFUSSM: {"weight", "C"}, DIS: {"weight", "in_proj", "out_proj", "x_proj", "dt_proj"}}
    for tiny, expected in products.items():
        model = build(tiny, SHAPE, 10)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        state = engine.start(model, settings, torch.device("cpu"), resume.fresh(model), adam_step=0)
        state.micro_step(state.deepspeed(torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2)).sum() * 0)
        after = {s.name: flat.view(before[s.name].shape) for s, flat in state.segments(engine.WEIGHTS).items()}
        assert after.keys() == before.keys()
        decayed = {name for name in before if torch.allclose(after[name], before[name] * 0.95) and before[name].any()}
        kept = {name for name in before if torch.equal(after[name], before[name])}
        assert decayed | kept == before.keys()
        assert {name.rpartition(".")[2] for name in decayed} == expected


def test_a_partition_in_another_place_is_an_error() -> None:
    on_ranks(1, a_moved_partition_is_named)


def a_moved_partition_is_named() -> None:
    table = engine._table_of_stages_1_and_2
    engine._table_of_stages_1_and_2 = lambda *where: (s._replace(offset=s.offset + (s.offset > 0)) for s in table(*where))
    model = build(DIS, SHAPE, 10)
    with pytest.raises(DisScaleError, match=r"flat 0 at \d+ does not hold .*another layout.*install the version"):
        engine.start(model, train(), torch.device("cpu"), resume.fresh(model), adam_step=0)


def test_gradients_are_reduced_during_the_backward_pass_and_with_the_time_limit_of_the_connection() -> None:
    on_ranks(2, at_each_stage, communication_overlaps, (1, 2))


def communication_overlaps(stage: int) -> None:
    """Most reductions begin before the last backward operator ends: five million gradients are six buckets."""
    model = build(Dit(kind="dit", width=256, depth=4, heads=4, patch=2), SHAPE, 10)
    state = engine.start(model, train(zero_stage=stage, lanes=2), torch.device("cpu"), resume.fresh(model), adam_step=0)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        state.micro_step(state.deepspeed(torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2)).square().mean())
    events = recorded.events()
    backward_ends = max(e.time_range.end for e in events if e.name.startswith("autograd::engine::evaluate_function"))
    reductions = [e.time_range.start for e in events if e.name == "c10d::allreduce_"]
    assert sum(start < backward_ends for start in reductions) >= 4
    require_time_limits(state)


def test_averages_are_gathered_in_host_memory() -> None:
    on_ranks(1, a_gpus_average_comes_to_the_host)


def a_gpus_average_comes_to_the_host() -> None:
    """A fake tensor on a GPU: copied before it is sent or joined."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        flats = [torch.empty(7, device="cuda")]
        optimizer, averages = (torch.optim.AdamW([nn.Parameter(flats[0])], fused=True), {"ema": [torch.empty_like(flats[0])]})
    hosts, table = dist.new_group(backend="gloo"), [Segment("a", 0, 6, 0, 1)]
    gathered = Engine(None, optimizer, flats, averages, table, {"a": torch.Size([2, 3])}, hosts=hosts).full_average("ema")
    assert gathered is not None
    assert (gathered["a"].device.type, gathered["a"].shape) == ("cpu", (2, 3))
