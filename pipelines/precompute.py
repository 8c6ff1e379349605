"""Precompute, a Ray job: workers encode images to posterior moments and write latent shards; the driver writes the manifest last.

Workers take shard numbers from one dealer, so a slow worker does not hold up the others. A shard's bytes do not depend on which
worker makes it: dis_scale/data/encode.py.
"""

import json
import threading
from collections.abc import Callable
from typing import Any

import ray
import torch

from dis_scale import vae
from dis_scale.data import shards
from dis_scale.data.encode import Setup, compute_exactly, put_shards, require_same_hardware
from dis_scale.data.sources import open_source
from dis_scale.errors import UserError
from dis_scale.progress import listing_words, now_and_then
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder
from dis_scale.sweep import Sweep, state
from pipelines import lines, stage
from pipelines.restarts import with_restarts
from pipelines.worker import Worker, WorkerFailure, choose_device, resources, spawn, watch

BEGUN = "begun.json"
CHECKING = "latents  {:,} of {:,} finished shards checked"


class Dealer:
    """Deals each number to one caller; None when there are no more."""

    def __init__(self, numbers: list[int]) -> None:
        self._left, self._lock = iter(numbers), threading.Lock()

    def next(self) -> int | None:
        with self._lock:
            return next(self._left, None)


class Encoder(Worker):
    """Encodes shards by number; progress counts images."""

    def encode(self, sweep: Sweep, latents: Folder, device: str, deal: Callable[[], int | None]) -> None:
        compute_exactly()
        require_same_hardware(latents, device)
        setup = open_setup(sweep)
        setup.vae.net.to(device)
        self.emit("work")
        put_shards(setup, latents, iter(deal, None), self._count)

    def _count(self, images: int) -> None:
        self.report(self._done + images)
        self.raise_if_stopped("a rerun repeats the unfinished shard")


def precompute(sweep: Sweep, _: list[str]) -> None:
    """Make the shards that are missing and write the manifest last."""
    stage.connect()
    device, why = choose_device(sweep.recipe)
    encoder = vae.load(sweep)
    latents = shards.latents_folder(sweep, encoder.identity)
    lines.say(f"latents  {latents} on {device} ({why})")
    if manifest.find(latents) is None:
        source = open_source(sweep.recipe.data, sweep.store, listing_words(lines.say))
        make_latents(sweep, latents, Setup(source, encoder, sweep.recipe), device, encode_on_ray)
    state.use_latents(sweep, latents, encoder.identity)


def open_setup(sweep: Sweep) -> Setup:
    """Return what encoding needs: the source, the VAE and the recipe."""
    return Setup(open_source(sweep.recipe.data, sweep.store), vae.load(sweep), sweep.recipe)


Encode = Callable[[Sweep, Folder, Setup, str, list[int]], None]
"""Makes the shards of these numbers."""


def make_latents(sweep: Sweep, latents: Folder, setup: Setup, device: str, encode: Encode) -> None:
    """Begin or continue a set of latents and seal it."""
    _require_one_kind(latents, device, setup.source.listing.facts["sha256"])
    for name in shards.clear_strays(latents, setup.numbers):
        lines.say(f"{name} is not part of the set: deleted")

    def attempt(_: WorkerFailure | None) -> None:
        done = shards.finished(latents, setup.numbers, now_and_then(lines.say, CHECKING))
        encode(sweep, latents, setup, device, [n for n in setup.numbers if n not in done])

    with_restarts(setup.recipe, "precompute", attempt, lambda: len(latents.list()))
    stage.raise_if_stopped()
    sealed = shards.write_manifest(latents, setup.numbers, _facts(setup, device))
    lines.say(f"{sealed['count']} latents in {len(setup.numbers)} shards, {len(sealed['refused'])} images refused")


def encode_on_ray(sweep: Sweep, latents: Folder, setup: Setup, device: str, left: list[int]) -> None:
    """Make the shards in workers on Ray: as many as the recipe names and the cluster can hold."""
    recipe, images = setup.recipe, len(setup.source)
    capacity = int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 1))
    before = images - sum(len(setup.positions(n)) for n in left)
    dealer = ray.remote(num_cpus=0)(Dealer).remote(left)
    options = resources("precompute", device, 1)
    workers = [spawn(Encoder, options) for _ in range(min(recipe.precompute.workers, len(left), capacity))]
    results = [w.encode.remote(sweep, latents, device, _RemoteDealer(dealer)) for w in workers]
    watch(workers, results, lambda done: lines.progress(min(before + sum(done), images), images, "images"))


class _RemoteDealer:
    """A remote call for the dealer's next number; picklable."""

    def __init__(self, dealer: Any) -> None:
        self._dealer = dealer

    def __call__(self) -> int | None:
        return ray.get(self._dealer.next.remote())


def _require_one_kind(latents: Folder, device: str, listing: str) -> None:
    """A set is made from one listing of images by one kind of hardware and PyTorch: otherwise its bytes would differ."""
    ours = {"format": manifest.FORMAT, "device": device, "torch": torch.__version__, "listing": listing}
    latents.create(BEGUN, json.dumps(ours).encode())
    theirs = latents.read_json(BEGUN)
    if different := [f"{key} {theirs.get(key)!r}, now {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]:
        raise UserError(
            f"{latents}: begun with {'; '.join(different)}: finish it as it was begun, or delete it, or use another root"
        )


def _facts(setup: Setup, device: str) -> dict[str, Any]:
    recipe, encoder, listing = setup.recipe, setup.vae, setup.source.listing
    return {
        "source": recipe.data.source.model_dump(mode="json"), "listing": listing.facts["sha256"],
        "resolution": recipe.data.resolution, "images": len(listing),
        "vae": encoder.identity, "scale": encoder.scale, "shift": encoder.shift,
        "latent": list(encoder.latent(recipe.data.resolution)), "num_classes": recipe.data.num_classes,
        "label_names": setup.source.label_names, "shard_images": recipe.precompute.shard_images,
        "encode_images": recipe.precompute.encode_images, "device": device, "torch": torch.__version__,
    }  # fmt: skip
