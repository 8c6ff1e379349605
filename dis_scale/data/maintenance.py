"""Maintenance of finished latents: verify, repair, describe, decode. Behind `dis-scale data verify`, `repair` and `show`.

A rebuilt shard is compared with the manifest before it is written: it has the same bytes or it is not written.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from dis_scale import vae
from dis_scale.data import mixing, shards
from dis_scale.data.encode import HARDWARE, Setup, compute_exactly, encode_mixed, encode_shards, hardware
from dis_scale.data.shards import EncodedShard
from dis_scale.data.sources import open_source
from dis_scale.process.errors import StorageError, UserError
from dis_scale.process.progress import ReportDone, ReportShare, some
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import LATENTS, Sweep
from dis_scale.sweep.state import require_latents, require_same_vae
from dis_scale.vae import PixelVae, Vae

GRID, GRID_SHARDS = 100, 10
"""Most images in the grid of `dis-scale data show`, and most shards that they come from."""
AT_ONCE = 8
"""Images decoded together: some GB of memory at Stable Diffusion's size."""


def locate_latents(url: str) -> tuple[Folder | None, Folder]:
    """Return (the sweep's folder, its latents), or (None, latents) for a folder of latents; UserError if it is neither."""
    given = open_folder(url)
    if given.exists(LATENTS):
        latents = require_latents(given)
        return given, latents
    facts = manifest.find(given)
    if facts is None or "shards" not in facts:
        raise UserError(f"{given}: neither a sweep with complete latents nor a folder of complete latents")
    return None, given


def verify(latents: Folder, fast: bool, report: ReportShare) -> dict[str, str]:
    """Return the damage by shard, in order: against the manifest's hashes, or only its sizes if `fast`, which reports nothing."""
    entries = manifest.require(latents)["shards"]
    if fast:
        sizes = latents.sizes()
        return {e["name"]: damage for e in entries if (damage := _wrong_size(latents, e, sizes.get(e["name"])))}
    damaged = {}
    with ThreadPoolExecutor(shards.READS_AT_ONCE) as pool:
        for i, damage in enumerate(pool.map(lambda e: _damage(latents, e), entries)):
            if damage:
                damaged[entries[i]["name"]] = damage
            report(i + 1, len(entries))
    return damaged


def require_undamaged(latents: Folder, damaged: dict[str, str], sweep: Folder | None) -> None:
    """Raise StorageError with the command that repairs, if a shard is damaged."""
    if damaged:
        raise StorageError(
            f"{latents}: {len(damaged)} of {len(manifest.require(latents)['shards'])} shards are damaged; "
            f"to rebuild them: dis-scale data repair {sweep or 'SWEEP'}"
        )


def repair(url: str, report: ReportShare, listed: ReportDone) -> list[str]:
    """Rebuild the damaged shards of a sweep's latents; return their names.

    UserError if another setup encoded them; StorageError if a rebuilt shard has another hash: it is not written.
    """
    sweep, latents = locate_latents(url)
    if sweep is None:
        raise UserError(
            f"{url}: a folder of latents: give the sweep's folder, whose recipe names the images and the VAE"
        )
    damaged = verify(latents, False, report)
    if damaged:
        facts = manifest.require(latents)
        setup = _prepare_rebuild(Sweep.open(sweep.url), latents, facts, listed)
        entries = {int(entry["name"].partition(".")[0]): entry for entry in facts["shards"]}
        numbers = [n for n, entry in entries.items() if entry["name"] in damaged]
        if setup.source.mixed:  # its listing is in the mixed order already
            rebuilt = encode_shards(setup, numbers, lambda _: None)
        else:
            rebuilt = encode_mixed(setup, numbers, set(facts["refused"]))
        for shard in rebuilt:
            _put_same(latents, shard, entries[shard.number])
    return list(damaged)


def describe(latents: Folder) -> list[str]:
    """Return totals, labels, statistics and identity, a line each."""
    m = manifest.require(latents)
    (channels, size), classes = m["latent"], m["num_classes"]
    total = sum(shard["bytes"] for shard in m["shards"])
    names = dict(enumerate(m.get("label_names", [])))
    labels = [f"{names.get(int(label), label)} {count:,}" for label, count in m.get("labels", {}).items()]
    refused = f", {len(m['refused'])} refused: {some(m['refused'])}" if m["refused"] else ", none refused"
    scale, shift = np.atleast_1d(m["scale"]), np.atleast_1d(m["shift"])
    stored = "moments" if m.get("posterior", True) else "latents without variance"
    return [
        f"latents  {latents}",
        f"images   {m['count']:,} in {len(m['shards'])} shards, {total / 1e6:,.1f} MB{refused}",
        f"latent   {channels}x{size}x{size}, float16 {stored} of image and horizontal flip",
        "labels   none" if classes is None else f"labels   {len(labels)} of {classes} classes: {some(labels)}",
        f"mixing   {mixing.words(m['mixing']) if 'mixing' in m else 'none: made by an earlier version'}",
        f"mean     {_numbers(m['mean'])} by channel; shift {_numbers(shift)}",
        f"std      {_numbers(m['std'])}; scale {_numbers(scale)} makes it {_numbers(np.abs(scale) * m['std'])}",
        f"source   {_settings(m.get('source', {}))}; listing {m.get('listing', '?')[:12]}",
        f"vae      {m['vae'][:12]}",
        f"encoded  {m.get('resolution', '?')} pixels, {m.get('shard_images', '?')} images a shard, "
        f"{m.get('encode_images', '?')} at a time in {m.get('precision', '?')}, "
        f"on {m.get('device', '?')} with torch {m.get('torch', '?')}",
    ]


