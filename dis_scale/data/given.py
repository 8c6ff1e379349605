"""Latents of other programs: a check that they are unscaled latents of the sweep's autoencoder; and export in their layouts.

The layouts themselves are in layouts.py.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter

from dis_scale.data import layouts, listing, mixing, shards
from dis_scale.data.sources import Source, lists_mixed, select_decodable
from dis_scale.process.errors import UserError
from dis_scale.process.progress import ReportShare, some
from dis_scale.process.threads import in_order
from dis_scale.recipe import Data, SourceSettings
from dis_scale.storage.folder import Folder
from dis_scale.storage.manifest import read_verified
from dis_scale.sweep.documents import LatentsManifest, ListingManifest
from dis_scale.vae import Vae

CHECKED, DECODED = 64, 8
"""Number of latents whose deviation is compared with the autoencoder's scale; number that are decoded and encoded again."""
MOST_APART = 3.0
"""Most difference of the posteriors' mean log-variance from that of the decoded images: a factor of 20 in the variance."""
LEAST, MOST = 0.4, 2.5
"""Bounds of the deviation of scaled latents, which is near 1 for the autoencoder's own images."""
WRITES_AT_ONCE = 16
"""Files that an export writes at a time."""
SOURCE = TypeAdapter[SourceSettings](SourceSettings)
Exported = Literal["edm2", "repa", "webdataset"]


def require_own(source: Source, vae: Vae, data: Data) -> str:
    """Compare latents, evenly from the source, with the autoencoder; return a line with what was measured.

    UserError if the latents do not have the autoencoder's shape, or if their scaled deviation is far from 1: they are scaled
    already, or come from another autoencoder. UserError also if encoding their decoded images gives latents that are farther from
    them than their mean is, or that have other variances.
    """
    assert data.given is not None
    where, (channels, size) = source.listing.where, vae.latent(data.resolution)
    expected = data.sides, (1 + data.given.posterior) * channels, size, size
    positions = np.unique(np.linspace(0, len(source) - 1, CHECKED).astype(int)).tolist()
    arrays = [source.decoded(range(i, i + 1), data.resolution)[0] for i in positions]
    moments = [each for _, each in select_decodable(positions, arrays, data.undecodable)[0]]
    if not moments:
        raise UserError(f"{where}: none of {len(positions)} latents can be read")
    if wrong := next((each.shape for each in moments if each.shape != expected), None):
        raise UserError(
            f"{where}: latents are {wrong}, and vae makes {expected} (images, values, height, width) of {data.resolution} pixels: "
            "set data.resolution and vae as they were made"
        )
    means_BCHW = np.stack([each[0, :channels] for each in moments]).astype(np.float32)
    deviation = float(vae.scaling.apply(means_BCHW.copy()).std((0, 2, 3)).mean())
    again_BCHW = _encoded_again(vae, means_BCHW[:DECODED])
    explained = _explained(means_BCHW[:DECODED], again_BCHW[:, :channels])
    measured = f"deviation {deviation:.2f} after the scale of vae, {explained:.0%} explained by encoding what it decodes"
    apart = _apart(np.stack(moments[:DECODED])[:, 0, channels:], again_BCHW[:, channels:])
    if abs(apart) > MOST_APART:
        raise UserError(
            f"{where}: {measured}; the variances of its latents are {np.exp(apart):.2g} times those that vae gives the decoded "
            "images: is the second half deviations or log-variances, as data.source.layout says?"
        )
    if data.normalise == "vae" and not LEAST <= deviation <= MOST:
        raise UserError(
            f"{where}: {measured}; expected a deviation of about 1: are they scaled already, or another autoencoder's? If neither, "
            "set data.normalise: channels"
        )
    if explained < 0:
        raise UserError(f"{where}: {measured}; expected over 0%: are they scaled already, or another autoencoder's?")
    return measured


def _encoded_again(vae: Vae, means_BCHW: np.ndarray) -> np.ndarray:
    """Return the moments of the images that latents decode to."""
    pixels = vae.decode(torch.from_numpy(vae.scaling.apply(means_BCHW.copy())))
    again: np.ndarray = vae.encode(pixels).float().cpu().numpy()
    return again


def _apart(given_BCHW: np.ndarray, own_BCHW: np.ndarray) -> float:
    """Return the difference of two mean log-variances; 0 if one side has no variance, such as latents stored without it."""
    if not (given_BCHW.size and own_BCHW.size) or given_BCHW.max() <= layouts.LEAST_LOG_VARIANCE:
        return 0.0
    given, own = (each.astype(np.float64).clip(layouts.LEAST_LOG_VARIANCE).mean() for each in (given_BCHW, own_BCHW))
    return float(given - own)


def _explained(means_BCHW: np.ndarray, again_BCHW: np.ndarray) -> float:
    """Return the share of the latents' variance that is left when they are decoded and encoded again; 1 if they are restored."""
    spread = np.square(means_BCHW - means_BCHW.mean((0, 2, 3), keepdims=True)).mean()
    return float(1 - np.square(again_BCHW - means_BCHW).mean() / max(spread, np.finfo(np.float32).tiny))


