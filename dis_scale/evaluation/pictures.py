"""Pictures from one checkpoint, for `dis-scale sample`: a sweep's published weights, an exported file, or a public `.pt`.

Noise is a function of the seed and the sample's number, so the batch size does not change the pictures.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dis_scale import diffusion, vae
from dis_scale.diffusion.generate import generate
from dis_scale.diffusion.process import check_labels
from dis_scale.errors import UserError
from dis_scale.models import Backbone
from dis_scale.models.export import open_checkpoint
from dis_scale.recipe import Flow, Gaussian, PretrainedVae
from dis_scale.storage import manifest
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import RECIPE, Sweep
from dis_scale.training.checkpoint import WEIGHTS_FILE, stored_file
from dis_scale.vae import Vae


@dataclass(frozen=True)
class OpenCheckpoint:
    """A model, the process that it was trained for, and the decoder of its latents."""

    model: Backbone
    process: Gaussian | Flow
    decoder: Vae
    sampler: str = "ddpm"
    steps: int = 250
    """The sweep's sampling settings, or the published 250 steps."""


def open_for_sampling(path: Path, vae_path: str | None, heads: int | None = None) -> OpenCheckpoint:
    """Open the model at `path`. A sweep's published folder has a VAE and a process; any other path needs `vae_path`."""
    file = path / (_weights_in(path) or WEIGHTS_FILE) if path.is_dir() else path
    if not file.exists():
        raise UserError(f"no checkpoint at {path}: expected a published folder, a .safetensors file or a public .pt")
    model = open_checkpoint(file, heads)
    root = next((parent for parent in file.absolute().parents if (parent / RECIPE).exists()), None)
    sweep = Sweep.open(str(root)) if root else None
    if vae_path is not None:
        decoder = vae.load_pretrained(PretrainedVae(kind="pretrained", path=vae_path))
    elif sweep is not None:
        decoder = vae.load(sweep)
    else:
        raise UserError(f"{path} is not in a sweep, so name the VAE of its latents: --vae FOLDER or hub id")
    if sweep is None:
        return OpenCheckpoint(model, Gaussian(kind="gaussian"), decoder)
    recipe, decoder = sweep.recipe, vae.for_samples(sweep, decoder)
    return OpenCheckpoint(model, recipe.diffusion, decoder, recipe.evaluate.sampler, recipe.evaluate.steps)


def _weights_in(published: Path) -> str | None:
    """The file of the averaged weights in a published folder."""
    contents = manifest.find(open_folder(published))
    return stored_file(WEIGHTS_FILE, contents) if contents else None


def sample_pictures(
    opened: OpenCheckpoint,
    classes: list[int] | None,
    count: int,
    *,
    sampler: str,
    steps: int,
    guidance: float,
    seed: int,
    batch: int,
) -> np.ndarray:
    """Sample uint8 images (count, H, W, 3), the classes in turn, `batch` at a time; UserError for a label out of range."""
    labels = None if classes is None else [classes[i % len(classes)] for i in range(count)]
    if labels is not None and opened.model.num_classes is not None:
        check_labels(torch.tensor(labels), opened.model.num_classes)
    process, images = diffusion.build(opened.process), []
    for first in range(0, count, batch):
        numbers = range(first, min(first + batch, count))
        part = None if labels is None else [labels[n] for n in numbers]
        with torch.no_grad():
            latents = generate(
                opened.model, process, part, list(numbers), sampler=sampler, steps=steps, guidance=guidance, seed=seed
            )
        images.append(opened.decoder.decode(latents))
    return np.concatenate(images)
