"""Precompute, a Ray job: workers encode images to posterior moments and write latent shards; the driver writes the manifest last.

Workers take shard numbers from one dealer, so a slow worker does not hold up the others. A shard's bytes do not depend on which
worker makes it: dis_scale/data/encode.py.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray

from dis_scale.data import shards
from dis_scale.data.shards import Encoding
from dis_scale.data.sources import Source, open_source
from dis_scale.errors import UserError
from dis_scale.progress import listing_words, now_and_then
from dis_scale.recipe import Recipe
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder
from dis_scale.sweep import Sweep, state
from pipelines import lines, stage
from pipelines.restarts import with_restarts
from pipelines.worker import Worker, WorkerFailure, choose_device, resources, spawn, watch

if TYPE_CHECKING:
    from dis_scale.vae import Vae

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
    """Encodes shards by number with the sweep's VAE; progress counts images."""

    def __init__(self, sweep: Sweep, device: str) -> None:
        super().__init__()
        self.sweep, self.device = sweep, device
        self._loading = threading.Lock()
        self._vae: Vae | None = None

    def encoding(self) -> Encoding:
        """Load the VAE; return what this worker encodes with."""
        from dis_scale.data.encode import encoding_of  # imports torch, here and below: the driver needs none of it

        return encoding_of(self._loaded(), self.sweep.recipe.data.resolution, self.device)

    def encode(self, latents: Folder, deal: Callable[[], int | None]) -> None:
        from dis_scale.data.encode import Setup, compute_exactly, put_shards, require_same_hardware

        compute_exactly()
        require_same_hardware(latents, self.device)
        recipe = self.sweep.recipe
        setup = Setup(open_source(recipe.data, self.sweep.store), self._loaded(), recipe)
        self.emit("work")
        put_shards(setup, latents, iter(deal, None), self._count)

    def _loaded(self) -> "Vae":
        from dis_scale import vae

        with self._loading:  # `encoding` may still be loading it
            if self._vae is None:
                self._vae = vae.load(self.sweep)
                self._vae.net.to(self.device)
            return self._vae

    def _count(self, images: int) -> None:
        self.report(self._done + images)
        self.raise_if_stopped("a rerun repeats the unfinished shard")


@dataclass
class RayEncoders:
    """Encoders on Ray: as many as the recipe names and the cluster can hold."""

    sweep: Sweep
    device: str
    _warm: list[Any] = field(default_factory=list)
    """Encoders that have their VAE and no shards yet."""

    def encoding(self) -> Encoding:
        """Start the encoders; return what they encode with."""
        workers = self._spawn()
        first, *_ = [worker.encoding.remote() for worker in workers]
        (encoding,) = watch(workers, [first], lambda _: None)
        self._warm = workers
        return encoding

    def encode(self, latents: Folder, source: Source, left: list[int]) -> None:
        """Make the shards of these numbers, with new encoders after a failure."""
        images = len(source)
        positions = (shards.shard_positions(n, images, self.sweep.recipe.precompute) for n in left)
        before = images - sum(map(len, positions))
        dealer = ray.remote(num_cpus=0)(Dealer).remote(left)
        workers, self._warm = self._warm or self._spawn(), []
        results = [worker.encode.remote(latents, _RemoteDealer(dealer)) for worker in workers]
        watch(workers, results, lambda done: lines.progress(min(before + sum(done), images), images, "images"))

    def _spawn(self) -> list[Any]:
        capacity = int(ray.cluster_resources().get("GPU" if self.device == "cuda" else "CPU", 1))
        options = resources("precompute", self.device, 1)
        count = max(1, min(self.sweep.recipe.precompute.workers, capacity))
        return [spawn(Encoder, options, self.sweep, self.device) for _ in range(count)]


def precompute(sweep: Sweep, _: list[str]) -> None:
    """Make the shards that are missing and write the manifest last."""
    stage.connect()
    device, _reason = choose_device(sweep.recipe)
    use_latents(sweep, RayEncoders(sweep, device))


def use_latents(sweep: Sweep, encoders: Any) -> None:
    """Find or make the latents of the sweep's images, and record that it uses them. `encoders` is as `RayEncoders`."""
    encoding = with_restarts(sweep.recipe, "precompute", lambda _: encoders.encoding(), lambda: 0)
    latents = shards.latents_folder(sweep, encoding.vae)
    lines.say(f"latents  {latents} on {encoding.device}")
    if manifest.find(latents) is None:
        source = open_source(sweep.recipe.data, sweep.store, listing_words(lines.say))
        make_latents(sweep.recipe, latents, source, encoding, lambda left: encoders.encode(latents, source, left))
    state.use_latents(sweep, latents, encoding.vae)


Encode = Callable[[list[int]], None]
"""Makes the shards of these numbers."""


def make_latents(recipe: Recipe, latents: Folder, source: Source, encoding: Encoding, encode: Encode) -> None:
    """Begin or continue a set of latents and seal it."""
    _require_one_kind(latents, encoding, source.listing.facts["sha256"])
    numbers = shards.shard_numbers(len(source), recipe.precompute)
    for name in shards.clear_strays(latents, numbers):
        lines.say(f"{name} is not part of the set: deleted")

    def attempt(_: WorkerFailure | None) -> None:
        done = shards.finished(latents, numbers, now_and_then(lines.say, CHECKING))
        encode([n for n in numbers if n not in done])

    with_restarts(recipe, "precompute", attempt, lambda: len(latents.list()))
    stage.raise_if_stopped()
    sealed = shards.write_manifest(latents, numbers, _facts(recipe, source, encoding))
    lines.say(f"{sealed['count']} latents in {len(numbers)} shards, {len(sealed['refused'])} images refused")


class _RemoteDealer:
    """A remote call for the dealer's next number; picklable."""

    def __init__(self, dealer: Any) -> None:
        self._dealer = dealer

    def __call__(self) -> int | None:
        return ray.get(self._dealer.next.remote())


def _require_one_kind(latents: Folder, encoding: Encoding, listing: str) -> None:
    """A set is made from one listing of images by one kind of hardware and PyTorch: otherwise its bytes would differ."""
    ours = {"format": manifest.FORMAT, "device": encoding.device, "torch": encoding.torch, "listing": listing}
    latents.create(BEGUN, json.dumps(ours).encode())
    theirs = latents.read_json(BEGUN)
    if different := [f"{key} {theirs.get(key)!r}, now {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]:
        raise UserError(
            f"{latents}: begun with {'; '.join(different)}: finish it as it was begun, or delete it, or use another root"
        )


def _facts(recipe: Recipe, source: Source, encoding: Encoding) -> dict[str, Any]:
    return {
        "source": recipe.data.source.model_dump(mode="json"), "listing": source.listing.facts["sha256"],
        "resolution": recipe.data.resolution, "images": len(source),
        "vae": encoding.vae, "scale": encoding.scale, "shift": encoding.shift,
        "latent": list(encoding.latent), "num_classes": recipe.data.num_classes,
        "label_names": source.label_names, "shard_images": recipe.precompute.shard_images,
        "encode_images": recipe.precompute.encode_images, "device": encoding.device, "torch": encoding.torch,
    }  # fmt: skip
