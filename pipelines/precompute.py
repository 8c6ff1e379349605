"""Precompute, a Ray job: workers encode images to posterior moments and write latent shards; the driver writes the manifest last.

Workers take shard numbers from one dealer, so a slow worker does not hold up the others. A shard's bytes do not depend on which
worker makes it: dis_scale/data/encode.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from dis_scale.data import mixing, shards, staging
from dis_scale.data.sources import Source, open_source
from dis_scale.data.staging import MixedOrder
from dis_scale.process.errors import UserError
from dis_scale.process.progress import listing_words
from dis_scale.recipe import Recipe
from dis_scale.storage.folder import Folder
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.documents import (
    Encoding,
    LatentsBegun,
    LatentsManifest,
    MadeFrom,
    ShardSidecar,
    Sidecar,
    StagedSidecar,
)
from pipelines import devices, lines, stage
from pipelines.devices import choose_device
from pipelines.restarts import with_restarts
from pipelines.sharing import Deal, capacity, share
from pipelines.worker import Worker, WorkerFailure, resources, spawn, watch

if TYPE_CHECKING:
    from dis_scale.vae import Vae


class Encoder(Worker):
    """Encodes shards by number with the sweep's VAE; progress counts images."""

    def __init__(self, sweep: Sweep, device: str) -> None:
        super().__init__()
        self.sweep, self.device = sweep, device
        self._vae: Vae | None = None

    def encoding(self) -> Encoding:
        """Return the VAE's identity and scale, the device and PyTorch's version. Needs no GPU."""
        from dis_scale.data.encode import encoding_of  # imported here because the driver does not need torch

        return encoding_of(self._loaded(), self.sweep.recipe.data.resolution, self.device)

    def encode(self, latents: Folder, encoding: Encoding, deal: Deal) -> None:
        """Write the shards that `deal` names. UserError if this worker would encode differently from `encoding`."""
        from dis_scale.data.encode import Setup, compute_exactly, put_shards, require_same_hardware

        compute_exactly(tf32=self.sweep.recipe.precompute.precision == "tf32")
        if (ours := self.encoding()) != encoding:
            raise UserError(
                f"{latents}: this worker encodes with {ours}, the first one with {encoding}: use equal nodes"
            )
        require_same_hardware(latents, self.device)
        self.report(0)
        vae = self._loaded()
        vae.net.to(devices.torch_device(self.device))
        recipe = self.sweep.recipe
        setup = Setup(open_source(recipe.data, self.sweep.store), vae, recipe)
        self.emit("work")
        put_shards(setup, latents, iter(deal, None), self._count)

    def mix(self, latents: Folder, encoding: Encoding, deal: Deal) -> None:
        """Write the shards of the groups that `deal` names, from the parts that all encoders made."""
        source, recipe = open_source(self.sweep.recipe.data, self.sweep.store), self.sweep.recipe
        mixer = MixedOrder.of(source, recipe.precompute, encoding)
        self.report(0)
        for group in iter(deal, None):
            for shard in staging.mixed_shards(latents, source, mixer, group, self._raise_if_stopped):
                shards.put_shard(latents, *shard)
                self._count(len(shard.samples) + len(shard.refused))

    def _loaded(self) -> "Vae":
        from dis_scale import vae

        self._vae = self._vae or vae.load(self.sweep)
        return self._vae

    def _count(self, images: int) -> None:
        self.report(self._done + images)
        self._raise_if_stopped()

    def _raise_if_stopped(self) -> None:
        self.raise_if_stopped("a rerun repeats the unfinished shard")


@dataclass
class RayEncoders:
    """Encoders on Ray: as many as the recipe names, the cluster can hold and there are shards for."""

    sweep: Sweep
    device: str
    _workers: list[Any] = field(default_factory=list)
    """Encoders that have ended their work, for the next."""

    def encoding(self) -> Encoding:
        """Return what the encoders encode with, from one of them that needs no GPU."""
        worker = spawn(Encoder, resources("precompute", "cpu", 1), self.sweep, self.device)
        (encoding,) = watch([worker], [worker.encoding.remote()], lambda _: None, keep_logs=False)
        if self.device == "cpu":
            self._workers = [worker]
        return encoding

    def encode(self, latents: Folder, encoding: Encoding, source: Source, left: list[int]) -> None:
        """Encode the shards of these numbers, or parts to be mixed."""
        settings = self.sweep.recipe.precompute
        images = sum(len(shards.shard_positions(n, len(source), settings)) for n in left)
        self._share("encode", latents, encoding, left, images, len(source), "images")

    def mix(self, latents: Folder, encoding: Encoding, source: Source, left: list[int]) -> None:
        """Write the shards of these groups from the encoded parts."""
        mixer = MixedOrder.of(source, self.sweep.recipe.precompute, encoding)
        images = sum(len(mixer.group(n)) for n in left)
        self._share("mix", latents, encoding, left, images, len(source), "images mixed")

    def _share(
        self, work: str, latents: Folder, encoding: Encoding, left: list[int], images: int, total: int, unit: str
    ) -> None:
        """Let the encoders share this work on the numbers in `left`, which have this many of all images."""
        request = resources("precompute", self.device, 1)
        count = min(self.sweep.recipe.precompute.workers, len(left), capacity(request))
        workers, self._workers = self._workers[:count], []
        workers += [spawn(Encoder, request, self.sweep, self.device) for _ in range(count - len(workers))]
        self._workers, _, failure = share(
            workers, work, (latents, encoding), left,
            lambda done: lines.progress(min(total - images + sum(done), total), total, unit),
        )  # fmt: skip
        if failure:
            raise failure


