"""Mixing after encoding, for sources whose neighbours are read together: tars by byte ranges, Parquet by row groups.

Their images are encoded in the source's order into parts of several shards. A part has a run for each group of destination shards:
its entries of that group, sorted by their place in the mixed order. A worker reads its group's run from each part into memory and
writes the shards of the group. So a latent is written twice and read once; the parts are deleted at the end.

Parts and groups hold as many shards as memory allows, because mixing takes (parts x groups) reads. A run has its own sha256, and
the names and labels of its entries: reading these from the listing would take (parts of the listing x groups) more reads.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from dis_scale.data import mixing
from dis_scale.data.shards import EncodedShard, Sample, put_shard, shard_name, shard_numbers, shard_positions
from dis_scale.process.errors import Damaged, StorageAway, StorageError
from dis_scale.process.threads import in_order
from dis_scale.recipe import LatentShape, Precompute
from dis_scale.storage.folder import Folder
from dis_scale.sweep.documents import Encoding

STAGED = "staged"
"""Folder of the parts, below that of the set."""
GROUP_BYTES = 2 * 2**30
"""Most bytes of latents in a group of shards, unless one shard has more. A worker that mixes holds a group in memory."""
PART_BYTES = 2**30
"""Most bytes of latents in a part, unless one shard has more. An encoder holds up to three: two parts, and one as packed bytes."""
PARTS_TO_ROOT = 8
"""A part has sqrt(shards) / 8 shards, rounded up: for ImageNet five, so that 64 encoders have four parts each."""
READS_AT_ONCE, WRITES_AT_ONCE = 16, 4
"""Runs and shards that a worker reads and writes at a time; fewer if these would have more than 1/16 of a group's bytes."""
SHARD_COPIES = 3
"""Copies of a shard that is written: packed, written, and in float64 for the sums. A shard of large latents may have 0.8 GB."""
OTHER_BYTES = 3 * 2**29
"""Memory of a worker that mixes, besides its group: the process, indexes, and the runs and shards in progress."""
_DIGEST, _LENGTH = 32, 8
"""Bytes of a sha256, and of the length of a run's facts."""
_Fact = tuple[int, str, int | None]
"""An entry, its name and its label; no label if it was refused."""


