"""What the engine gives to DeepSpeed, and what it reads from it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from dis_scale.models import build
from dis_scale.models.s4d import S4D
from dis_scale.recipe import DiffuSsm, LatentShape, Train, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Run
from dis_scale.training import checkpoint, engine
from dis_scale.training.engine import MOMENTS, Engine
from dis_scale.training.profile import process_group
from tests.conftest import TINY
from tests.support import ranks


def in_a_process(check: Callable[..., None], *arguments: object) -> None:
    """Run a check in a process of its own: DeepSpeed starts once per process."""
    mp.start_processes(_with_group, (check, *arguments), 1, start_method="forkserver")


def _with_group(_: int, check: Callable[..., None], *arguments: object) -> None:
    with process_group(torch.device("cpu")):
        check(*arguments)


def test_the_filled_state_is_on_the_device_of_its_flat() -> None:
    """Fused AdamW reads Adam's step on the device and does not check where it is."""
    flat = torch.empty(4, device="meta")
    optimizer = torch.optim.AdamW([flat], fused=False)
    engine = Engine(deepspeed=None, optimizer=optimizer, flats=[flat], averages={}, table=[], shapes={})
    engine.fill(lambda *_: torch.empty(0), adam_step=3)
    state = optimizer.state[flat]
    assert {name: state[name].device for name in ("step", *MOMENTS)} == dict.fromkeys(("step", *MOMENTS), flat.device)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_training_computes_the_scans_kernels_in_float32(stage: int) -> None:
    """Rounded to bfloat16, S4D's parameters give a kernel that is 31 % off at 1,024 taps (median over channels)."""
    in_a_process(kernels_are_exact, stage)


def kernels_are_exact(stage: int) -> None:
    shape, tiny = LatentShape(4, 8), DiffuSsm(kind="diffussm", width=16, depth=1)
    settings = Train(publish_images=(8,), batch_images=8, lanes=1, zero_stage=stage, precision="bf16")  # type: ignore[arg-type]
    exact = [scan.kernel(1024) for scan in build(tiny, shape, 10).modules() if isinstance(scan, S4D)]
    model, kernels = build(tiny, shape, 10, precision="bf16"), list[torch.Tensor]()
    for scan in model.modules():
        if isinstance(scan, S4D):
            scan.register_forward_hook(lambda scan, *_: kernels.append(scan.kernel(1024)))
    state = engine.start(model, settings, torch.device("cpu"), checkpoint.fresh(model), adam_step=0)
    out = state.deepspeed(torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2))
    assert out.dtype == torch.bfloat16
    errors = [torch.linalg.norm(a - b) / torch.linalg.norm(b) for a, b in zip(kernels, exact, strict=True)]
    assert len(errors) == 2
    assert max(errors) < 1e-6


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_gradient_does_not_depend_on_the_number_of_workers(tmp_path: Path, stage: int) -> None:
    """16 micro-batches on one worker and 4 on four, products in bfloat16: gradients are added in float32."""
    first_moments = []
    for workers in (1, 4):
        how = ["train.precision=bf16", "train.lanes=16", f"train.zero_stage={stage}", f"train.workers={workers}"]
        recipe = reading.load(TINY, [*how, "train.publish_images=[16]", "train.resume_every_images=16"])
        ranks.run(recipe, "dis", tmp_path / f"{workers}", attempt=1)
        run = Run(open_folder(tmp_path / f"{workers}/sweep/runs/dis"))
        point = checkpoint.newest_point(run, print)
        assert point is not None
        sizes = {name: p.numel() for name, p in build(recipe.models["dis"], LatentShape(4, 8), 10).named_parameters()}
        first_moments.append(torch.cat([point.read("exp_avg", name, 0, size) for name, size in sizes.items()]))
    one, four = first_moments
    assert torch.linalg.norm(one - four) < 1e-3 * torch.linalg.norm(one) > 0
