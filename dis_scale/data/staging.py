"""Mixing after encoding, for sources whose neighbours are read together: tars by byte ranges, Parquet by row groups.

They are encoded in the source's order into parts: part n has the latents of the entries [n S, (n + 1) S), sorted by their place in
the mixed order, in one run for each group of shards. A group is as many shards as `GROUP_BYTES` hold: one worker reads its run from
each part into memory and writes its shards. So a latent is written twice and read once; the parts are deleted at the end.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dis_scale.data import mixing
from dis_scale.data.shards import (
    READS_AT_ONCE,
    EncodedShard,
    Sample,
    shard_name,
    shard_numbers,
    shard_positions,
)
from dis_scale.data.sources import Source
from dis_scale.process.errors import Damaged, StorageAway, StorageError
from dis_scale.process.threads import in_order
from dis_scale.recipe import LatentShape, Precompute
from dis_scale.storage.folder import Folder
from dis_scale.storage.manifest import Digest
from dis_scale.sweep.documents import Encoding, StagedSidecar

STAGED = "staged"
"""Folder of the parts, below that of the set."""
GROUP_BYTES = 2 * 2**30


@dataclass(frozen=True)
class MixedOrder:
    """The places of `images` entries in the mixed order, by part and by group of shards."""

    images: int
    settings: Precompute
    latent: LatentShape
    posterior: bool = True

    @classmethod
    def of(cls, source: Source, settings: Precompute, encoding: Encoding) -> "MixedOrder":
        return cls(len(source), settings, encoding.latent, encoding.posterior)

    @cached_property
    def order(self) -> np.ndarray:
        """Entry at each place."""
        return mixing.permutation(self.images)

    @cached_property
    def places(self) -> np.ndarray:
        """Place of each entry."""
        return np.argsort(self.order)

    @property
    def moments_shape(self) -> tuple[int, ...]:
        channels, size = self.latent
        return (2, (1 + self.posterior) * channels, size, size)

    @property
    def group_images(self) -> int:
        shard_bytes = 2 * int(np.prod(self.moments_shape)) * self.settings.shard_images
        return max(1, GROUP_BYTES // shard_bytes) * self.settings.shard_images

    @property
    def groups(self) -> range:
        return range(-(-self.images // self.group_images))

    def group(self, number: int) -> range:
        """Return the places of a group."""
        return range(number * self.group_images, min((number + 1) * self.group_images, self.images))

    def groups_of(self, shards: list[int]) -> list[int]:
        """Return the groups of these shards, rising."""
        return sorted({shard * self.settings.shard_images // self.group_images for shard in shards})

    def runs(self, part: int) -> list[np.ndarray]:
        """Return the entries of a part by group, each run by place."""
        entries = np.array(shard_positions(part, self.images, self.settings))
        places = self.places[entries]
        ends = np.searchsorted(np.sort(places), [self.group(number).stop for number in self.groups])
        return np.split(entries[np.argsort(places)], ends[:-1])


class _Run(NamedTuple):
    """Entries of a run, those of them that were refused, and the moments of the others."""

    entries: np.ndarray
    refused: np.ndarray
    moments: np.ndarray


def put_part(latents: Folder, mixer: MixedOrder, part: EncodedShard) -> None:
    """Write a part, then its sidecar: size and hash of each run, and the refused entries."""
    moments = {sample.position: sample.moments for sample in part.samples}
    by_group = mixer.runs(part.number)
    runs = [b"".join(moments[entry].tobytes() for entry in run.tolist() if entry in moments) for run in by_group]
    refused = [n for n in shard_positions(part.number, mixer.images, mixer.settings) if n not in moments]
    name, data = shard_name(part.number), b"".join(runs)
    staged = latents / STAGED
    try:
        staged.write(f"{name}.{StagedSidecar.ENDING}", data)
    except FileNotFoundError as error:
        raise StorageAway(f"{staged}/{name}.{StagedSidecar.ENDING}: another process has finished the set") from error
    sidecar = StagedSidecar(
        size_bytes=len(data),
        orders=tuple(mixing.order_hash(run) for run in by_group),
        runs=tuple(Digest.of(run) for run in runs),
        refused=tuple(refused),
    )
    sidecar.write_signed(staged, f"{name}.json")


def delete_parts(latents: Folder) -> None:
    """Delete the parts of a finished set. Another process may still write some, or delete them too: a rerun deletes the rest."""
    with contextlib.suppress(StorageError, StorageAway):
        (latents / STAGED).delete()


def mixed_shards(
    latents: Folder, source: Source, mixer: MixedOrder, group: int, each_run: Callable[[], None] = lambda: None
) -> Iterator[EncodedShard]:
    """Yield the shards of a group from the runs of all parts; `each_run` is called after each and may raise.

    StorageAway if parts are gone or damaged: they are made again.
    """
    inside, shard_images = mixer.group(group), mixer.settings.shard_images
    samples: list[Sample | str] = [""] * len(inside)  # at each place a sample, or the name of a refused image
    parts = shard_numbers(mixer.images, mixer.settings)
    moments = np.empty((len(inside), *mixer.moments_shape), np.float16)
    damaged = list[str]()
    for run in in_order(parts, lambda part: _read(latents / STAGED, mixer, part, group), READS_AT_ONCE):
        each_run()
        if isinstance(run, str):
            damaged.append(run)
            continue
        kept = ~np.isin(run.entries, run.refused)
        moments[mixer.places[run.entries[kept]] - inside.start] = run.moments
        for number, good in zip(run.entries.tolist(), kept.tolist(), strict=True):
            entry, place = source.listing[number], mixer.places[number] - inside.start
            samples[place] = (
                Sample(number, entry.name, int(entry.label), moments[place], mixer.posterior) if good else entry.name
            )
    if damaged:
        raise StorageAway(
            f"{latents / STAGED}: {len(damaged)} of {len(parts)} parts are damaged, the first is {damaged[0]}: one of its runs, or "
            "its sidecar, has another hash than the sidecar says"
        )
    for number in range(inside.start // shard_images, -(-inside.stop // shard_images)):
        each = samples[number * shard_images - inside.start :][:shard_images]
        yield EncodedShard(number, [s for s in each if isinstance(s, Sample)], [s for s in each if isinstance(s, str)])


def _read(staged: Folder, mixer: MixedOrder, part: int, group: int) -> _Run | str:
    """Return one run of a part; the part's file if it is damaged, whose sidecar is then deleted: the next attempt encodes it."""
    name = shard_name(part)
    try:
        sidecar = StagedSidecar.read_signed(staged, f"{name}.json")
        start, expected = sum(run.size_bytes for run in sidecar.runs[:group]), sidecar.runs[group]
        data = (
            staged.read(f"{name}.{StagedSidecar.ENDING}", start, start + expected.size_bytes)
            if expected.size_bytes
            else b""
        )
    except FileNotFoundError as error:
        raise StorageAway(f"{staged}/{name}: gone: another process has finished the set, or deleted it") from error
    except Damaged:
        staged.delete(f"{name}.json")
        return f"{name}.{StagedSidecar.ENDING}"
    entries = mixer.runs(part)[group]
    if (Digest.of(data), mixing.order_hash(entries)) != (expected, sidecar.orders[group]):
        staged.delete(f"{name}.json")
        return f"{name}.{StagedSidecar.ENDING}"
    return _Run(
        entries,
        np.array(sidecar.refused, np.int64),
        np.frombuffer(data, np.float16).reshape(-1, *mixer.moments_shape),
    )
