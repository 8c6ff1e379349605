"""Memory of a GPU that trains, by arithmetic: what holds states, and what grows with the images of a forward pass.

Read next: models/cost.py for the activations, lanes.py for what is done with the answer.
"""

import contextlib
from collections.abc import Mapping
from typing import NamedTuple

from pydantic import ValidationError

from dis_scale.models.checkpointing import recompute_every
from dis_scale.models.cost import Cost
from dis_scale.process.errors import UserError
from dis_scale.recipe import Train
from dis_scale.training.engine import MOMENTS, bucket
from dis_scale.training.lanes import largest_share
from dis_scale.weights import ema

CURES: tuple[Mapping[str, object], ...] = (
    {"zero_stage": 2}, {"graphs": False}, {"checkpointing": "block"}, {"zero_stage": 2, "checkpointing": "block"},
    {"checkpointing": "block", "graphs": False}, {"zero_stage": 2, "checkpointing": "block", "graphs": False},
    {"zero_stage": 3, "checkpointing": "block"}, {"zero_stage": 3, "checkpointing": "block", "graphs": False},
)  # fmt: skip
"""Runtime settings that need less memory, the cheapest first."""
USABLE = 0.85
"""Share of a GPU's memory that may be planned with; CUDA's context, temporary tensors and fragments need the rest."""
BUSY_BYTES = 0.33e9
"""A block's kept states in a forward pass from which on the GPU takes longer than Python, one number for all sizes: those of
DiS-L/2 at 62 images and of H/2 at 42, where on the host of an H200 it does from 55 and 31 on (docs/performance.md)."""