def load_decoder(sweep: Folder | None, latents: Folder, path: str | None) -> Vae | None:
    """Load the VAE of the latents: from `path`, else the sweep's, else `PixelVae` if they are pixels, else None.

    UserError if another VAE encoded the latents.
    """
    facts = manifest.require(latents)
    theirs = facts["vae"]
    if path is None and sweep is None:
        return PixelVae() if PixelVae().identity == theirs else None
    if path is not None:
        decoder = vae.from_path(path, facts)
    else:
        assert sweep is not None
        decoder = vae.load(Sweep.open(sweep.url))
    require_same_vae(latents, theirs, decoder.identity)
    return decoder


def decode_examples(latents: Folder, decoder: Vae) -> np.ndarray:
    """Decode up to `GRID` images, evenly from up to ten shards, to uint8 (N, H, W, 3): means of posteriors, or stored latents."""
    facts = manifest.require(latents)
    entries, (channels, _) = [entry for entry in facts["shards"] if entry["count"]], facts["latent"]
    chosen = entries[:: -(-len(entries) // GRID_SHARDS)]
    per_shard, images = GRID // len(chosen), []
    for entry in chosen:
        moments = shards.unpack(manifest.verified(latents, entry["name"], entry), f"{latents}/{entry['name']}").moments
        originals = moments[:: max(1, len(moments) // per_shard)][:per_shard, 0]  # 1 is the horizontal flip
        mean = originals[:, :channels].astype(np.float32)  # the variance, if any, follows
        batches = torch.from_numpy(decoder.scaling.apply(mean)).split(AT_ONCE)
        images += [decoder.decode(latents_BCHW) for latents_BCHW in batches]
    return np.concatenate(images)


def _damage(latents: Folder, entry: dict[str, Any]) -> str | None:
    try:
        manifest.verified(latents, entry["name"], entry)
    except StorageError as error:
        return str(error)
    return None


def _wrong_size(latents: Folder, entry: dict[str, Any], size: int | None) -> str | None:
    if size == entry["bytes"]:
        return None
    if size is None:
        return f"{latents}/{entry['name']}: missing, though its manifest names it"
    return f"{latents}/{entry['name']}: {size} bytes, its manifest says {entry['bytes']}"


def _prepare_rebuild(sweep: Sweep, latents: Folder, facts: dict[str, Any], listed: ReportDone) -> Setup:
    """Open what encoded the set, and set PyTorch as it was; UserError if something differs, since the bytes would."""
    if "mixing" not in facts:
        raise UserError(
            f"{latents}: made by an earlier version, in the source's order, and this version cannot rebuild its shards; give the "
            "sweep another name (--set name=...), and mixed latents are made"
        )
    setup = Setup(open_source(sweep.recipe.data, sweep.store, listed), vae.load(sweep), sweep.recipe)
    ours = {"vae": setup.vae.identity, "listing": setup.source.listing.facts["sha256"], "torch": torch.__version__}
    ours |= {"order": setup.source.order} if "order" in facts else {}
    if different := [f"{key} {facts[key]}, now {value}" for key, value in ours.items() if facts[key] != value]:
        raise UserError(f"{latents}: encoded with {'; '.join(different)}: a rebuilt shard would have other bytes")
    if facts["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{latents}: encoded on cuda, and there is no GPU here: a rebuilt shard would have other bytes")
    if latents.exists(HARDWARE) and (theirs := latents.read_json(HARDWARE)) != (here := hardware(facts["device"])):
        raise UserError(f"{latents}: encoded on {theirs!r}, this is {here!r}: a rebuilt shard would have other bytes")
    compute_exactly(tf32=sweep.recipe.precompute.precision == "tf32")
    setup.vae.net.to(facts["device"])
    return setup


def _put_same(latents: Folder, shard: EncodedShard, entry: dict[str, Any]) -> None:
    """Write the shard if it has the manifest's hash; StorageError otherwise."""
    digest = manifest.digest(shards.pack(shard.samples))
    if digest["sha256"] != entry["sha256"]:
        raise StorageError(
            f"{latents}/{entry['name']}: rebuilt, it has other bytes ({digest['sha256'][:12]}, its manifest says "
            f"{entry['sha256'][:12]}): an image has changed, or the hardware is of another kind; not written"
        )
    shards.put_shard(latents, *shard)


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def _settings(source: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in source.items() if value is not None)
