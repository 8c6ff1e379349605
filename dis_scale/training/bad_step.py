"""What is kept of a step that could not be taken: its batch, its losses by lane, the gradient's norm and the weights.

For people: nothing reads it again. `runs/<model>/evidence/<images>-<attempt>/`, whole when its manifest is there.
"""

import json
from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist

from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder
from dis_scale.training.checkpoint import images_name
from dis_scale.training.engine import WEIGHTS, Engine


def keep(
    run: Folder, attempt: int, images: int, draws: Sequence[Any], losses: Sequence[torch.Tensor], state: Engine
) -> Folder:
    """Writes this rank's part of the step that ended at `images`, rank 0 the manifest; returns the folder. Collective.

    `draws` are the step's (micro-batch, times, drop-path masks) of this rank's lanes, `losses` their losses.
    """
    folder, rank = run / "evidence" / f"{images_name(images)}-{attempt:04d}", dist.get_rank()
    segments = state.segments(WEIGHTS)
    ours = {
        f"batch-{rank:05d}.safetensors": safetensors.torch.save(_batch(draws)),
        f"weights-{rank:05d}.safetensors": safetensors.torch.save({s.name: part for s, part in segments.items()}),
        f"step-{rank:05d}.json": json.dumps(_facts(losses, state, segments), indent=1).encode(),
    }
    for name, data in ours.items():
        folder.write(name, data)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {name: manifest.digest(data) for name, data in ours.items()})
    if rank == 0:
        manifest.seal(folder, {k: v for part in parts for k, v in part.items()}, images=images, attempt=attempt)
    return folder


def _batch(draws: Sequence[Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for lane, (micro, t_B, drop) in enumerate(draws):
        tensors = micro._asdict() | {"t_B": t_B} | ({} if drop is None else {"drop": drop})
        found |= {f"{lane}/{name}": tensor.contiguous() for name, tensor in tensors.items()}
    return found


def _facts(losses: Sequence[torch.Tensor], state: Engine, segments: dict[Any, torch.Tensor]) -> dict[str, Any]:
    return {
        "loss_by_lane": [float(loss) for loss in losses], "gradient_norm": state.gradient_norm,
        "weights": {s.name: [s.start, s.end] for s in segments},
        "weights_not_finite": sorted({s.name for s, part in segments.items() if not part.isfinite().all()}),
    }  # fmt: skip
