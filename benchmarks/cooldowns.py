"""Cooldown branches against complete trainings on the digits: distance after each count, and what each costs.

    python -m benchmarks.cooldowns [FOLDER]

One trunk at a constant rate with a branch for each count, against one training per count with the demo's schedule, which decays
over the second half; three seeds of each. FOLDER keeps what is prepared and trained, so that a rerun measures again only.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import torch

from benchmarks import digits
from benchmarks.digits import TrainingRun
from dis_scale import vae
from dis_scale.evaluation import metrics
from dis_scale.evaluation.features import load_extractors
from dis_scale.evaluation.reference import load_all
from dis_scale.evaluation.sampling import BlockSampler, labels_of
from dis_scale.planning.plan import price_sweep
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep, state

COUNTS, SEEDS, SHARE, SAMPLES = (32_000, 64_000, 128_000), 3, 0.2, 1000
MODEL = f"kind: dis, width: 32, depth: 2, patch: 2, drop_path: 0.0, seeds: {SEEDS}"
LAST = int((1 - SHARE) * COUNTS[-1])
COOLED = (
    "name=cooled", f"models={{dis: {{{MODEL}}}}}", f"train.publish_images=[{LAST}]", "train.decay=none", "train.decay_from=0",
    f"train.cooldowns={{images: {list(COUNTS)}, share: {SHARE}}}",
)  # fmt: skip
COMPLETE = (
    "name=complete",
    "models={" + ", ".join(f"dis-at-{n}: {{{MODEL}, train: {{publish_images: [{n}]}}}}" for n in COUNTS) + "}",
)


def recipe_of(root: Path, *settings: str) -> Recipe:
    shared = (f"storage.root={root}", "train.workers=1", "train.power_ema=null", f"evaluate.block_images={SAMPLES}")
    return reading.load(digits.RECIPE, [*shared, "train.ema_ramp=0.05", *settings])


def prepared(root: Path) -> Sweep:
    """Return a sweep with autoencoder, extractor, reference and latents, made unless the folder has them."""
    recipe = recipe_of(root)
    sweep = Sweep.below(open_folder(root), recipe)
    made = state.find_latents(sweep.folder) is not None
    return sweep if made else digits.prepare(recipe, root, torch.device("cpu"))


def train(sweep: Sweep, shared: Sweep) -> float:
    """Train the models of a sweep that are left, a seed's in turn; return the CPU seconds."""
    latents, before = state.require_latents(shared.folder), getrusage(RUSAGE_CHILDREN)
    by_seed: dict[int, list[TrainingRun]] = {}
    for model in sweep.recipe.models:  # trunks come before their branches
        if not state.trained(sweep, model):
            by_seed.setdefault(sweep.recipe.seed_of(model), []).append(TrainingRun(sweep, latents, model, "cpu"))
    if failures := digits.train_all(list(by_seed.values()), at_once=2):
        raise RuntimeError("; ".join(failures))
    after = getrusage(RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def distance(trained: Sweep, shared: Sweep, model: str, images: int) -> float:
    settings, device = trained.recipe.evaluate, torch.device("cpu")
    extractors, labels = load_extractors(shared, device), labels_of(shared)
    sampler = BlockSampler(trained, vae.load(shared), extractors, None, labels, device)
    block = sampler.sample(sampler.model(model, images, settings), settings, 0)
    ((name, features),) = block.features.items()
    return metrics.frechet(metrics.fit(features.pooled), load_all(shared)[name].pooled)


def compare(sweeps: dict[str, Sweep], shared: Sweep, images: int) -> dict[str, Any]:
    """Return mean and standard error over the seeds of both ways to a count."""
    row: dict[str, Any] = {"images": images}
    for name, sweep in sweeps.items():
        models = [m for m in sweep.recipe.models if sweep.recipe.train_of(m).images == images]
        distances = [distance(sweep, shared, model, images) for model in models]
        error = statistics.stdev(distances) / len(distances) ** 0.5
        row |= {name: round(statistics.fmean(distances), 1), f"{name}, error": round(error, 1)}
    return row


def show(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def main(root: Path) -> None:
    shared = prepared(root)
    store = open_folder(root)
    sweeps = {
        name: Sweep.below(store, recipe_of(root, *own)) for name, own in (("cooled", COOLED), ("complete", COMPLETE))
    }
    for name, sweep in sweeps.items():
        sweep.save_recipe()
        plan = price_sweep(sweep.recipe, vae.latent_shape(sweep.recipe.vae, sweep.recipe.data.resolution))
        flops = sum(plan.own_flops(model) for model in sweep.recipe.models)
        show({"name": name, "operations of all seeds": f"{flops:.4g}", "CPU s": round(train(sweep, shared))})
    for images in COUNTS:
        show(compare(sweeps, shared, images))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary))
