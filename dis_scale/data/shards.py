"""Latent shards: tars of posterior moments in object storage, each with a sidecar, and one manifest last. The door to WebDataset.

Shard s holds the images of places [s S, (s + 1) S) of the mixed order (mixing.py). Its bytes are a function of (source, VAE,
resolution, shard size, encode batch, device kind, torch version), so any worker may write it, more than once.
Read next: latents.py.
"""

import hashlib
import io
import json
import math
import re
import tarfile
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from mmap import mmap
from typing import Any, NamedTuple

import numpy as np

from dis_scale.data.mixing import LabelCounts
from dis_scale.process.errors import StorageError, UserError
from dis_scale.process.settings import FORMAT
from dis_scale.process.threads import in_order
from dis_scale.recipe import Data, LatentShape, Precompute
from dis_scale.storage import npy
from dis_scale.storage.folder import Folder
from dis_scale.storage.manifest import Digest
from dis_scale.sweep import Sweep
from dis_scale.sweep.documents import ChannelSums, LatentsManifest, MadeFrom, ShardEntry, ShardSidecar

SHARD = re.compile(r"\d{6,}\.(tar|json)")
READS_AT_ONCE = 8
"""Shards or sidecars that one process reads at a time."""
_BLOCK, _KEY = 512, 12
"""Bytes of a tar's block, and of a key."""
_VARIES = np.r_[0:_KEY, 124:136, 148:156, _BLOCK : 2 * _BLOCK + _KEY, 2 * _BLOCK + 148 : 2 * _BLOCK + 156]
"""Bytes that differ between samples: key, size and checksum of the label, the label, key and checksum of the moments."""


@dataclass(frozen=True)
class Sample:
    """One image's posterior: `moments` is float16 (2, 2C, h, w), mean and log-variance of the image and of its horizontal flip.

    Without a posterior, `moments` are the latents, (2, C, h, w). Latents of another program may have no flip: (1, ...).
    """

    position: int
    name: str
    label: int
    moments: np.ndarray
    posterior: bool = True


class Shard(NamedTuple):
    """A shard in memory: `moments` float16 (n, 2 or 1, 2C or C, h, w), `labels` int64 (n)."""

    moments: np.ndarray
    labels: np.ndarray


class EncodedShard(NamedTuple):
    """A shard's number, its samples, and the names of the images that were skipped."""

    number: int
    samples: list[Sample]
    refused: list[str]


