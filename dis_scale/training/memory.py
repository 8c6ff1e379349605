"""Computes a worker's GPU memory by arithmetic: its states, and the part that grows with the images of a forward pass.

Plans the forward passes with it. Read next: models/cost.py for the activations, lanes.py for the passes.
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
"""Bytes of a block's kept states in a forward pass above which the GPU takes longer than Python. One number serves all sizes:
DiS-L/2 reaches it at 62 images and H/2 at 42. On the host of an H200, the GPU takes longer from 55 and 31 images on
(docs/performance.md)."""


class PassPlan(NamedTuple):
    """How each worker computes its lanes of a step."""

    passes: int
    """Forward passes, which share the lanes evenly."""
    keeps_states: bool
    """Whether scans keep their states for the backward pass, which then recomputes nothing."""

    def smaller(self, share: int, times: int = 1) -> "PassPlan":
        """Return the plan of a worker with `share` lanes whose memory was too small `times` times.

        The first time: without kept states or, if there were none, with one lane less in the largest pass. Then: one lane a pass.
        """
        lanes = max(1, -(-share // self.passes) - (not self.keeps_states)) if times == 1 else 1
        return PassPlan(-(-share // lanes), keeps_states=False)


def state_bytes(cost: Cost, settings: Train, world: int) -> dict[str, int]:
    """Return the bytes of a worker's states by part; independent of the images in a forward pass.

    At stage 1 a rank holds all gradients until they are reduced, at stages 2 and 3 its part. At stage 2 it also holds the rest of
    up to two blocks, which is not counted. DeepSpeed keeps two buckets of gradients at any world size. At stage 3 it also keeps a
    bucket of gathered weights and one of prefetched weights.
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
    if settings.precision == "bf16":  # kept for the backward pass, unless recomputed
        blocks = len(cost.kept.blocks) if recompute_every(settings.checkpointing) == 1 else 1
        parts["rounded weights"] = one // 2 // blocks
    return parts


def worker_bytes(cost: Cost, settings: Train, world: int, images: int) -> int:
    """Return a worker's peak bytes, with `images` in a forward pass.

    Activations are freed before the step joins this worker's reduced gradients in one more tensor. Activations of graphs stay;
    they are counted together with the memory that the capture takes.
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
    """Return the bytes that a forward pass keeps: for each image, and independent of the images.

    Graphs of the blocks have their own gradients of inputs, outputs and weights. On an H200, one worker's peak at ZeRO 1 was
    measured as 0.93 to 0.99 of `worker_bytes`; the peak is during the capture.
    """
    image, fixed = cost.activation_bytes(settings.checkpointing, settings.precision), cost.kept.fixed_bytes(settings.checkpointing)
    if settings.graphs:
        image += 2 * cost.kept_in(settings.precision).inputs_bytes()
        fixed += 4 * cost.parameters
    return image, fixed


def plan_passes(model: str, cost: Cost, settings: Train, world: int, gpu_bytes: int | None, shared: float = 0.0) -> PassPlan:
    """Return the forward passes of a worker with a GPU of this many bytes, of which evaluation uses the fraction `shared`.

    The passes are as few as `lanes_at_once` allows. They are more if the states of their scans then fit, nothing is recomputed, and
    each pass keeps the GPU busy. There is no setting for it: the loss is the same but for rounding.
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
    """Return the number of lanes in a forward pass: the recipe's, otherwise as many as a GPU of `gpu_bytes` holds.

    On a CPU (`gpu_bytes` is None), it is one lane unless the recipe sets it. Evaluation uses the fraction `shared` of the GPU.
    Raises UserError if the GPU is too small; the message names settings that fit.
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