def precompute_latents(sweep: Sweep, _: list[str]) -> None:
    """Make the shards that are missing and write the manifest last."""
    stage.connect()
    device, why = choose_device(sweep.recipe)
    lines.say(f"encoding on {device} ({why})")
    find_or_make_latents(sweep, RayEncoders(sweep, device))


def find_or_make_latents(sweep: Sweep, encoders: Any) -> None:
    """Find or make the sweep's latents and record them in the sweep. `encoders` has the methods of `RayEncoders`."""
    encoding = with_restarts(sweep.recipe, "precompute", lambda _: encoders.encoding(), lambda: 0)
    latents = shards.latents_folder(sweep, encoding.identity)
    lines.say(f"latents  {latents}")
    if LatentsManifest.find(latents) is None:
        source = open_source(sweep.recipe.data, sweep.store, listing_words(lines.say))

        encode, mix = (partial(work, latents, encoding, source) for work in (encoders.encode, encoders.mix))
        make_latents(sweep.recipe, latents, source, encoding, encode, mix)
    staging.delete_parts(latents)
    shards.require_allowed(latents, sweep.recipe.data)
    state.use_latents(sweep, latents, encoding.identity)


Make = Callable[[list[int]], None]
"""Makes the shards, parts or groups of these numbers."""


def make_latents(recipe: Recipe, latents: Folder, source: Source, encoding: Encoding, encode: Make, mix: Make) -> None:
    """Begin or continue a set of latents and seal it. `mix` is used if the source is not in the mixed order."""
    _require_one_kind(latents, encoding, source)
    numbers, staged = shards.shard_numbers(len(source), recipe.precompute), latents / staging.STAGED
    mixer = MixedOrder.of(source, recipe.precompute, encoding)
    for name in shards.clear_strays(latents, numbers):
        lines.say(f"{name} is not part of the set: deleted")

    def unfinished(folder: Folder, kind: type[Sidecar]) -> list[int]:
        done = shards.finished(folder, numbers, kind)
        return [number for number in numbers if number not in done]

    def require_finished(folder: Folder, kind: type[Sidecar]) -> None:
        stage.raise_if_stopped()
        if left := unfinished(folder, kind):
            raise WorkerFailure(f"{folder}: {len(left)} of {len(numbers)} shards are missing: their encoder was lost")

    def attempt(_: WorkerFailure | None) -> None:
        if not (left := unfinished(latents, ShardSidecar)):
            return
        if source.mixed:
            encode(left)
        else:
            if parts := unfinished(staged, StagedSidecar):
                encode(parts)
                require_finished(staged, StagedSidecar)
            mix(mixer.groups_of(left))
        require_finished(latents, ShardSidecar)

    with_restarts(recipe, "precompute", attempt, lambda: len(latents.list()) + len(staged.list()))
    stage.raise_if_stopped()
    sealed = shards.write_manifest(latents, numbers, _made_from(recipe, source, encoding))
    lines.say(f"{sealed.count} latents in {len(numbers)} shards, {len(sealed.refused)} images refused")
    lines.say(f"mixing   {mixing.words(sealed.mixing)}")


def _require_one_kind(latents: Folder, encoding: Encoding, source: Source) -> None:
    """UserError if the set was begun with another listing, mixed order, kind of device or PyTorch: its bytes would differ."""
    sha256 = source.listing.manifest.sha256
    ours = LatentsBegun(device=encoding.device, torch=encoding.torch, listing=sha256, order=source.order)
    ours.create(latents)
    theirs = dict(LatentsBegun.read(latents))
    if different := [f"{key} {theirs[key]!r}, now {value!r}" for key, value in ours if theirs[key] != value]:
        raise UserError(
            f"{latents}: begun with {'; '.join(different)}: finish it as it was begun, or delete it, or use another root"
        )


def _made_from(recipe: Recipe, source: Source, encoding: Encoding) -> MadeFrom:
    settings = recipe.precompute
    return MadeFrom(
        source=recipe.data.source.model_dump(mode="json"), listing=source.listing.manifest.sha256, order=source.order,
        images=len(source), resolution=recipe.data.resolution, encoding=encoding, num_classes=recipe.data.num_classes,
        label_names=source.label_names, shard_images=settings.shard_images, encode_images=settings.encode_images,
        precision=settings.precision,
    )  # fmt: skip
