"""Peak memory of real training steps against the formula of `dis-scale plan`: `python -m benchmarks.memory`.

On a CPU in float32: one worker takes a step through the reader, DeepSpeed and the averages. Memory is that of all tensors alive,
from the model's first weight to the end of the second step, as PyTorch's allocator reports them to the profiler. The formula
is training/memory.py's: states by ZeRO stage, and activations by checkpointing.
"""

import json
import multiprocessing
import sys
import tempfile
from typing import NamedTuple

from torch.profiler import profile

from benchmarks.step import peak_bytes
from benchmarks.throughput import CLASSES, LATENT_SHAPE, random_latents
from dis_scale.models.cost import price_model
from dis_scale.recipe import Recipe, reading, shipped
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from dis_scale.training.memory import worker_bytes
from dis_scale.training.profile import profile_training


class Job(NamedTuple):
    """A published size at 256 pixels with its settings."""

    size: str
    images: int
    zero_stage: int = 1
    checkpointing: str = "none"


JOBS = (
    Job("DiS-S/2", 8), Job("DiS-S/2", 8, 2), Job("DiS-S/2", 8, 3), Job("DiS-S/2", 16, 1, "block"), Job("DiT-S/2", 8),
    Job("DiffuSSM-S", 2), Job("DiS-B/2", 4, 1, "selective"),
)  # fmt: skip
GOAL = 0.1
"""Largest relative difference."""


def recipe_of(job: Job) -> Recipe:
    """The ImageNet recipe with one model and one forward pass per step."""
    changes = [
        f"models={{model: {{preset: {job.size}}}}}", f"train.batch_images={job.images}", "train.lanes=1", "train.workers=1",
        f"train.publish_images=[{1000 * job.images}]", f"train.resume_every_images={1000 * job.images}",
        f"train.checkpointing={job.checkpointing}", f"train.zero_stage={job.zero_stage}", "train.precision=fp32", "device=cpu",
        "train.warmup_images=0",
    ]  # fmt: skip
    return reading.load(shipped.resolve("imagenet256"), changes)


def measured_bytes(recipe: Recipe) -> int:
    """Return the peak memory of all tensors in a training of two steps."""
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep.below(open_folder(scratch), recipe)
        random_latents(sweep)
        with profile(profile_memory=True, acc_events=True) as seen:
            profile_training(sweep, "model", 1, None, lambda line: print(line, file=sys.stderr))
    return peak_bytes(seen)


def measure(job: Job) -> None:
    """Print a row: the measured peak, the computed one, and their ratio."""
    recipe = recipe_of(job)
    cost = price_model(recipe.models["model"], LATENT_SHAPE, CLASSES)
    computed, measured = worker_bytes(cost, recipe.train, 1, job.images), measured_bytes(recipe)
    ratio = measured / computed
    row = job._asdict() | {"measured_gib": measured / 2**30, "computed_gib": computed / 2**30, "ratio": ratio}
    print(json.dumps(row | {"right": abs(ratio - 1) <= GOAL}), flush=True)


def main() -> None:
    """Measure each job in a process of its own: DeepSpeed starts once in a process."""
    spawn = multiprocessing.get_context("spawn")
    for job in JOBS:
        process = spawn.Process(target=measure, args=(job,))
        process.start()
        process.join()
        if process.exitcode:
            print(json.dumps({"job": job, "not measured": f"exit code {process.exitcode}"}), flush=True)


if __name__ == "__main__":
    main()
