"""A device trains, resumes and samples as a CPU does: `python -m benchmarks.smoke [--device cpu --quick]`.

Small DiS, DiffuSSM and DiT on the digits' latents, without Ray: losses against the CPU's in fp32 and bf16, a killed run against
an undisturbed one, ZeRO 1, 2 and 3, samples of each sampler against the CPU's. The inputs of every step are bit-equal on all
devices, so only sums differ; throughput.py compares memory with the formula.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks import digits
from benchmarks.bringup import Options, options
from benchmarks.digits import TrainingRun
from dis_scale import vae
from dis_scale.evaluation import metrics
from dis_scale.evaluation.features import load_extractors
from dis_scale.evaluation.reference import load_all
from dis_scale.evaluation.sampling import BlockSampler, labels_of
from dis_scale.recipe import Gaussian
from dis_scale.recipe.evaluate import FLOW_SAMPLERS, GAUSSIAN_SAMPLERS
from dis_scale.sweep import Sweep
from dis_scale.sweep.state import require_latents
from dis_scale.weights.published import load_published

AT_ONCE = max(2, min(12, (os.cpu_count() or 1) * 3 // 4))
"""Training runs at the same time, each with one thread and the compilers of its kernels."""
FIRST_LOSS = {"fp32": 1e-4, "bf16": 5e-3}
"""Largest relative difference of the first logged loss, after ten steps, to the CPU's in fp32. A CPU's bf16: 2.4e-4 at most."""
LAST_LOSS = {"fp32": 1e-3, "bf16": 1e-2}
"""The same of the mean of the last ten logged losses of 300 steps. On a CPU: another scan in fp32 1e-7, bf16 2.3e-3."""
DISTANCE = 0.02
"""Largest relative difference of the samples' distance to the real images, from that of the same model's on the CPU."""


class Checks:
    """Prints a row per check."""

    def __init__(self) -> None:
        self.right = True

    def add(self, name: str, value: float, allowed: float) -> None:
        """`value` is right if it is at most `allowed`; NaN is wrong."""
        right = bool(value <= allowed)
        self.right &= right
        print(json.dumps({"name": name, "right": right, "value": float(value), "allowed": allowed}), flush=True)

    def fail(self, name: str, reason: str) -> None:
        self.right = False
        print(json.dumps({"name": name, "right": False, "failed": reason}), flush=True)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """An error in this part is a row; the next part runs."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(name, repr(error))


def relative(x: float, y: float) -> float:
    return abs(x / y - 1)


def main(chosen: Options) -> bool:
    checks = Checks()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        recipe = digits.recipe_of(root, 30 if chosen.quick else 300, quick=chosen.quick)
        sweep = digits.prepare(recipe, root, chosen.device)
        with checks.part("training"):
            train(checks, sweep, chosen)
        with checks.part("sampling"):
            sample(checks, sweep, chosen)
    return checks.right


def train(checks: Checks, sweep: Sweep, chosen: Options) -> None:
    """Train all runs, then compare them."""
    latents, device = require_latents(sweep.folder), chosen.device.type
    kinds = ["dis"] if chosen.quick else list(sweep.recipe.models)

    def run(name: str, model: str, on: str = device, kill_at: int | None = None, **changes: object) -> TrainingRun:
        return TrainingRun(digits.varied(sweep, name, changes), latents, model, on, kill_at)

    on_cpu = {model: TrainingRun(sweep, latents, model, "cpu") for model in kinds}
    exact = {model: run("fp32", model) for model in kinds}
    rounded = {model: run("bf16", model, precision="bf16") for model in kinds}
    late = sweep.recipe.train.images // 2
    killed = {
        model: [run("killed", model, kill_at=late, precision="bf16"), run("killed", model, precision="bf16")] for model in kinds
    }
    stages = {stage: run(f"zero-{stage}", "dis", zero_stage=stage) for stage in (2, 3)}
    gaussian = TrainingRun(gaussian_sweep(sweep), latents, "dis", "cpu")
    alone = [*on_cpu.values(), gaussian, *exact.values(), *rounded.values(), *stages.values()]
    for failure in digits.train_all([*killed.values(), *([each] for each in alone)], AT_ONCE):
        checks.fail("training", failure)

    for model in kinds:
        for precision, runs in (("fp32", exact), ("bf16", rounded)):
            with checks.part(f"{model}, {precision}"):
                compare_losses(checks, f"{model}, {precision}", runs[model], on_cpu[model], precision)
        with checks.part(f"{model}, killed and resumed"):
            compare_resumed(checks, model, killed[model][1], rounded[model])
    for stage, staged in stages.items():
        with checks.part(f"dis, ZeRO {stage}"):
            compare_losses(checks, f"dis, ZeRO {stage}", staged, exact["dis"], "fp32")


def compare_resumed(checks: Checks, model: str, resumed: TrainingRun, undisturbed: TrainingRun) -> None:
    ours, theirs = published(resumed), published(undisturbed)
    off = max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
    allowed = 1e-3 if model.startswith("dit") else 0.0  # attention adds gradients in no fixed order
    checks.add(f"{model}, bf16: weights after a kill and a resume, against an undisturbed run", off, allowed)


def gaussian_sweep(sweep: Sweep) -> Sweep:
    """The same sweep with noise prediction instead of flow matching, for its samplers."""
    changes = {"name": "gaussian", "diffusion": Gaussian(kind="gaussian")}
    return Sweep.below(sweep.store, sweep.recipe.model_copy(update=changes))


def compare_losses(checks: Checks, name: str, ours: TrainingRun, theirs: TrainingRun, precision: str) -> None:
    pairs = list(zip(digits.losses(ours), digits.losses(theirs), strict=True))
    checks.add(f"{name}: first logged loss", relative(*pairs[0]), FIRST_LOSS[precision])
    last = np.mean(pairs[-10:], axis=0)
    checks.add(f"{name}: mean of the last ten logged losses", relative(*last), LAST_LOSS[precision])


def published(run: TrainingRun) -> dict[str, torch.Tensor]:
    return load_published(run.sweep.run(run.model), run.sweep.recipe.train.images)


def sample(checks: Checks, sweep: Sweep, chosen: Options) -> None:
    """Sample the model that the CPU trained with each sampler, on the CPU and on the device."""
    flow, gaussian = (FLOW_SAMPLERS, sweep), (GAUSSIAN_SAMPLERS, gaussian_sweep(sweep))
    for samplers, trained in (flow, gaussian):
        for name in samplers[:1] if chosen.quick else samplers:
            here, there = (distance(trained, sweep, name, device) for device in (chosen.device, torch.device("cpu")))
            checks.add(f"{name}: distance of samples, {here:.4g} against {there:.4g}", relative(here, there), DISTANCE)


def distance(trained: Sweep, sweep: Sweep, sampler: str, device: torch.device) -> float:
    """The distance between samples and real images under the sweep's extractor, decoded and measured on the device."""
    settings = trained.recipe.evaluate.model_copy(update={"sampler": sampler})
    decoder = vae.load(sweep)
    decoder.net.to(device)
    sampler_on = BlockSampler(trained, decoder, load_extractors(sweep, device), None, labels_of(sweep), device)
    block = sampler_on.sample(sampler_on.model("dis", trained.recipe.train.images, settings), settings, 0)
    ((name, features),) = block.features.items()
    return load_all(sweep)[name].frechet(metrics.Sums().plus(features.pooled).mean_covariance())


if __name__ == "__main__":
    sys.exit(not main(options(__doc__)))