class PassPlan(NamedTuple):
    """How each worker computes its lanes of a step."""

    passes: int
    """Forward passes, which share the lanes evenly."""
    keeps_states: bool
    """Whether scans keep their states for the backward pass, which then computes nothing again."""

    def smaller(self, share: int, times: int = 1) -> "PassPlan":
        """Return the plan of a worker with `share` lanes whose memory was too small for this one, and then for smaller ones.

        Without states, or with a lane less in the largest pass; the second time with one lane in each.
        """
        lanes = max(1, -(-share // self.passes) - (not self.keeps_states)) if times == 1 else 1
        return PassPlan(-(-share // lanes), keeps_states=False)


def state_bytes(cost: Cost, settings: Train, world: int) -> dict[str, int]:
    """Return the bytes of a worker's states by part; independent of the images in a forward pass.

    At stage 1 a rank holds all gradients until they are reduced; at stages 2 and 3 its part, and at 2 the rest of up to two blocks,
    which is not counted. DeepSpeed keeps two buckets of
    gradients at any world size, and at stage 3 a bucket of gathered weights and one of those that come next.
    """
    one = 4 * cost.parameters
    part = -(-one // world)
    parts = {
        "weights": part if settings.zero_stage == 3 else one,
        "gradients": part if settings.zero_stage > 1 else one,
        "optimizer": (1 + len(MOMENTS)) * part,  # DeepSpeed keeps a float32 copy of its part of the weights
        "averages": len(ema.names(settings)) * part,
        "buckets": (4 if settings.zero_stage == 3 else 2) * 4 * bucket(cost.parameters),
    }
    if settings.precision == "bf16":  # kept for the backward pass, unless it is computed again
        blocks = len(cost.kept.blocks) if recompute_every(settings.checkpointing) == 1 else 1
        parts["rounded weights"] = one // 2 // blocks
    return parts


def worker_bytes(cost: Cost, settings: Train, world: int, images: int) -> int:
    """Return a worker's bytes at their peak, with `images` in a forward pass.

    Activations are gone when the step joins this worker's reduced gradients in one more tensor; those of graphs stay, and are
    counted with what capturing them takes.
    """
    image, fixed = _pass_bytes(cost, settings)
    activations = images * image + fixed
    return sum(state_bytes(cost, settings, world).values()) + max(activations, 4 * cost.parameters // world)


def most_images(cost: Cost, settings: Train, world: int, usable_bytes: float) -> int:
    """Return the most images in a forward pass for which a worker needs at most `usable_bytes`; 0 if none fit."""
    free = usable_bytes - sum(state_bytes(cost, settings, world).values())
    joined, (image, fixed) = 4 * cost.parameters // world, _pass_bytes(cost, settings)
    return max(0, int((free - fixed) // image)) if free >= joined else 0


def _pass_bytes(cost: Cost, settings: Train) -> tuple[int, int]:
    """Return what a forward pass keeps, in bytes: of an image, and besides.

    Graphs of the blocks have gradients of inputs, outputs and weights of their own. On an H200 0.93 to 0.99 of a worker's bytes
    were measured, by one worker at ZeRO 1: the peak, which is while they are captured.
    """
    image, fixed = cost.activation_bytes(settings.checkpointing, settings.precision), cost.kept.fixed_bytes(settings.checkpointing)
    if settings.graphs:
        image += 2 * cost.kept_in(settings.precision).inputs_bytes()
        fixed += 4 * cost.parameters
    return image, fixed


def plan_passes(model: str, cost: Cost, settings: Train, world: int, gpu_bytes: int | None, shared: float = 0.0) -> PassPlan:
    """Return the forward passes of a worker with a GPU of this many bytes, of which the fraction `shared` is evaluation's.

    As few as `lanes_at_once` allows; more if the states of their scans then fit, nothing is recomputed, and each keeps the GPU
    busy. No setting: the loss is the same but for rounding.
    """
    share, usable = largest_share(settings.lanes, world), USABLE * (1 - shared) * (gpu_bytes or 0)
    fewest = -(-share // lanes_at_once(model, cost, settings, world, gpu_bytes, shared))
    image, blocks = cost.kept_in(settings.precision).states, len(cost.kept.blocks)
    most = fewest if settings.micro_images else share
    for passes in range(fewest, most + 1) if image and settings.checkpointing == "none" else ():
        images = -(-share // passes) * settings.lane_images
        if passes > fewest and images * image < BUSY_BYTES * blocks:
            break
        if worker_bytes(cost, settings, world, images) + images * image <= usable:
            return PassPlan(passes, keeps_states=True)
    return PassPlan(fewest, keeps_states=False)


def lanes_at_once(model: str, cost: Cost, settings: Train, world: int, gpu_bytes: int | None, shared: float = 0.0) -> int:
    """Return how many lanes share a forward pass: as the recipe says, or as many as a GPU of `gpu_bytes` holds.

    None: a CPU, one lane. The fraction `shared` of the GPU is evaluation's. UserError if the GPU is too small, with settings that
    fit.
    """
    share = largest_share(settings.lanes, world)
    wanted = settings.micro_images and min(share, settings.micro_images // settings.lane_images)
    if gpu_bytes is None:
        return wanted or 1
    usable = USABLE * (1 - shared) * gpu_bytes

    def need(lanes: int, changed: Train = settings) -> int:
        return worker_bytes(cost, changed, world, lanes * settings.lane_images)

    fitting = [lanes for lanes in range(1, share + 1) if need(lanes) <= usable]
    if wanted in fitting or (fitting and not wanted):
        return wanted or fitting[-1]
    cures: list[Mapping[str, object]] = [{"micro_images": fitting[-1] * settings.lane_images}] if fitting else []
    cures += [each for each in CURES if (changed := _changed_by(settings, each)) and need(1, changed) <= usable]
    remedy = "use more workers" if world < settings.lanes else "use GPUs with more memory"
    if cures:
        remedy = f"set {' and '.join(f'train.{name}={value}' for name, value in cures[0].items())}"
    raise UserError(
        f"{model}: a worker needs {need(wanted or 1) / 2**30:.1f} GiB for {(wanted or 1) * settings.lane_images} images in a "
        f"forward pass, and {usable / 2**30:.1f} GiB of its GPU are usable: {remedy}"
    )


def _changed_by(settings: Train, changes: Mapping[str, object]) -> Train | None:
    """Return the settings with these changes; None if they are not allowed together, or change nothing."""
    with contextlib.suppress(ValidationError):
        changed = Train.model_validate(settings.model_dump() | dict(changes))
        return None if changed == settings else changed
    return None
