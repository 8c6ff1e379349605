"""Dump of a step whose gradient was not finite: its batch, its losses by forward pass, the gradient's norm and the weights.

For people; no code reads it again. It is complete when its manifest exists.
"""

from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist

from dis_scale.storage.folder import Folder
from dis_scale.storage.manifest import Digest
from dis_scale.sweep import PointName, Run
from dis_scale.sweep.documents import BadStep, BadStepManifest
from dis_scale.training.engine import WEIGHTS, Engine


def dump_step(run: Run, name: PointName, inputs: Sequence[Any], losses: Sequence[torch.Tensor], engine: Engine) -> Folder:
    """Write this rank's part of the dump of the step that ended at `name.images_seen`; rank 0 also writes the manifest. Collective.

    `inputs` are the inputs of this rank's forward passes, `losses` their mean losses. Returns the folder.
    """
    folder, rank, segments = run.bad_step(name), dist.get_rank(), engine.segments(WEIGHTS)
    files = {
        f"batch-{rank:05d}.safetensors": safetensors.torch.save(_batch(inputs)),
        f"weights-{rank:05d}.safetensors": safetensors.torch.save({s.name: part for s, part in segments.items()}),
        f"step-{rank:05d}.json": _facts(losses, engine, segments).to_bytes(),
    }
    for file, data in files.items():
        folder.write(file, data)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {file: Digest.of(data) for file, data in files.items()})
    if rank == 0:
        digests = {file: digest for part in parts for file, digest in part.items()}
        BadStepManifest(files=digests, images=name.images_seen, attempt=name.attempt).write(folder)
    return folder


def _batch(inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for number, (micro, t_B, drop, _) in enumerate(inputs):
        of_pass = micro._asdict() | {"t_B": t_B, "drop": drop}
        tensors |= {f"{number}/{name}": tensor.contiguous() for name, tensor in of_pass.items() if tensor is not None}
    return tensors


def _facts(losses: Sequence[torch.Tensor], engine: Engine, segments: dict[Any, torch.Tensor]) -> BadStep:
    return BadStep(
        loss_by_pass=tuple(float(loss) for loss in losses),
        gradient_norm=engine.gradient_norm,
        weights={s.name: (s.start, s.end) for s in segments},
        weights_not_finite=tuple(sorted({s.name for s, part in segments.items() if not part.isfinite().all()})),
    )
