"""Maintenance of finished latents: verify, repair, describe, decode. Behind `dis-scale data verify`, `repair` and `show`.

A rebuilt shard is compared with the manifest before it is written: it has the same bytes or it is not written.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from dis_scale import vae
from dis_scale.data import mixing, shards
from dis_scale.data.encode import Setup, compute_exactly, encode_mixed, encode_shards, encoding_of, hardware
from dis_scale.data.shards import EncodedShard
from dis_scale.data.sources import open_source
from dis_scale.process.errors import BrokenDevice, Damaged, DisScaleError, StorageError, UserError, counted
from dis_scale.process.progress import ReportDone, ReportShare, some
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.storage.manifest import Digest, read_verified
from dis_scale.sweep import Sweep
from dis_scale.sweep.documents import Hardware, LatentsManifest, LatentsPointer, ShardEntry
from dis_scale.sweep.state import require_latents, require_same_vae
from dis_scale.vae import Vae

GRID, GRID_SHARDS = 50, 10
"""Most images in the grid of `dis-scale data show`, and most shards that they come from."""
AT_ONCE = 8
"""Images decoded together: some GB of memory at Stable Diffusion's size."""


def locate_latents(url: str) -> tuple[Folder | None, Folder]:
    """Return (the sweep's folder, its latents), or (None, latents) for a folder of latents; UserError if it is neither."""
    given = open_folder(url)
    if LatentsPointer.exists(given):
        return given, require_latents(given)
    if LatentsManifest.find(given) is None:
        raise UserError(f"{given}: neither a sweep with complete latents nor a folder of complete latents")
    return None, given


def verify(latents: Folder, *, fast: bool, report: ReportShare) -> dict[str, str]:
    """Compare the shards with the manifest's hashes, or only its sizes if `fast`; return the damage by shard, in order.

    `fast` does not call `report`. StorageError if storage refuses to read a shard: that is no damage.
    """
    entries = LatentsManifest.require(latents).shards
    if fast:
        sizes = latents.sizes()
        return {e.name: damage for e in entries if (damage := _wrong_size(latents, e, sizes.get(e.name)))}
    damaged = dict[str, str]()
    with ThreadPoolExecutor(shards.READS_AT_ONCE) as pool:
        for i, damage in enumerate(pool.map(lambda e: _damage(latents, e), entries)):
            if damage:
                damaged[entries[i].name] = damage
            report(i + 1, len(entries))
    if damaged:
        LatentsManifest.require(latents)  # raises if the folder is gone, as on an unmounted disk: that is no damage
    return damaged


def require_undamaged(latents: Folder, damaged: dict[str, str], sweep: Folder | None) -> None:
    """Raise StorageError with the command that repairs, if a shard is damaged."""
    if damaged:
        raise StorageError(
            f"{latents}: {len(damaged)} of {counted(len(LatentsManifest.require(latents).shards), 'shard')} damaged; "
            f"to rebuild them: dis-scale data repair {sweep or 'SWEEP'}"
        )


def repair(url: str, verified: ReportShare, rebuilt: ReportShare, listed: ReportDone) -> list[str]:
    """Rebuild the damaged shards of a sweep's latents; return their names.

    UserError if another setup encoded them. StorageError, after all other shards are rebuilt, if an image of a shard cannot be
    read, or if a rebuilt shard has another hash; such a shard is not written.
    """
    sweep, latents = locate_latents(url)
    if sweep is None:
        raise UserError(f"{url}: a folder of latents: give the sweep's folder, whose recipe names the images and the VAE")
    damaged, failed = verify(latents, fast=False, report=verified), dict[str, str]()
    if damaged:
        manifest = LatentsManifest.require(latents)
        setup = _prepare_rebuild(Sweep.open(sweep.url), latents, manifest, listed)
        entries = {int(entry.name.partition(".")[0]): entry for entry in manifest.shards}
        numbers = [n for n, entry in entries.items() if entry.name in damaged]
        if setup.source.mixed:  # its listing is in the mixed order already
            shards_again = _encode_each(setup, numbers, rebuilt)
        else:
            shards_again = encode_mixed(setup, numbers, set(manifest.refused), rebuilt)
        for number, shard in zip(numbers, shards_again, strict=True):
            try:
                _put_same(latents, shard, entries[number])
            except DisScaleError as error:
                failed[entries[number].name] = str(error)
    if failed:
        raise StorageError(
            f"{latents}: {len(failed)} of {len(damaged)} damaged shards cannot be rebuilt: {', '.join(failed)}; the first: "
            f"{next(iter(failed.values()))}"
        )
    return list(damaged)


