"""The only door to DeepSpeed: start it, take a sharded step, access the float32 partitions that this rank owns.

State is accessed as *flats*: the float32 partitions of weights, Adam's two moments and our averages. A table maps ranges of
parameters to positions in the flats. ZeRO stages 1, 2 and 3 differ here and nowhere else.

Pitfalls:
* Stage 0 hides the gradient norm and the state: use stage 1, also for one process.
* The CPU accelerator compiles a shared-memory op at its first start unless that op is declared incompatible.
* Its `bf16` rounds every parameter, also those of the scans' dynamics, and adds and reduces gradients in bfloat16. So DeepSpeed
  always trains in float32, and the model rounds the inputs of its products itself (`models.build`, `precision`).
* `safe_set_full_*` fails in stage 3 for odd sizes; writing the flats by our own table works.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from dis_scale.models import transfer
from dis_scale.models.tokens import Backbone
from dis_scale.process.errors import DisScaleError
from dis_scale.process.imports import adamw, hidden
from dis_scale.recipe import Train
from dis_scale.training.joined import Groups, Weights, join_blocks, weights_of
from dis_scale.weights import ema

WEIGHTS, MOMENTS = "weights", ("exp_avg", "exp_avg_sq")
LEAST_BUCKET = 2**20
"""Least number of gradients that are reduced together; smaller messages wait for the network's latency."""


class Segment(NamedTuple):
    """Elements [start, end) of the flattened parameter `name`, stored at `offset` of this rank's flat number `flat`."""

    name: str
    start: int
    end: int
    flat: int
    offset: int

    @property
    def size(self) -> int:
        return self.end - self.start


def kinds(settings: Train) -> tuple[str, ...]:
    """Return the kinds of state that training needs to continue: weights, moments, averages."""
    return (WEIGHTS, *MOMENTS, *ema.names(settings))


Read = Callable[[str, str, int, int], torch.Tensor]
"""`read(kind, name, start, end)` returns that range of a parameter's stored state, float32, 1-D."""


@dataclass
class Engine:
    """A model under DeepSpeed, with this rank's flats and the table of their segments."""

    deepspeed: Any
    optimizer: torch.optim.Optimizer
    flats: list[torch.Tensor]
    averages: dict[str, list[torch.Tensor]]
    table: list[Segment]
    shapes: dict[str, torch.Size]
    hosts: Any = None
    """Process group between the hosts (gloo), for tensors that must not pass through a GPU's memory."""
    weights: Weights = field(default_factory=dict)

    def micro_step(self, loss: torch.Tensor) -> None:
        """Run the backward pass of one micro-batch; after the last one of a step, also the optimizer."""
        self.deepspeed.backward(loss)
        self.deepspeed.step()

    @property
    def device(self) -> torch.device:
        return self.flats[0].device

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of state that this engine holds."""
        return (WEIGHTS, *MOMENTS, *self.averages)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]

    @property
    def learning_rate(self) -> float:
        """The rate of the next step, before the factors of `base_width`."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"] / group["rate"])

    @property
    def skipped(self) -> bool:
        """Whether all ranks skipped the last step because its gradient was not finite."""
        return bool(getattr(self.deepspeed.optimizer, "overflow", False))

    @property
    def gradient_norm(self) -> float:
        """Norm of the last step's gradient over all parameters, before clipping."""
        return float(self.deepspeed.get_global_grad_norm() or 0.0)

    @torch.no_grad()
    def update_averages(self, decays: dict[str, float]) -> None:
        for name, decay in decays.items():
            torch._foreach_lerp_(self.averages[name], self.flats, 1 - decay)

    def state(self, kind: str) -> list[torch.Tensor]:
        """Return this rank's flats of one of `kinds`."""
        if kind == WEIGHTS:
            return self.flats
        return self.averages.get(kind) or [self.optimizer.state[flat][kind] for flat in self.flats]

    @torch.no_grad()
    def segments(self, kind: str) -> dict[Segment, torch.Tensor]:
        """Return a clone, in host memory, of this rank's part of one of `kinds`, by segment."""
        flats = [flat.detach().to("cpu", copy=True) for flat in self.state(kind)]
        return {s: flats[s.flat][s.offset : s.offset + s.size] for s in self.table}

    @torch.no_grad()
    def full_average(self, name: str) -> dict[str, torch.Tensor] | None:
        """Return an average's weights by parameter on rank 0, None on the others; collective."""
        rank, flats = dist.get_rank(), [flat.cpu() for flat in self.averages[name]]
        tables: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(self.table, tables if rank == 0 else None, group=self.hosts)
        if rank:
            for flat in flats:
                dist.send(flat, 0, self.hosts)
            return None
        full = {parameter: torch.empty(shape.numel()) for parameter, shape in self.shapes.items()}
        for sender, table in enumerate(tables):  # one rank's part at a time; parts of all ranks have one size
            parts = [torch.empty_like(flat) for flat in flats] if sender else flats
            for part in parts if sender else []:
                dist.recv(part, sender, self.hosts)
            for s in table:
                full[s.name][s.start : s.end] = parts[s.flat][s.offset : s.offset + s.size]
        return {parameter: tensor.view(self.shapes[parameter]) for parameter, tensor in full.items()}

    @torch.no_grad()
    def fill(self, read: Read, adam_step: int) -> None:
        """Overwrite this rank's part of the moments and averages with stored ones, read by range: any world size and ZeRO stage.

        The weights came through DeepSpeed and are only compared. DisScaleError names the first that is not where the table says.
        """
        for flat in self.flats:
            step = torch.tensor(float(adam_step), device=flat.device)  # fused AdamW reads it there, unchecked
            self.optimizer.state[flat] = {"step": step} | {moment: torch.zeros_like(flat) for moment in MOMENTS}
        for kind in self.kinds:
            into = self.state(kind)
            for s in self.table:
                here, stored = into[s.flat][s.offset : s.offset + s.size], read(kind, s.name, s.start, s.end)
                if kind == WEIGHTS:
                    _require_equal(here, stored, s)
                else:
                    here.copy_(stored)


