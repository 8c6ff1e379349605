"""Published weights: averaged weights at the recipe's image counts, kept for ever and read by evaluation and sampling.

training/resume.py writes them. Read next: ema.py for the averages, opening.py for sampling from them.
"""

import safetensors.torch
import torch

from dis_scale.process.errors import StorageError
from dis_scale.recipe import Train
from dis_scale.storage.folder import Folder
from dis_scale.sweep import Run, state
from dis_scale.sweep.documents import WEIGHTS_FILE, PublishedManifest
from dis_scale.weights import ema
from dis_scale.weights.ema import Snapshot

NEGLIGIBLE = 1e-9
"""Share of a snapshot in a rebuilt average that float32 does not show."""


def load_published(run: Run, images_seen: int) -> dict[str, torch.Tensor]:
    """Return the EMA weights by parameter; StorageError names what is missing or damaged."""
    return _load(run.published_at(images_seen), WEIGHTS_FILE)


def snapshots(run: Run, images_seen: int, train: Train) -> list[Snapshot]:
    """Return the published power-function averages up to `images_seen`, from which any other can be rebuilt."""
    counts = [n for n in state.published_counts(run) if 0 < n <= images_seen]
    return [Snapshot(n, width) for n in counts for width in train.power_ema or ()]


def load_average(run: Run, images_seen: int, train: Train, width: float) -> dict[str, torch.Tensor]:
    """Return the weights averaged with a power function of relative width `width`, rebuilt from the run's `snapshots`.

    The more counts were published before `images_seen`, the closer it is to the average that training would have tracked: see
    `ema.misfit`.
    """
    known = snapshots(run, images_seen, train)
    if not known:
        return load_published(run, images_seen)  # before the first step all averages are the initial weights
    shares = ema.coefficients(known, Snapshot(images_seen, width))
    total: dict[str, torch.Tensor] = {}
    for snapshot, share in zip(known, shares.tolist(), strict=True):
        if abs(share) < NEGLIGIBLE:  # a tracked width needs one snapshot; each is a file of the model's size
            continue
        folder = run.published_at(snapshot.images)
        for name, tensor in _load(folder, average_file(ema.power_name(snapshot.width))).items():
            total[name] = total.get(name, 0) + share * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}


def _load(published: Folder, name: str) -> dict[str, torch.Tensor]:
    manifest = PublishedManifest.find(published)
    if manifest is None:
        raise StorageError(f"{published}: not published (no {PublishedManifest.NAME})")
    stored = manifest.stored_file(name)
    if stored is None:
        raise StorageError(f"{published}: no average {name}: power-function averages are tracked if train.power_ema is set")
    tensors: dict[str, torch.Tensor] = safetensors.torch.load(manifest.read_file(published, stored))
    return tensors


def average_file(name: str) -> str:
    """Return the file in which an average is published; the exponential one is the model's weights."""
    return WEIGHTS_FILE if name == ema.EXPONENTIAL else f"{name}.safetensors"
