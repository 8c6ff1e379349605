"""Inputs of the training steps: a function of recipe, step and lane, grouped by forward pass, on the host or the device.

Read next: lanes.py (which lanes share a pass), data/latents.py (the images of a lane), loop.py.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from dis_scale import diffusion
from dis_scale.data.latents import Latents, Micro, micro_batch
from dis_scale.process import seeds
from dis_scale.recipe import Recipe
from dis_scale.training.lanes import ForwardPass


class StepInput(NamedTuple):
    """The inputs of one forward pass: images, their times, the multipliers of drop path, and the factor of the loss."""

    micro: Micro
    t_B: torch.Tensor
    drop: torch.Tensor | None
    weight: float


def step_inputs(
    recipe: Recipe,
    seed: int,
    device: torch.device,
    latents: Latents,
    rates: tuple[float, ...],
    images_seen: int,
    passes: Sequence[ForwardPass],
) -> Iterator[StepInput]:
    """Yield this rank's inputs from `images_seen` on, in order: one per forward pass and step, pinned for a GPU.

    `seed` is the seed of the model's training, `rates` are the rates of its drop path.
    """
    settings, process = recipe.train, diffusion.build(recipe.diffusion, latents.shape)

    def of_lane(step: int, lane: int, weight: float) -> StepInput:
        micro = micro_batch(
            latents, step, lane, batch=settings.batch_images, lanes=settings.lanes, seed=seed,
            flip=recipe.data.mirror, label_dropout=settings.label_dropout,
        )  # fmt: skip
        n = len(micro.x_BCHW)
        t_B = process.sample_times(seeds.generator("time", seed, step, lane), n)
        return StepInput(micro, t_B, _drop_masks(rates, n, seed, step, lane), weight)

    for step in range(images_seen // settings.batch_images, settings.images // settings.batch_images):
        for lanes, weight in passes:
            yield _pinned(_together([of_lane(step, lane, weight) for lane in lanes]), device)


def _together(parts: Sequence[StepInput]) -> StepInput:
    """Return the inputs of several lanes as the input of one forward pass."""
    if len(parts) == 1:
        return parts[0]
    micro = Micro(*map(_joined, zip(*[part.micro for part in parts], strict=True)))
    drop = _joined([part.drop for part in parts], dim=1)
    return StepInput(micro, torch.cat([part.t_B for part in parts]), drop, parts[0].weight)


def _joined(parts: Sequence[torch.Tensor | None], dim: int = 0) -> Any:
    """Return the parts as one tensor; None if all parts are None."""
    present = [part for part in parts if part is not None]
    return torch.cat(present, dim) if present else None


def _drop_masks(rates: tuple[float, ...], n: int, *where: int) -> torch.Tensor | None:
    """Return the multipliers of drop path (branches, n): 0, or 1 / (1 - rate); None if nothing is dropped."""
    if not any(rates):
        return None
    keep = 1 - torch.tensor(rates, dtype=torch.float32)[:, None]
    return (torch.from_numpy(seeds.generator("drop path", *where).random((len(rates), n), dtype="float32")) < keep) / keep


def _pinned(host_input: StepInput, device: torch.device) -> StepInput:
    """Return the input in pinned memory if the device is a GPU, so that copies overlap with computation."""
    if device.type != "cuda":
        return host_input
    pinned: StepInput = tree_map_only(torch.Tensor, torch.Tensor.pin_memory, host_input)
    return pinned


def to_device(host_input: StepInput, device: torch.device) -> StepInput:
    """Return the input on the device; from pinned memory the copy does not block."""
    moved: StepInput = tree_map_only(torch.Tensor, lambda x: x.to(device, non_blocking=True), host_input)
    return moved
