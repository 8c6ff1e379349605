"""Stored documents with the fields that a test names, and plain values for the others."""

from collections.abc import Mapping
from itertools import product
from typing import Any, TypeVar

from dis_scale.recipe import LatentShape, Sampling
from dis_scale.storage.folder import Folder
from dis_scale.storage.manifest import Digest, Manifest
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import (
    Encoding,
    LatentsManifest,
    MadeFrom,
    Metrics,
    PublishedManifest,
    ResumePointManifest,
    RunState,
    Skipped,
    StoredClassifier,
)
from dis_scale.sweep.extractors import reference_file, weights_identity

SAMPLING = Sampling(sampler="ddpm", steps=10)
M = TypeVar("M", bound=Manifest)
WEIGHTS = {"weights.safetensors": b"weights"}


def put(manifest: M, folder: Folder, files: Mapping[str, bytes]) -> M:
    """Write files, and a manifest with their digests beside them; return it."""
    for name, data in files.items():
        folder.write(name, data)
    sealed = manifest.changed(files={name: Digest.of(data) for name, data in files.items()})
    sealed.write(folder)
    return sealed


def put_files(folder: Folder, files: Mapping[str, bytes] = WEIGHTS) -> Manifest:
    """Write a folder that exists, with these files."""
    return put(Manifest(files={}), folder, files)


def put_published(folder: Folder, weights: bytes = b"", images: int = 0, attempt: int = 1) -> PublishedManifest:
    """Write published weights of an attempt."""
    manifest = PublishedManifest(files={}, images=images, attempt=attempt)
    return put(manifest, folder, {f"weights-{attempt:04d}.safetensors": weights})


def put_resume_point(folder: Folder, files: Mapping[str, bytes] = WEIGHTS, images: int = 0, at: float = 0.0) -> ResumePointManifest:
    """Write a complete resume point."""
    progress = RunState(model="dit", latents="", adam_step=0, at=at)
    manifest = ResumePointManifest(files={}, images=images, attempt=1, world=1, tables={}, progress=progress)
    return put(manifest, folder, files)


def put_classifier(folder: Folder) -> StoredClassifier:
    """Write what the prepare stage does, with weights that no network has."""
    return put(StoredClassifier(files={}, kind="extractor", num_classes=10, held_out_accuracy=1.0), folder, WEIGHTS)


def put_metrics(
    folder: Folder, values: Mapping[str, float] | None = None, metrics: tuple[str, ...] = ("distance",), **more: Any
) -> Metrics:
    """Write the metrics of an evaluation."""
    written = Metrics(values=dict(values or {}), metrics=metrics, **({"sampling": SAMPLING} | more))
    written.write(folder)
    return written


def put_prepared(sweep: Sweep, statistics: bytes = b"statistics") -> None:
    """Write all that the prepare stage makes."""
    put_files(sweep.vae)
    for name, _ in state.classifiers(sweep):
        put_classifier(sweep.extractor(name))
    for extractor in sweep.recipe.evaluate.extractors:
        identity = weights_identity(sweep, extractor)
        sweep.references.write(reference_file(sweep, extractor.name, identity), statistics)


def put_evaluated(sweep: Sweep) -> None:
    """Write the metrics of all evaluations, and why there is no floor."""
    settings = sweep.recipe.evaluate
    for model, variant in product(sweep.recipe.models, settings.samplings):
        for count in sweep.recipe.train_of(model).publish_images:
            put_metrics(sweep.evaluation(Sampled(model, count, variant)), {settings.metric: 9.0}, settings.metrics)
    Skipped(why="too few images").write(sweep.floor)


def made_from(vae: str = "v", latent: tuple[int, int] = (4, 8), **more: Any) -> MadeFrom:
    """Return what a set of latents was made from; `more` are fields of it or of its encoding."""
    encoding = {"identity": vae, "shift": 0.0, "scale": 1.0, "latent": LatentShape(*latent), "device": "cpu", "torch": "2"}
    encoding |= {name: more.pop(name) for name in list(more) if name in Encoding.model_fields}
    plain = {
        "source": {}, "listing": "", "resolution": 32, "shard_images": 4, "encode_images": 4, "precision": "fp32",
        "num_classes": 10,
    }  # fmt: skip
    return MadeFrom(**(plain | more), encoding=Encoding(**encoding))


def put_latents(folder: Folder, vae: str = "v", latent: tuple[int, int] = (4, 8), **more: Any) -> LatentsManifest:
    """Write the manifest of a set without shards; `more` are its fields, or those of `made_from`."""
    statistics = {
        "mixing": {}, "count": 0, "mean": (), "std": (), "posterior_variance": (), "labels": {}, "refused": (), "shards": (),
    }  # fmt: skip
    statistics |= {name: more.pop(name) for name in list(more) if name in statistics}
    manifest = LatentsManifest(made_from=made_from(vae, latent, **more), **statistics)
    manifest.write(folder)
    return manifest
