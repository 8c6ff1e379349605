"""The digits' sweep without Ray, for bringing up a device: everything before training, then training runs as processes.

The images are scikit-learn's digits, or generated ones if it is missing. Nothing here imports ray, mlflow or s3fs.
Read next: smoke.py.
"""

import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from dis_scale import vae
from dis_scale.data import encode, shards
from dis_scale.data.sources import Source, load_subset, open_source
from dis_scale.evaluation import reference
from dis_scale.evaluation.classifiers import train_classifier
from dis_scale.evaluation.features import load_extractors, store_classifier
from dis_scale.recipe import Recipe, TrainedVae, reading
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sweep, state
from dis_scale.tracking.rows import RowReader
from dis_scale.vae import small
from tests.support.documents import made_from

RECIPE = Path(__file__).parent.parent / "configs/digits.yaml"
MODELS = """models={
    dis: {kind: dis, width: 32, depth: 2, patch: 2, drop_path: 0.0},
    diffussm: {kind: diffussm, width: 32, depth: 2, state_size: 16},
    dit: {kind: dit, width: 64, depth: 2, heads: 4, patch: 2}}"""
BATCH_IMAGES = 64
GENERATED_IMAGES, CLASSES = 600, 10


def say_missing(name: str, reason: str) -> None:
    print(json.dumps({"name": name, "not measured": reason}), flush=True)


def recipe_of(root: Path, steps: int, *, quick: bool) -> Recipe:
    """The digits' recipe with one small model of each kind, `steps` long. What is missing here is replaced, and named."""
    images = steps * BATCH_IMAGES
    overrides = [
        MODELS, f"storage.root={root}", f"train.batch_images={BATCH_IMAGES}", "train.workers=1", "train.lanes=2",
        f"train.publish_images=[0, {images}]", f"train.resume_every_images={images // 3}", "train.warmup_images=640",
        "train.learning_rate=3e-3",
        "data.held_out_images=0", "evaluate.metrics=[distance]", "evaluate.batch_images=64",
    ]  # fmt: skip
    samples, steps, extractor_steps = (80, 2, 20) if quick else (256, 10, 300)
    overrides += [
        f"evaluate.samples={samples}", f"evaluate.block_images={samples}", f"evaluate.steps={steps}",
        f"evaluate.extractor.steps={extractor_steps}",
    ]  # fmt: skip
    if find_spec("sklearn") is None:
        say_missing("digits", "scikit-learn is not installed: generated images instead")
        overrides.append(f"data.source={{kind: folder, url: {generated_images(root / 'generated')}}}")
    if find_spec("diffusers") is None:
        say_missing("autoencoder", "diffusers is not installed: latents are pixels")
        overrides.append("vae={kind: none}")
    elif quick:
        overrides.append("vae={kind: trained, widths: [8, 8, 8], steps: 5}")
    else:
        overrides.append("vae.steps=150")
    return reading.load(RECIPE, [" ".join(line.split()) for line in overrides])


