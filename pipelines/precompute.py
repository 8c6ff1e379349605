"""Precompute, a Ray job: workers encode images to posterior moments and put latent shards; the driver seals them with the manifest.

Which worker makes a shard changes nothing in it: encode batches have a fixed size, are cut at shard borders, the last is padded.
"""

import hashlib
import json
from typing import Any

import numpy as np
import ray
import torch

from dis_scale import manifest, vae
from dis_scale.data import shards
from dis_scale.data.shards import Sample
from dis_scale.data.sources import Source, open_source
from dis_scale.errors import UndecodableImage, UserError
from dis_scale.recipe import Recipe
from dis_scale.storage import Folder
from dis_scale.vae import Vae
from pipelines import stage

BEGUN = "begun.json"


class Encoder(stage.Worker):
    """Encodes shards by number; progress counts images."""

    def encode(self, sweep: Folder, latents: Folder, recipe: Recipe, device: str, numbers: list[int]) -> None:
        _compute_exactly()
        source, encoder = open_source(recipe.data), vae.load(recipe.vae, sweep)
        encoder.net.to(device)
        for number in numbers:
            if self._wish.is_set():
                return
            images, refused = _decode(source, recipe, number)
            shards.put_shard(
                latents, number, _encode(encoder, source, images, recipe.precompute.encode_images), refused
            )
            self._done += len(images) + len(refused)


def precompute(sweep: Folder, recipe: Recipe, _: list[str]) -> None:
    """Makes the shards that are not there yet and writes the manifest last."""
    stage.connect()
    device, why = stage.choose_device(recipe)
    source, encoder = open_source(recipe.data), vae.load(recipe.vae, sweep)
    latents = shards.latents_folder(sweep, recipe, encoder.identity)
    stage.say(f"latents  {latents} on {device} ({why})")
    if manifest.find(latents) is None:
        _make(sweep, latents, recipe, source, encoder, device)
    shards.point_to(sweep, latents, encoder.identity)


def _make(sweep: Folder, latents: Folder, recipe: Recipe, source: Source, encoder: Vae, device: str) -> None:
    listing = _listing(source)
    _require_one_kind(latents, device, listing)
    numbers = range(-(-len(source) // recipe.precompute.shard_images))
    stage.with_restarts(
        recipe, "precompute", lambda: _encode_missing(sweep, latents, recipe, len(source), device, numbers)
    )
    stage.leave_if_asked()
    found = shards.seal(latents, numbers, _facts(recipe, source, listing, encoder, device))
    stage.say(f"{found['count']} latents in {len(numbers)} shards, {len(found['refused'])} images refused")


def _encode_missing(sweep: Folder, latents: Folder, recipe: Recipe, images: int, device: str, numbers: range) -> None:
    """Workers make the shards that are not whole yet, each its share by number."""
    done = shards.finished(latents, numbers)
    left = [n for n in numbers if n not in done]
    room = int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 1))
    count, before = min(recipe.precompute.workers, len(left), room), len(done) * recipe.precompute.shard_images
    workers = [stage.spawn(Encoder, stage.resources("precompute", device, 1)) for _ in range(count)]
    parts = [w.encode.remote(sweep, latents, recipe, device, left[i::count]) for i, w in enumerate(workers)]
    stage.watch(workers, parts, lambda d: stage.progress(min(before + sum(d), images), images, "images"))


def _compute_exactly() -> None:
    """One thread a worker and no TF32: the same sums whoever encodes. Not in the actor, as Ray cannot pickle `torch.backends`."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def _decode(source: Source, recipe: Recipe, number: int) -> tuple[dict[int, np.ndarray], list[str]]:
    """The shard's images by position, and the names of those that cannot be decoded (an error, unless the recipe skips them)."""
    first = number * recipe.precompute.shard_images
    images, refused = {}, []
    for position in range(first, min(first + recipe.precompute.shard_images, len(source))):
        try:
            images[position] = source.pixels(position, recipe.data.resolution)
        except UndecodableImage:
            if recipe.data.undecodable == "refuse":
                raise
            refused.append(source.names[position])
    return images, refused


def _encode(encoder: Vae, source: Source, images: dict[int, np.ndarray], batch: int) -> list[Sample]:
    positions, samples = list(images), []
    for i in range(0, len(positions), batch):
        part = positions[i : i + batch]
        pixels = np.stack([images[p] for p in part] + [images[part[-1]]] * (batch - len(part)))
        sides = [encoder.encode(side).half().cpu().numpy() for side in (pixels, pixels[:, :, ::-1])]
        moments = np.stack(sides, axis=1)
        samples += [Sample(p, source.names[p], source.labels[p], moments[j]) for j, p in enumerate(part)]
    return samples


def _require_one_kind(latents: Folder, device: str, listing: str) -> None:
    """One set is filled from one listing of images by one kind of hardware and PyTorch: else its bytes would differ."""
    ours = {"format": manifest.FORMAT, "device": device, "torch": torch.__version__, "listing": listing}
    latents.create(BEGUN, json.dumps(ours).encode())
    theirs = latents.read_json(BEGUN)
    if different := [f"{key} {theirs.get(key)!r}, now {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]:
        raise UserError(
            f"{latents}: begun with {'; '.join(different)}: finish it as it was begun, or delete it, or use another root"
        )


def _listing(source: Source) -> str:
    """sha256 over names and labels in their order."""
    lines = "\n".join(f"{name}\t{label}" for name, label in zip(source.names, source.labels, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _facts(recipe: Recipe, source: Source, listing: str, encoder: Vae, device: str) -> dict[str, Any]:
    return {
        "source": recipe.data.source.model_dump(mode="json"), "listing": listing, "resolution": recipe.data.resolution,
        "vae": encoder.identity, "scale": encoder.scale, "shift": encoder.shift,
        "latent": list(encoder.latent(recipe.data.resolution)), "num_classes": recipe.data.num_classes,
        "label_names": source.label_names, "shard_images": recipe.precompute.shard_images,
        "encode_images": recipe.precompute.encode_images, "device": device, "torch": torch.__version__,
    }  # fmt: skip