def as_images(source: Source, vae: Vae) -> Source:
    """Return the source with each latent decoded, uint8 (H, W, 3)."""
    shape_of = cache(vae.latent)  # exported programs are run for it

    def decode(file: bytes, name: str, resolution: int) -> np.ndarray:
        moments = source.decode(file, name, resolution)
        mean_BCHW = moments[:1, : shape_of(resolution).channels].astype(np.float32)
        picture: np.ndarray = vae.decode(torch.from_numpy(vae.scaling.apply(mean_BCHW)))[0]
        return picture

    return replace(source, decode=decode)


def export(latents: Folder, layout: Exported, out: Folder, report: ReportShare) -> int:
    """Write the unflipped latents of a complete set in another program's layout; return their number.

    An interrupted export is refused as a source; a rerun into the same folder begins again. UserError if the folder has other
    files. The number in a file's name is the image's place in the source.
    """
    manifest = LatentsManifest.require(latents)
    write = _write_tar if layout == "webdataset" else _write_files
    folder = out / layouts.REPA_FOLDER if layout == "repa" else out
    identity = f"{layout} of {latents}".encode()
    began = folder.exists(layouts.UNFINISHED) and folder.read(layouts.UNFINISHED) == identity
    if not began and next(folder.walk(), None) is not None:
        raise UserError(f"--out {folder}: it has files: give a new folder, or delete them")
    if layout == "repa":
        _require_paired(latents, manifest)
    folder.write(layouts.UNFINISHED, identity)
    places, labels = _places(manifest), dict[str, int]()
    for done, entry in enumerate(manifest.shards, 1):
        if entry.count:  # none if all of its images were refused
            data = read_verified(latents, entry.name, entry.digest)
            shard = shards.unpack(data, f"{latents}/{entry.name}")
            entries = places[shards.positions(data)].tolist()
            unflipped = zip(entries, shard.moments[:, 0], shard.labels.tolist(), strict=True)
            labels |= write(folder, entry.name, unflipped, posterior=manifest.encoding.posterior)
        report(done, len(manifest.shards))
    if layout != "webdataset":
        classes = None if manifest.made_from.num_classes is None else sorted(labels.items())
        folder.write(layouts.LABELS, json.dumps({"labels": classes}).encode())
    folder.delete(layouts.UNFINISHED)
    return manifest.count


def _require_paired(latents: Folder, manifest: LatentsManifest) -> None:
    """Raise UserError unless REPA's code pairs each latent with its image. It lists files by Pillow's endings, also hidden ones."""
    source = manifest.made_from.source
    if manifest.refused or source["kind"] in ("tar", "parquet", "csv", "latents"):
        raise UserError(
            f"{latents}: REPA pairs latents with the images of a folder by their order: expected a source of kind folder, of which "
            f"no image is left out; this one is of kind {source['kind']}, {len(manifest.refused)} left out: use --layout edm2"
        )
    if manifest.made_from.num_classes is None:
        raise UserError(f"{latents}: it has no classes, and REPA needs one for each image: use --layout edm2")
    listed = ListingManifest.find(listing.folder_of(Folder(latents.url.rsplit("/", 2)[0]), source))
    if listed is None:
        raise UserError(
            f"{latents}: the listing of its images is gone, so those that it left out, which REPA's tool may take, are not known: "
            "use --layout edm2"
        )
    endings = tuple(Image.registered_extensions())
    left_out = [(why, first) for why, (_, first) in listed.left_out.items()]
    # Only the first of each reason is known, and hidden files and those of many kinds may be images or not.
    unsure = (listing.HIDDEN, listing.OF_OTHER_KINDS)
    if beside := [first for why, first in left_out if why in unsure or first.lower().endswith(endings)]:
        raise UserError(
            f"{latents}: REPA would pair latents with other images: its tool also takes {some(beside)}, which the listing left "
            "out: remove them and their like and change data.source.version and the sweep's name, or use --layout edm2"
        )


def _places(manifest: LatentsManifest) -> np.ndarray:
    """Return for each position the place in the source, in the order in which its kind lists images before mixing."""
    source, images = SOURCE.validate_python(manifest.made_from.source, strict=False), manifest.made_from.images
    return mixing.permutation(images) if lists_mixed(source) else np.arange(images)


_Unflipped = Iterator[tuple[int, np.ndarray, int]]
"""Place in the source, moments (2C or C, h, w) and class of each latent."""


def _write_files(folder: Folder, _: str, samples: _Unflipped, *, posterior: bool) -> dict[str, int]:
    """Write a file for each latent; return their classes."""

    def write(sample: tuple[int, np.ndarray, int]) -> tuple[str, int]:
        position, moments, label = sample
        name = layouts.edm2_file(position)
        folder.write(name, layouts.mean_and_deviation(moments, posterior=posterior))
        return name, label

    return dict(in_order(samples, write, WRITES_AT_ONCE))


def _write_tar(folder: Folder, shard: str, samples: _Unflipped, *, posterior: bool) -> dict[str, int]:
    """Write a tar with the latents of a shard; their classes are in it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for position, moments, label in samples:
            moments_file = layouts.mean_and_log_variance(moments, posterior=posterior)
            for kind, data in (("latent", moments_file), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{position:07d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    folder.write(f"latents-{shard}", buffer.getvalue())
    return {}