def generated_images(folder: Path) -> Path:
    """Write images of ten classes, a noisy bar at ten angles each; return the folder."""
    rng, axis = np.random.default_rng(0), np.linspace(-1, 1, 32)
    for i in range(GENERATED_IMAGES):
        angle = np.pi * (i % CLASSES) / CLASSES
        distance = np.abs(axis[:, None] * np.cos(angle) + axis[None] * np.sin(angle) - rng.normal(0, 0.2))
        pixels = np.clip(255 * np.exp(-30 * distance**2) + rng.normal(0, 8, (32, 32)), 0, 255).astype(np.uint8)
        (folder / str(i % CLASSES)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert("RGB").save(folder / str(i % CLASSES) / f"{i:04d}.png")
    return folder


def prepare(recipe: Recipe, root: Path, device: torch.device) -> Sweep:
    """Make all that precedes training, as the stages prepare and precompute do; encode on `device`."""
    sweep = Sweep.below(open_folder(root), recipe)
    sweep.save_recipe()
    source = open_source(recipe.data, sweep.store)
    pixels, labels = load_subset(source, recipe.data)
    if isinstance(recipe.vae, TrainedVae):
        vae.save(sweep.vae, small.train_vae(recipe.vae, pixels, recipe.seed, _ignore))
    trained = recipe.evaluate.trained
    assert trained
    net, accuracy = train_classifier("extractor", pixels, labels, CLASSES, trained.steps, recipe.seed, _ignore)
    store_classifier(sweep, trained.name, net, accuracy)
    reference.prepare(sweep, source, load_extractors(sweep, torch.device("cpu")), _ignore)
    encode_all(sweep, source, device)
    return sweep


def encode_all(sweep: Sweep, source: Source, device: torch.device) -> None:
    """Encode all images to latents through the path of the precompute stage; from here on without TF32, as its workers."""
    encode.compute_exactly()
    recipe, net = sweep.recipe, vae.load(sweep)
    latents = shards.latents_folder(sweep, net.identity)
    numbers = shards.shard_numbers(len(source), recipe.precompute)
    net.net.to(device)
    encode.put_shards(encode.Setup(source, net, recipe), latents, numbers, _ignore)
    shape = net.latent(recipe.data.resolution)
    made = made_from(net.identity, shape, scale=net.scale, shift=net.shift, num_classes=recipe.data.num_classes)
    shards.write_manifest(latents, numbers, made)
    state.use_latents(sweep, latents, net.identity)


class TrainingRun(NamedTuple):
    """One model's training on a device, in a sweep of its own below the same root.

    `changes` are settings of `train`, `kill_at` the images seen at which the process kills itself.
    """

    sweep: Sweep
    latents: Folder
    model: str
    device: str
    kill_at: int | None = None


def varied(sweep: Sweep, name: str, changes: dict[str, Any]) -> Sweep:
    """The sweep under another name, with other settings of training."""
    train = sweep.recipe.train.model_copy(update=changes)
    return Sweep.below(sweep.store, sweep.recipe.model_copy(update={"name": name, "train": train}))


def train_all(runs: list[list[TrainingRun]], at_once: int) -> list[str]:
    """Train each list of runs in turn, one process after the other; `at_once` lists together. Return what failed."""
    with ThreadPoolExecutor(at_once) as pool:
        ended = [pool.submit(_in_turn, each) for each in runs]
    return [str(error) for each in ended if (error := each.exception())]


def _in_turn(runs: list[TrainingRun]) -> None:
    for attempt, run in enumerate(runs):
        process = multiprocessing.get_context("spawn").Process(target=train, args=(run, attempt))
        process.start()
        process.join()
        expected = 0 if run.kill_at is None else -signal.SIGKILL
        if process.exitcode != expected:
            raise RuntimeError(f"{run.sweep.recipe.name}, {run.model} on {run.device}: exit code {process.exitcode}")


def train(run: TrainingRun, attempt: int) -> None:
    """Train in this process: alone in its process group."""
    torch.set_num_threads(1)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # as pipelines/environment.py sets it for workers
    from dis_scale.training.attempt import Attempt, Start
    from dis_scale.training.loop import train_model
    from dis_scale.training.profile import process_group

    def killed(images_seen: int) -> None:
        if run.kill_at is not None and images_seen >= run.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    device = torch.device(run.device)
    with process_group(device):
        train_model(Attempt(
            run.sweep, run.model, run.latents, attempt, device, Start(time.time()), require_held=lambda: None,
            stop_by=lambda: None, report=killed, log=print, emit=lambda *_, **__: None,
        ))  # fmt: skip


def losses(run: TrainingRun) -> list[float]:
    """The logged losses, in order of images seen."""
    rows = RowReader(run.sweep.run(run.model).log).new()
    return [row.value for row in sorted(rows, key=lambda row: row.images) if row.name == "loss"]


def _ignore(_: int) -> None: ...