def shard_numbers(images: int, settings: Precompute) -> range:
    """Return the numbers of all shards of this many images."""
    return range(-(-images // settings.shard_images))


def shard_positions(number: int, images: int, settings: Precompute) -> range:
    """Return the positions of a shard's images in the order of its set."""
    size = settings.shard_images
    return range(number * size, min((number + 1) * size, images))


def latents_folder(sweep: Sweep, vae_identity: str) -> Folder:
    """Return the folder of this declared source's latents under this VAE: next to the sweeps, which share it."""
    recipe = sweep.recipe
    crop = {"crop": recipe.data.crop} if recipe.data.crop else {}
    key = [
        recipe.data.declared | crop, recipe.data.resolution, vae_identity,
        recipe.precompute.shard_images, recipe.precompute.encode_images, recipe.precompute.precision, FORMAT,
    ]  # fmt: skip
    return sweep.store / f"latents/{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"


def require_allowed(latents: Folder, data: Data) -> None:
    """UserError if images were left out of a complete set and the recipe says `undecodable: refuse`."""
    if data.undecodable == "refuse" and (refused := LatentsManifest.require(latents).refused):
        raise UserError(
            f"{latents}: {len(refused)} undecodable images were left out, the first is {refused[0]}: --set data.undecodable=skip, "
            "or repair them and change data.source.version and the sweep's name"
        )


def sample_bytes(shape: LatentShape, *, posterior: bool = True, sides: int = 2) -> int:
    """Return the bytes of a latent in a shard: two headers, the label, and the moments with numpy's header."""
    file = 128 + 2 * sides * (1 + posterior) * shape.channels * shape.size**2
    return 3 * _BLOCK + -(-file // _BLOCK) * _BLOCK


def shard_name(number: int) -> str:
    """Name of a shard's files, without a suffix."""
    return f"{number:06d}"


def pack(samples: list[Sample]) -> bytes:
    """Return the shard's tar, byte by byte as WebDataset's writer makes it; the same samples always give the same bytes."""
    pieces, size = list[bytes | memoryview](), 2 * _BLOCK  # the zeros at the tar's end
    for sample in samples:
        key = b"%012d" % sample.position
        label = json.dumps({"label": sample.label, "name": sample.name}).encode()
        assert sample.moments.dtype == np.float16, sample.moments.dtype
        head, moments = _npy_header(sample.moments.shape), np.ascontiguousarray(sample.moments).data
        file_bytes = len(head) + moments.nbytes
        pieces += [_header(key, ".json", len(label)), label, bytes(-len(label) % _BLOCK)]
        pieces += [_header(key, ".moments.npy", file_bytes), head, moments, bytes(-file_bytes % _BLOCK)]
        size += 2 * _BLOCK + len(label) + -len(label) % _BLOCK + file_bytes + -file_bytes % _BLOCK
    return b"".join([*pieces, bytes(2 * _BLOCK + -size % tarfile.RECORDSIZE)])


def _header(key: bytes, ending: str, size: int) -> bytes:
    """Return a member's header: a cached one of `tarfile` with this key, size and checksum. `tarfile` takes 40 us for each."""
    start, middle, end, total = _header_parts(ending)
    digits = b"%011o" % size
    return b"%b%b%b%b%06o%b" % (key, start, digits, middle, total + sum(key) + sum(digits), end)


@cache
def _header_parts(ending: str) -> tuple[bytes, bytes, bytes, int]:
    """Return the parts around key, size and checksum in the headers of files with this ending, and the sum of their bytes."""
    member = tarfile.TarInfo("0" * _KEY + ending)
    member.mode, member.uname, member.gname = 0o444, "dis-scale", "dis-scale"
    header = member.tobuf()
    start, middle, end = header[_KEY:124], header[135:148], header[154:]
    return start, middle, end, sum(start + middle + end[2:]) + 8 * ord(" ")  # the checksum's own bytes count as spaces


@cache
def _npy_header(shape: tuple[int, ...]) -> bytes:
    """Return the header of a float16 array's file."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(np.empty(shape, np.float16)))
    return file.getvalue()


def positions(data: bytes) -> list[int]:
    """Return the positions in the listing of the samples in a shard's tar, in its order."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [int(name.partition(".")[0]) for name in tar.getnames() if name.endswith(".json")]


def unpack(data: bytes | mmap, where: str) -> Shard:
    """Return the shard in a tar's bytes, as a read-only view of them if possible; StorageError if it is not a shard."""
    try:
        return _strided(data) or _parsed(data, where)
    except (KeyError, TypeError, ValueError, OSError, tarfile.TarError) as error:
        raise StorageError(f"{where}: not a latent shard: {error}") from error


def _strided(data: bytes | mmap) -> Shard | None:
    """Read a tar of `pack`: each sample is two headers and two files at equal distances, so all moments are one view.

    None if the tar has another layout: from another writer, or with a name too long for one block of a tar.
    """
    try:
        file = tarfile.TarInfo.frombuf(data[2 * _BLOCK : 3 * _BLOCK], "ascii", "strict")
        _, shape, _, start = npy.header(data[3 * _BLOCK : 4 * _BLOCK])
    except (tarfile.HeaderError, ValueError):
        return None
    if file.size != start + 2 * math.prod(shape) or data[3 * _BLOCK : 3 * _BLOCK + start] != _npy_header(shape):
        return None
    first, stride = 3 * _BLOCK + start, 3 * _BLOCK + -(-file.size // _BLOCK) * _BLOCK
    everything = np.frombuffer(data, np.uint8)
    slots = everything[: len(data) // stride * stride].reshape(-1, stride)
    parts = slots[: int(np.append(slots[:, 0], 0).argmin())]
    if everything[parts.size :].any() or not len(parts) or not _alike(parts[:, :first]):
        return None
    moments = parts[:, first : 3 * _BLOCK + file.size].view(np.float16).reshape(-1, *shape)
    labels = [json.loads(label.tobytes().rstrip(b"\0"))["label"] for label in parts[:, _BLOCK : 2 * _BLOCK]]
    return Shard(moments, _numbers(labels))


def _numbers(labels: list[Any]) -> np.ndarray:
    if not all(type(label) is int for label in labels):
        raise ValueError(f"a label is no number: {next(label for label in labels if type(label) is not int)!r}")
    return np.array(labels, dtype=np.int64)


def _alike(heads: np.ndarray) -> bool:
    """Return whether all samples have the first one's headers, except for `_VARIES`."""
    constant = np.delete(heads, _VARIES, axis=1)
    keys = heads[:, :_KEY], heads[:, 2 * _BLOCK : 2 * _BLOCK + _KEY]
    return bool((constant == constant[0]).all() and (keys[0] == keys[1]).all())


def _parsed(data: bytes | mmap, where: str) -> Shard:
    """Read any WebDataset tar with the same members."""
    import webdataset as wds

    files = wds.tariterators.tar_file_iterator(io.BytesIO(data))
    moments, labels = [], []
    for sample in wds.tariterators.group_by_keys(file | {"__url__": where} for file in files):
        moments.append(npy.read(sample["moments.npy"]))
        labels.append(json.loads(sample["json"])["label"])
    return Shard(np.stack(moments), _numbers(labels))


def put_shard(latents: Folder, number: int, samples: list[Sample], refused: list[str], *, sealed: bool = False) -> None:
    """Write a shard, then its sidecar: digest, count, images by label, and sums of the moments for the statistics.

    A shard that another encoder has finished with other bytes stays, since the set may be sealed with it. If `sealed`, the set is
    sealed with this one, which replaces it. If the other encoder finishes meanwhile, both files are written again, so that they
    match. A set that was sealed in between has the other's digest: `dis-scale data verify` finds it, `data repair` repairs it.
    """
    tar, name, data = f"{shard_name(number)}.tar", f"{shard_name(number)}.json", pack(samples)
    labels = {str(label): count for label, count in sorted(Counter(s.label for s in samples).items())}
    sidecar = ShardSidecar(
        **asdict(Digest.of(data)), count=len(samples), refused=tuple(refused), labels=labels, sums=_sums(samples)
    ).signed()
    theirs = None if sealed else ShardSidecar.find_intact(latents, name)
    if theirs and theirs != sidecar and latents.exists(tar) and latents.size(tar) == theirs.size_bytes:
        return
    latents.write(tar, data)
    if not sidecar.create(latents, name) and ShardSidecar.find_intact(latents, name) != sidecar:
        latents.write(tar, data)
        sidecar.write(latents, name)


def finished(latents: Folder, numbers: range) -> set[int]:
    """Return the numbers of the finished shards: those whose tar has the size in its sidecar.

    The tar is not read: it was written atomically before its sidecar, and `dis-scale data verify` compares hashes.
    """
    sizes = latents.sizes()
    candidates = [n for n in numbers if {f"{shard_name(n)}.tar", f"{shard_name(n)}.json"} <= sizes.keys()]
    sidecars = in_order(candidates, lambda n: ShardSidecar.find_intact(latents, f"{shard_name(n)}.json"), READS_AT_ONCE)
    return {n for n, each in zip(candidates, sidecars, strict=True) if each and each.size_bytes == sizes[f"{shard_name(n)}.tar"]}


def clear_strays(latents: Folder, numbers: range) -> list[str]:
    """Delete tars and sidecars with a number beyond the set, and files left by killed writers; return their names."""
    ours = {f"{shard_name(n)}.{kind}" for n in numbers for kind in ("tar", "json")}
    strays = [name for name in latents.list() if SHARD.fullmatch(name) and name not in ours] + latents.abandoned()
    for name in strays:
        latents.delete(name)
    return strays


def write_manifest(latents: Folder, numbers: range, made_from: MadeFrom) -> LatentsManifest:
    """Write the manifest over all sidecars, as the last file; StorageError if a shard's size is not its sidecar's.

    FileNotFoundError if a sidecar is missing, UserError if no image could be decoded.

    Another sweep's precompute that seals the set at the same time writes the same bytes, so the set has no lease of its own.
    """
    shards, sums, refused, labels, sizes = [], [], list[str](), LabelCounts(), latents.sizes()
    read = in_order(numbers, lambda n: ShardSidecar.read(latents, f"{shard_name(n)}.json"), READS_AT_ONCE)
    for n, sidecar in zip(numbers, read, strict=True):  # one at a time: up to 100,000 sidecars, each with 1,000 labels
        _require_size(latents, n, sidecar, sizes)
        shards.append(ShardEntry(name=f"{shard_name(n)}.tar", **sidecar.model_dump(include={"count", "size_bytes", "sha256"})))
        sums.append(sidecar.sums)
        refused += sidecar.refused
        labels.add(sidecar.labels)
    if not labels.total:
        raise UserError(f"{latents}: no image could be decoded; the first of {len(refused)}: {refused[:1]}")
    mean, std, variance = _statistics(sums)
    manifest = LatentsManifest(
        made_from=made_from, mixing=labels.distinct(), count=labels.total.total(), mean=mean, std=std, posterior_variance=variance,
        labels=dict(sorted(labels.total.items(), key=lambda each: int(each[0]))), refused=tuple(refused), shards=tuple(shards),
    )  # fmt: skip
    manifest.write(latents)
    return manifest


def _require_size(latents: Folder, number: int, sidecar: ShardSidecar, sizes: dict[str, int]) -> None:
    if (size := sizes.get(f"{shard_name(number)}.tar")) != sidecar.size_bytes:
        raise StorageError(
            f"{latents}/{shard_name(number)}.tar: {size or 0} bytes, its sidecar says {sidecar.size_bytes}: "
            "rerun the same command to rebuild it"
        )


def _sums(samples: list[Sample]) -> ChannelSums:
    """Return sums over the unflipped images by channel: count, mean and M2 of the posterior means, and the posteriors' variances.

    Count, mean and M2 of several shards merge without their images.
    """
    if not samples:
        return ChannelSums(count=0, mean=(), m2=(), variance=())
    channels = samples[0].moments.shape[1] // (1 + samples[0].posterior)
    values = np.stack([sample.moments[0, :channels] for sample in samples], dtype=np.float64)
    mean = values.mean((0, 2, 3), keepdims=True)
    values -= mean  # in place, as below: allocating memory takes longer than the sums
    values *= values
    count, m2 = values[:, 0].size, values.mean((0, 2, 3))
    variance = np.zeros(channels)
    if samples[0].posterior:
        np.stack([sample.moments[0, channels:] for sample in samples], out=values)
        variance = sum(np.exp(values, out=values).sum((2, 3)), variance)
    return ChannelSums(
        count=count, mean=mean.ravel().tolist(), m2=(m2 * count).tolist(), variance=variance.tolist()
    )  # fmt: skip


def _statistics(sums: list[ChannelSums]) -> tuple[list[float], list[float], list[float]]:
    """Return mean and deviation of the posterior means, and the mean variance of the posteriors, by channel, from the shards' sums.

    Merged in shard order (Chan, Golub and LeVeque 1983).
    """
    count, mean, m2 = 0, np.zeros(1), np.zeros(1)
    for s in (s for s in sums if s.count):
        delta, total = np.array(s.mean) - mean, count + s.count
        m2 = m2 + np.array(s.m2) + delta**2 * count * s.count / total
        mean, count = mean + delta * s.count / total, total
    std = np.sqrt(m2 / max(count, 1)).tolist()
    variances = np.sum([s.variance for s in sums if s.count], axis=0)
    return mean.tolist(), std, (variances / max(count, 1)).tolist()