def _encode_each(setup: Setup, numbers: Sequence[int], report: ReportShare) -> Iterator[EncodedShard | DisScaleError]:
    """Yield shards of a source that is listed in the mixed order; the error in place of a shard whose images cannot be read."""
    for done, number in enumerate(numbers, 1):
        try:
            yield from encode_shards(setup, [number], lambda _: None)
        except (StorageError, BrokenDevice) as error:
            yield error
        report(done, len(numbers))


def describe(latents: Folder) -> list[str]:
    """Return totals, labels, statistics and identity, a line each."""
    m = LatentsManifest.require(latents)
    made_from = m.made_from
    encoding, (channels, size), classes = m.encoding, m.encoding.latent, made_from.num_classes
    names = dict(enumerate(made_from.label_names))
    labels = [f"{names.get(int(label), label)} {count:,}" for label, count in m.labels.items()]
    refused = f", {len(m.refused)} refused: {some(list(m.refused))}" if m.refused else ", none refused"
    scale, shift = np.atleast_1d(encoding.scale), np.atleast_1d(encoding.shift)
    stored = "moments" if encoding.posterior else "latents without variance"
    mirrored = " and horizontal flip" if encoding.sides == 2 else " alone"
    return [
        f"latents  {latents}",
        f"images   {m.count:,} in {counted(len(m.shards), 'shard')}, {m.size_bytes / 1e6:,.1f} MB{refused}",
        f"latent   {channels}x{size}x{size}, float16 {stored} of image{mirrored}",
        "labels   none" if classes is None else f"labels   {len(labels)} of {counted(classes, 'class')}: {some(labels)}",
        f"mixing   {mixing.words(m.mixing)}",
        f"mean     {_numbers(m.mean)} by channel; shift {_numbers(shift)}",
        f"std      {_numbers(m.std)}; scale {_numbers(scale)} makes it {_numbers(np.abs(scale) * m.std)}",
        f"source   {_settings(made_from.source)}; listing {made_from.listing[:12]}",
        f"vae      {encoding.identity[:12]}",
        f"encoded  {made_from.resolution} pixels, {made_from.shard_images} images a shard, "
        f"{made_from.encode_images} at a time in {made_from.precision}, on {encoding.device} with torch {encoding.torch}"
        if encoding.torch
        else "encoded  by another program, and copied",
    ]


def load_decoder(sweep: Folder | None, latents: Folder, path: str | None) -> Vae | None:
    """Load the VAE of the latents by `vae.decoder_of`; UserError if another VAE encoded the latents."""
    encoder = LatentsManifest.require(latents).encoding
    decoder = vae.decoder_of(path, Sweep.open(sweep.url) if sweep and path is None else None, encoder)
    if decoder:
        require_same_vae(latents, encoder.identity, decoder.identity)
    return decoder


class Examples(NamedTuple):
    """Positions in the listing (N), names of the classes (N), if any, and the decoded images, uint8 (N, H, W, 3)."""

    positions: list[int]
    names: list[str]
    decoded: np.ndarray

    def originals(self, sweep: Sweep, report: ReportDone) -> np.ndarray:
        """Return the same images of the sweep's source, uint8 (N, H, W, 3); DisScaleError if it cannot be read."""
        if sweep.recipe.data.given:
            raise UserError("their source has latents")
        source = open_source(sweep.recipe.data, sweep.store, report)
        return np.stack([source.pixels(i, sweep.recipe.data.resolution) for i in self.positions])

    def error_words(self, originals: np.ndarray) -> str:
        """Return the error of the decoded images in words: over all pixels, and in the mean colour of an image."""
        difference = self.decoded.astype(np.float64) - originals
        colour = np.abs(difference.mean((1, 2))).mean()
        with np.errstate(divide="ignore"):  # of equal images it is infinite
            decibels = 10 * np.log10(255**2 / (difference**2).mean())
        return (
            f"PSNR {decibels:.1f} dB; the mean of a colour is off by {colour:.1f} of 255; "
            "originals are above what the VAE makes of them"
        )