@dataclass(frozen=True)
class MixedOrder:
    """The places of `images` entries in the mixed order, by part and by group of shards."""

    images: int
    settings: Precompute
    latent: LatentShape
    posterior: bool = True
    sides: int = 2

    @classmethod
    def of(cls, images: int, settings: Precompute, encoding: Encoding) -> "MixedOrder":
        return cls(images, settings, encoding.latent, encoding.posterior, encoding.sides)

    @cached_property
    def order(self) -> np.ndarray:
        """Entry at each place, uint32."""
        return mixing.permutation(self.images).astype(np.uint32)

    @cached_property
    def places(self) -> np.ndarray:
        """Place of each entry, uint32."""
        places = np.empty_like(self.order)
        places[self.order] = np.arange(self.images, dtype=np.uint32)
        return places

    @property
    def moments_shape(self) -> tuple[int, ...]:
        channels, size = self.latent
        return (self.sides, (1 + self.posterior) * channels, size, size)

    @cached_property
    def shard_bytes(self) -> int:
        """Bytes of the latents of a full shard."""
        return 2 * int(np.prod(self.moments_shape)) * self.settings.shard_images

    @cached_property
    def group_images(self) -> int:
        return max(1, GROUP_BYTES // self.shard_bytes) * self.settings.shard_images

    @cached_property
    def part_shards(self) -> int:
        """Shards, in the source's order, that are encoded into a part."""
        wanted = np.ceil(np.sqrt(len(shard_numbers(self.images, self.settings))) / PARTS_TO_ROOT)
        return int(max(1, min(wanted, PART_BYTES // self.shard_bytes)))

    @property
    def part_images(self) -> int:
        return self.part_shards * self.settings.shard_images

    @property
    def groups(self) -> range:
        return range(-(-self.images // self.group_images))

    @property
    def parts(self) -> range:
        return range(-(-self.images // self.part_images))

    @property
    def memory_bytes(self) -> int:
        """Most memory of a worker that mixes."""
        group = min(self.images, self.group_images) * self.shard_bytes // self.settings.shard_images
        return group + SHARD_COPIES * self.shard_bytes + 12 * self.images + OTHER_BYTES

    def group(self, number: int) -> range:
        """Return the places of a group."""
        return range(number * self.group_images, min((number + 1) * self.group_images, self.images))

    def part(self, number: int) -> range:
        """Return the entries of a part."""
        return range(number * self.part_images, min((number + 1) * self.part_images, self.images))

    def groups_of(self, shards: list[int]) -> list[int]:
        """Return the groups of these shards, rising."""
        return sorted({shard * self.settings.shard_images // self.group_images for shard in shards})

    def shards_of(self, part: int) -> range:
        """Return the shards, in the source's order, that are encoded into a part."""
        return shard_numbers(self.images, self.settings)[part * self.part_shards :][: self.part_shards]

    def runs(self, part: int) -> list[np.ndarray]:
        """Return the runs of a part: for each group, the part's entries of that group, sorted by place."""
        entries = self.part(part)
        places = self.places[entries.start : entries.stop]
        by_place = np.argsort(places)
        ends = np.searchsorted(places[by_place], [self.group(number).stop for number in self.groups])
        return np.split(entries.start + by_place, ends[:-1])

    def places_by_part(self, group: int) -> list[np.ndarray]:
        """Return for each part the places of its run in a group, counted from the group's first place."""
        inside = self.group(group)
        parts = self.order[inside.start : inside.stop] // self.part_images
        ends = np.cumsum(np.bincount(parts, minlength=len(self.parts)))
        return np.split(np.argsort(parts, kind="stable"), ends[:-1])


def parts_left(latents: Folder, mixer: MixedOrder) -> list[int]:
    """Return the parts that are not stored."""
    stored = set(latents.list(STAGED))
    return [number for number in mixer.parts if _name(number) not in stored]


def put_part(latents: Folder, mixer: MixedOrder, number: int, shards: list[EncodedShard]) -> None:
    """Write a part: an index with the end of each run, uint64, then the runs. The index and each run begin with their sha256.

    A run has the length of its facts, uint64; the facts as JSON, (entry, name, label) of each entry; and the moments of the entries
    that have a label. Refused images have no label.
    """
    facts, moments = dict[int, _Fact](), dict[int, memoryview]()
    for shard in shards:
        moments |= {sample.position: np.ascontiguousarray(sample.moments).data for sample in shard.samples}
        skipped = (n for n in shard_positions(shard.number, mixer.images, mixer.settings) if n not in moments)
        facts |= {n: (n, name, None) for n, name in zip(skipped, shard.refused, strict=True)}
        facts |= {sample.position: (sample.position, sample.name, sample.label) for sample in shard.samples}
    ends, pieces = [_DIGEST + 8 * (len(mixer.groups) + 1)], list[bytes | memoryview]()
    for run in (entries.tolist() for entries in mixer.runs(number)):
        text = json.dumps([facts[n] for n in run]).encode()
        text += b" " * (-len(text) % _LENGTH)  # aligns the moments
        body: list[bytes | memoryview] = [len(text).to_bytes(_LENGTH, "little"), text]
        body += [moments[n] for n in run if n in moments]
        pieces += [_digest(*body), *body]
        ends.append(ends[-1] + _DIGEST + sum(memoryview(piece).nbytes for piece in body))
    index = np.array(ends, "<u8").tobytes()
    data = b"".join([_digest(index), index, *pieces])
    staged = latents / STAGED
    try:
        staged.write(_name(number), data)
    except FileNotFoundError as error:
        raise StorageAway(f"{staged}/{_name(number)}: another process has finished the set") from error


def delete_parts(latents: Folder) -> None:
    """Delete the parts of a finished set; another process may do so as well. StorageAway is raised: no later stage deletes them."""
    with contextlib.suppress(StorageError):
        (latents / STAGED).delete()


@dataclass(frozen=True)
class Mixing:
    """Mixing by one worker, which keeps the memory of a group and the indexes of parts from one group to the next.

    `report` gets the number of images read, and then of images written, since its last call, and may raise.
    """

    latents: Folder
    mixer: MixedOrder
    report: Callable[[int], None]
    _ends: dict[int, np.ndarray] = field(default_factory=dict)
    """Ends of the runs of each part, in bytes."""

    def mix(self, group: int) -> None:
        """Write the shards of a group from the runs of all parts.

        StorageAway if parts are gone or damaged. The damaged ones are deleted: the next attempt encodes them.
        """
        inside, size = self.mixer.group(group), self.mixer.settings.shard_images
        samples: list[Sample | str] = [""] * len(inside)  # at each place a sample, or the name of a refused image
        places = self.mixer.places_by_part(group)

        def read(part: int) -> str | None:
            """Put a run at its places; return the part's file if it is gone or damaged."""
            here = places[part]
            run = self._read_run(part, group, self.mixer.order[inside.start + here].tolist())
            if run is None:
                return _name(part)
            facts, moments = run
            self._moments[here[[label is not None for *_, label in facts]]] = moments
            for place, (entry, name, label) in zip(here.tolist(), facts, strict=True):
                if label is None:
                    samples[place] = name
                else:
                    samples[place] = Sample(entry, name, label, self._moments[place], self.mixer.posterior)
            return None

        def write(shard: int) -> int:
            places = samples[shard * size - inside.start :][:size]
            refused = [each for each in places if isinstance(each, str)]
            put_shard(self.latents, shard, [each for each in places if isinstance(each, Sample)], refused)
            return len(places)

        lost, parts = list[str](), self.mixer.parts
        run_bytes = -(-self._moments.nbytes // len(parts))
        for part, name in zip(parts, in_order(parts, read, _threads(READS_AT_ONCE, run_bytes)), strict=True):
            self.report(len(places[part]))
            lost += [name] if name else []
        if lost:
            raise StorageAway(
                f"{self.latents / STAGED}: {len(lost)} of {len(places)} parts are gone or damaged, the first is {lost[0]}: "
                "they are encoded again unless another process has finished the set"
            )
        shards = range(inside.start // size, -(-inside.stop // size))
        for images in in_order(shards, write, _threads(WRITES_AT_ONCE, self.mixer.shard_bytes)):
            self.report(images)

    @cached_property
    def _moments(self) -> np.ndarray:
        """Buffer for the latents of a group. It is reused: allocating memory takes longer than copying the latents."""
        return np.empty((min(self.mixer.images, self.mixer.group_images), *self.mixer.moments_shape), np.float16)

    def _read_run(self, part: int, group: int, entries: list[int]) -> tuple[list[_Fact], np.ndarray] | None:
        """Return a run: the facts of its entries, and the moments of those with a label.

        None if its part is gone. Deletes the part and returns None if it is damaged or of another order, such as another NumPy's.
        """
        staged, name = self.latents / STAGED, _name(part)
        where = f"{staged}/{name}"
        try:
            if part not in self._ends:
                index = _verified(staged.read(name, 0, _DIGEST + 8 * (len(self.mixer.groups) + 1)), where)
                self._ends[part] = np.frombuffer(index, "<u8")
            run = _verified(staged.read(name, *self._ends[part][group : group + 2].tolist()), where)
            first = _LENGTH + int.from_bytes(run[:_LENGTH], "little")
            facts = json.loads(bytes(run[_LENGTH:first]))
            if [entry for entry, *_ in facts] != entries:
                raise Damaged(where, "it has other entries")
        except FileNotFoundError:
            return None
        except Damaged:
            staged.delete(name)
            return None
        return facts, np.frombuffer(run[first:], np.float16).reshape(-1, *self.mixer.moments_shape)


def _name(part: int) -> str:
    return f"{shard_name(part)}.bin"


def _verified(data: bytes, where: str) -> memoryview:
    """Return the bytes after the sha256 at the beginning of `data`; Damaged, naming `where`, if they have another sha256."""
    body = memoryview(data)[_DIGEST:]
    if _digest(body) != data[:_DIGEST]:
        raise Damaged(where, "its sha256 differs from the one at its beginning")
    return body


def _digest(*pieces: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def _threads(most: int, each_bytes: int) -> int:
    return max(1, min(most, GROUP_BYTES // 16 // each_bytes))