def _require_equal(here: torch.Tensor, stored: torch.Tensor, s: Segment) -> None:
    if not torch.equal(here.detach().cpu().view(torch.int32), stored.view(torch.int32)):  # also if a weight is NaN
        raise DisScaleError(
            f"DeepSpeed's flat {s.flat} at {s.offset} does not hold {s.name}[{s.start}:{s.end}]: this version of DeepSpeed stores "
            "partitions in another layout than dis_scale/training/engine.py reads; install the version in pyproject.toml"
        )


def connect(device: torch.device, waits_s: float = 1800.0) -> None:
    """Join the process group that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    A collective of this group, or of any later one, fails after `waits_s` seconds.
    """
    deepspeed, timeout = _deepspeed(device), timedelta(seconds=waits_s)
    for default in ("default_pg_timeout", "default_pg_nccl_timeout"):  # timeout of DeepSpeed's own group
        setattr(dist.distributed_c10d, default, timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, auto_mpi_discovery=False, verbose=False)


def start(model: Backbone, settings: Train, device: torch.device, read: Read, adam_step: int, passes: int = 1) -> Engine:
    """Shard `model`, which already holds the stored weights on rank 0, and fill all states through `read`.

    A step accumulates the gradients of `passes` forward passes.
    """
    groups, shapes = parameter_groups(model, settings), {name: p.shape for name, p in model.named_parameters()}
    parameters = sum(shape.numel() for shape in shapes.values())
    # Weights are not joined in three cases. Stage 3 frees a parameter after each use, but not the memory that its views hold. A
    # compiled block must not set attributes. A block of another package may read its weights anywhere.
    # A joined parameter fits in a bucket: DeepSpeed reduces a larger one in separate memory, which may be reused too early.
    apart = settings.zero_stage == 3 or settings.compile or bool(model.settings.needed_code)
    weights = weights_of(model) if apart else join_blocks(model, groups, bucket(parameters))
    optimizer = adamw()(groups, settings.learning_rate, settings.betas, fused=True)
    sharded, *_ = _deepspeed(device).initialize(
        model=model, optimizer=optimizer, config=_config(settings, parameters, passes), dist_init_required=False
    )
    zero = sharded.optimizer
    if settings.zero_stage == 3:
        flats, table = zero.fp32_partitioned_groups_flat, list(_table_of_stage_3(zero, weights))
    else:
        flats, table = zero.single_partition_of_fp32_groups, list(_table_of_stages_1_and_2(zero, weights))
    averages = {name: [torch.zeros_like(f).detach() for f in flats] for name in ema.names(settings)}
    engine = Engine(sharded, zero.optimizer, flats, averages, table, shapes, dist.new_group(backend="gloo"), weights)
    engine.fill(read, adam_step)
    return engine


