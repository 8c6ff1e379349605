"""A set of latents from its begin to its manifest. The caller passes the functions that encode and mix the shards.

A set may be continued by any later run, and by several runs at the same time. The manifest is written last. Read next: encode.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dis_scale.data import mixing, shards, staging
from dis_scale.data.sources import Source
from dis_scale.data.staging import MixedOrder
from dis_scale.process.errors import DisScaleError, UserError, counted
from dis_scale.recipe import Recipe
from dis_scale.storage.folder import Folder
from dis_scale.sweep.documents import Encoding, LatentsBegun, LatentsManifest, MadeFrom

Make = Callable[[list[int]], None]
"""Makes the shards, parts or groups of these numbers."""
Retry = Callable[[Callable[[], None], Callable[[], int]], None]
"""Runs an attempt until it succeeds; the second function returns how much is stored."""


class MissingShards(DisScaleError):
    """Shards or parts are missing after the function that makes them has ended."""


@dataclass(frozen=True)
class LatentSet:
    """A set of latents in the making; `mix` is used if the source is not in the mixed order."""

    recipe: Recipe
    folder: Folder
    source: Source
    encoding: Encoding
    encode: Make
    mix: Make
    say: Callable[[str], None]
    raise_if_stopped: Callable[[], None]
    require_held: Callable[[], None]
    """Raises Held if another process makes this sweep's latents now."""

    def make(self, retry: Retry) -> None:
        """Begin or continue the set, and seal it."""
        require_one_kind(self.folder, self.encoding, self.source)
        for name in shards.clear_strays(self.folder, self._numbers):
            self.say(f"{name} is not part of the set: deleted")
        retry(self._attempt, lambda: len(self.folder.list()) + len(self.folder.list(staging.STAGED)))
        self.raise_if_stopped()
        self.require_held()
        made_from = _made_from(self.recipe, self.source, self.encoding)
        sealed: LatentsManifest = shards.write_manifest(self.folder, self._numbers, made_from)
        self.say(
            f"{counted(sealed.count, 'latent')} in {counted(len(self._numbers), 'shard')}, refused images: {len(sealed.refused)}"
        )
        self.say(f"mixing   {mixing.words(sealed.mixing)}")

    def _attempt(self) -> None:
        """Make the missing shards; MissingShards if some are missing at its end."""
        missing = self._missing()
        if not missing:
            return
        if self.source.mixed:
            self.encode(missing)
        else:
            mixer = MixedOrder.of(len(self.source), self.recipe.precompute, self.encoding)
            if parts := staging.parts_left(self.folder, mixer):
                self.encode(parts)
                self._require_made(staging.parts_left(self.folder, mixer), "parts")
            self.mix(mixer.groups_of(missing))
        self._require_made(self._missing(), "shards")

    @property
    def _numbers(self) -> range:
        return shards.shard_numbers(len(self.source), self.recipe.precompute)

    def _missing(self) -> list[int]:
        done = shards.finished(self.folder, self._numbers)
        return [number for number in self._numbers if number not in done]

    def _require_made(self, missing: list[int], what: str) -> None:
        self.raise_if_stopped()
        if missing:
            raise MissingShards(f"{self.folder}: {len(missing)} {what} are missing: their encoder was lost")


def require_one_kind(latents: Folder, encoding: Encoding, source: Source) -> None:
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
