"""The device that a stage computes on, and the check of a worker's device and connections before an attempt writes anything."""

from typing import TYPE_CHECKING

import ray

from dis_scale import faults
from dis_scale.errors import BrokenDevice
from dis_scale.recipe import Recipe

if TYPE_CHECKING:
    import torch

SIDE = {"cpu": 64, "cuda": 1024}
"""Rows and columns of the matrices that are multiplied as a check."""


def device_of(recipe: Recipe, gpus: int) -> tuple[str, str]:
    """Return (device, reason) on a cluster of `gpus` GPUs: `auto` uses them if the smallest world size gets one a worker."""
    workers = recipe.train.world_sizes[-1]
    if recipe.device != "auto":
        return recipe.device, "the recipe names it"
    reason = f"auto: {gpus} GPUs for {workers} workers"
    return ("cuda" if gpus >= workers else "cpu"), reason


def choose_device(recipe: Recipe) -> tuple[str, str]:
    """Return (device, reason) by the GPUs that the cluster has now."""
    return device_of(recipe, int(ray.cluster_resources().get("GPU", 0)))


def check_device(device: "torch.device") -> None:
    """BrokenDevice unless the device allocates memory and multiplies two matrices of small integers exactly."""
    import torch

    faults.at("check")
    side = SIDE[device.type]
    u = torch.arange(side) % 7 - 3.0  # exact in TF32, too
    product = u.to(device)[:, None].repeat(1, side) @ u.to(device)[None].repeat(side, 1)
    if wrong := int((product.cpu() != side * torch.outer(u, u)).sum()):
        raise BrokenDevice(f"{device}: {wrong} of {side * side} elements of a matrix product are wrong")


def check_group(device: "torch.device") -> None:
    """BrokenDevice unless the sum over all ranks of the process group is right; collective."""
    import torch
    import torch.distributed as dist

    world = dist.get_world_size()
    total = torch.full((SIDE[device.type],), dist.get_rank() + 1.0, device=device)
    dist.all_reduce(total)
    if bool((total != world * (world + 1) / 2).any()):
        raise BrokenDevice(
            f"{device}: a sum over {world} workers is {total[0]:g}, expected {world * (world + 1) / 2:g}"
        )
