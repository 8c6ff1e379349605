"""Precompute, a Ray job: workers encode images to posterior moments and put latent shards; the driver seals them with the manifest.

Workers take shards by number from one dealer as they get to them, so that a slow one holds nobody. Which worker makes a shard
changes nothing in it: dis_scale/data/encode.py.
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
from dis_scale.errors import Preempted, UserError
from dis_scale.progress import listing_words, now_and_then
from dis_scale.recipe import Recipe
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder
from pipelines import stage

BEGUN = "begun.json"
CHECKING = "latents  {:,} of {:,} finished shards checked"


class Dealer:
    """Deals numbers to whoever asks, each once; None when there are no more."""

    def __init__(self, numbers: list[int]) -> None:
        self._left, self._one_at_a_time = iter(numbers), threading.Lock()

    def next(self) -> int | None:
        with self._one_at_a_time:
            return next(self._left, None)


class Encoder(stage.Worker):
    """Encodes shards by number; progress counts images."""

    def encode(
        self, sweep: Folder, latents: Folder, recipe: Recipe, device: str, deal: Callable[[], int | None]
    ) -> None:
        compute_exactly()
        require_same_hardware(latents, device)
        setup = Setup(open_source(recipe.data, shards.store_of(sweep)), vae.load(recipe.vae, sweep), recipe)
        setup.vae.net.to(device)
        put_shards(setup, latents, iter(deal, None), self._count)

    def _count(self, images: int) -> None:
        self._done += images
        if self._wish.is_set():
            raise Preempted("stopped as asked; the shard under way is made again")


def precompute(sweep: Folder, recipe: Recipe, _: list[str]) -> None:
    """Makes the shards that are not there yet and writes the manifest last."""
    stage.connect()
    device, why = stage.choose_device(recipe)
    encoder = vae.load(recipe.vae, sweep)
    latents = shards.latents_folder(sweep, recipe, encoder.identity)
    stage.say(f"latents  {latents} on {device} ({why})")
    if manifest.find(latents) is None:
        store = shards.store_of(sweep)
        make(
            sweep,
            latents,
            Setup(open_source(recipe.data, store, listing_words(stage.say)), encoder, recipe),
            device,
            on_ray,
        )
    shards.point_to(sweep, latents, encoder.identity)


Encode = Callable[[Folder, Folder, Setup, str, list[int]], None]
"""Makes the shards of these numbers."""


def make(sweep: Folder, latents: Folder, setup: Setup, device: str, encode: Encode) -> None:
    """Begins or goes on with a set and seals it."""
    _require_one_kind(latents, device, setup.source.listing.facts["sha256"])
    for name in shards.clear_strays(latents, setup.numbers):
        stage.say(f"{name} lies beyond the set: deleted")

    def attempt(_: stage.Lost | None) -> None:
        done = shards.finished(latents, setup.numbers, now_and_then(stage.say, CHECKING))
        encode(sweep, latents, setup, device, [n for n in setup.numbers if n not in done])

    stage.with_restarts(setup.recipe, "precompute", attempt, lambda: len(latents.list()))
    stage.leave_if_asked()
    found = shards.write_manifest(latents, setup.numbers, _facts(setup, device))
    stage.say(f"{found['count']} latents in {len(setup.numbers)} shards, {len(found['refused'])} images refused")


def on_ray(sweep: Folder, latents: Folder, setup: Setup, device: str, left: list[int]) -> None:
    """Makes the shards in workers on Ray, as many as the recipe says and there is room for."""
    recipe, images = setup.recipe, len(setup.source)
    room = int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 1))
    before = images - sum(len(setup.positions(n)) for n in left)
    dealer = ray.remote(num_cpus=0)(Dealer).remote(left)
    options = stage.resources("precompute", device, 1)
    workers = [stage.spawn(Encoder, options) for _ in range(min(recipe.precompute.workers, len(left), room))]
    results = [w.encode.remote(sweep, latents, recipe, device, _Ask(dealer)) for w in workers]
    stage.watch(workers, results, lambda done: stage.progress(min(before + sum(done), images), images, "images"))


class _Ask:
    """The dealer's next number, from afar."""

    def __init__(self, dealer: Any) -> None:
        self._dealer = dealer

    def __call__(self) -> int | None:
        return ray.get(self._dealer.next.remote())


def _require_one_kind(latents: Folder, device: str, listing: str) -> None:
    """One set is filled from one listing of images by one kind of hardware and PyTorch: else its bytes would differ."""
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