def parameter_groups(model: Backbone, settings: Train) -> Groups:
    """Return the optimizer's groups. Parameters of one group share their weight decay and `rate`, a factor of the learning rate.

    With a base width, a step decays weights by the same share at each width, as Yang et al.'s package `mup` does.
    """
    growth = transfer.fan_in_growth(model, settings.base_width) if settings.base_width else defaultdict(lambda: 1.0)
    eps = transfer.adam_eps(model.settings, settings.base_width)
    groups = defaultdict[tuple[float, float], list[nn.Parameter]](list)
    for name, parameter in model.named_parameters():
        decay = settings.weight_decay * growth[name] if model.decays(name, parameter) else 0.0
        rate = 1 / growth[name]
        groups[decay, rate].append(parameter)
    ordered = sorted(groups.items(), key=lambda item: item[0][0], reverse=True)  # the norm's bits depend on it
    return [{"params": each, "weight_decay": decay, "rate": rate, "eps": eps} for (decay, rate), each in ordered]


def _deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    with hidden("mlflow"):  # DeepSpeed's autotuner, which we do not use, would import it: three seconds
        import deepspeed
        import deepspeed.ops
        from deepspeed.runtime import compiler
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if adamw() not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(adamw())
    compiler.compile = lambda: compiler.dummy_decorator  # Muon, which we do not use, would import all of PyTorch's compiler
    return deepspeed


def bucket(parameters: int) -> int:
    """Return the number of gradients that are reduced together: an eighth of them."""
    return max(LEAST_BUCKET, parameters // 8)


def _config(settings: Train, parameters: int, passes: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration, computed so that no file can disagree with the recipe."""
    size = bucket(parameters)
    zero = {"stage": settings.zero_stage, "overlap_comm": True, "reduce_bucket_size": size}
    if settings.zero_stage == 3:  # by default it keeps 10^9 parameters that it has gathered
        zero |= {f"stage3_{name}": size for name in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")}
    return {
        "train_micro_batch_size_per_gpu": 1,  # unused: the model's inputs are ours
        "gradient_accumulation_steps": passes,
        "gradient_clipping": settings.clip,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }


def _table_of_stages_1_and_2(zero: Any, weights: Weights) -> Iterator[Segment]:
    """Yield this rank's segments. Parameters are stored end to end in one flat buffer, split into equal parts, one per rank."""
    rank = dist.get_rank()
    for flat, (group, part) in enumerate(zip(zero.round_robin_bit16_groups, zero.partition_size, strict=True)):
        first, last = rank * part, (rank + 1) * part
        stored = [weight for parameter in group for weight in weights[parameter]]
        bounds = accumulate((weight.size for weight in stored), initial=0)
        for weight, (begin, end) in zip(stored, pairwise(bounds), strict=True):
            low, high = max(begin, first), min(end, last)
            if low < high:
                yield Segment(weight.name, low - begin, high - begin, flat, low - first)


def _table_of_stage_3(zero: Any, weights: Weights) -> Iterator[Segment]:
    """Yield this rank's segments. Each parameter is split into equal parts, padded at the end; parts of a rank are end to end."""
    rank = dist.get_rank()
    for flat, group in enumerate(zero.fp16_groups):
        offset = 0
        for parameter in group:
            part = parameter.ds_tensor.numel()
            low, high = rank * part, min((rank + 1) * part, parameter.ds_numel)
            if low < high:
                (weight,) = weights[parameter]
                yield Segment(weight.name, low, high, flat, offset)
            offset += part