def decode_examples(latents: Folder, decoder: Vae) -> Examples:
    """Decode up to `GRID` images, evenly from up to ten shards: means of posteriors, or stored latents."""
    manifest = LatentsManifest.require(latents)
    entries, (channels, _) = [entry for entry in manifest.shards if entry.count], manifest.encoding.latent
    chosen, classes = entries[:: -(-len(entries) // GRID_SHARDS)], dict(enumerate(manifest.made_from.label_names))
    per_shard, positions, names, images = GRID // len(chosen), list[int](), list[str](), []
    for entry in chosen:
        data = read_verified(latents, entry.name, entry.digest)
        moments, labels = shards.unpack(data, f"{latents}/{entry.name}")
        some_of = slice(None, None, max(1, len(moments) // per_shard))
        positions += shards.positions(data)[some_of][:per_shard]
        names += [classes.get(label, str(label)) for label in labels[some_of][:per_shard].tolist() if classes]
        unflipped = moments[some_of][:per_shard, 0]
        mean = unflipped[:, :channels].astype(np.float32)  # the variance, if any, follows
        batches = torch.from_numpy(decoder.scaling.apply(mean)).split(AT_ONCE)
        images += [decoder.decode(latents_BCHW) for latents_BCHW in batches]
    return Examples(positions, names, np.concatenate(images))


def _damage(latents: Folder, entry: ShardEntry) -> str | None:
    try:
        read_verified(latents, entry.name, entry.digest)
    except Damaged as error:
        return str(error)
    return None


def _wrong_size(latents: Folder, entry: ShardEntry, size: int | None) -> str | None:
    if size == entry.size_bytes:
        return None
    if size is None:
        return f"{latents}/{entry.name}: missing, though its manifest names it"
    return f"{latents}/{entry.name}: {size} bytes, its manifest says {entry.size_bytes}"


def _prepare_rebuild(sweep: Sweep, latents: Folder, manifest: LatentsManifest, listed: ReportDone) -> Setup:
    """Open the source and the VAE of the set, and set PyTorch as it was. UserError if a rebuilt shard would have other bytes."""
    setup = Setup(open_source(sweep.recipe.data, sweep.store, listed), vae.load(sweep), sweep.recipe)
    made_from, encoding = manifest.made_from, manifest.encoding
    compared = {
        "vae": (encoding.identity, setup.vae.identity),
        "listing": (made_from.listing, setup.source.listing.manifest.sha256),
        "torch": (encoding.torch, encoding_of(setup.vae, sweep.recipe.data, encoding.device).torch),
        "order": (made_from.order, setup.source.order),
    }
    if different := [f"{key} {theirs}, now {ours}" for key, (theirs, ours) in compared.items() if theirs != ours]:
        raise UserError(f"{latents}: encoded with {'; '.join(different)}: a rebuilt shard would have other bytes")
    if encoding.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{latents}: encoded on cuda, and there is no GPU here: a rebuilt shard would have other bytes")
    theirs, here = Hardware.find(latents), hardware(encoding.device)
    if theirs and theirs.hardware != here:
        raise UserError(f"{latents}: encoded on {theirs.hardware!r}, this is {here!r}: a rebuilt shard would have other bytes")
    compute_exactly(rounded=sweep.recipe.precompute.precision == "tf32")
    setup.vae.net.to(encoding.device)
    return setup


def _put_same(latents: Folder, shard: EncodedShard | DisScaleError, entry: ShardEntry) -> None:
    """Write the shard if it could be encoded and has the manifest's hash; DisScaleError otherwise."""
    if isinstance(shard, DisScaleError):
        raise shard
    digest = Digest.of(shards.pack(shard.samples))
    if digest.sha256 != entry.sha256:
        raise StorageError(
            f"{latents}/{entry.name}: rebuilt, it has other bytes ({digest.sha256[:12]}, its manifest says "
            f"{entry.sha256[:12]}): an image has changed, or the hardware is of another kind; not written"
        )
    shards.put_shard(latents, *shard, sealed=True)


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def _settings(source: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in source.items() if value is not None)
