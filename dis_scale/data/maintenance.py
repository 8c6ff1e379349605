"""Looking after sealed latents: read them back, make damaged shards anew, say what they are. What `dis-scale data` does.

A shard made anew is held against the manifest before it is put: it is the same bytes or it is not put at all.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from dis_scale import manifest, vae
from dis_scale import recipe as recipes
from dis_scale.data import shards
from dis_scale.data.encode import Made, Setup, compute_exactly, make
from dis_scale.data.sources import open_source
from dis_scale.errors import StorageError, UserError
from dis_scale.recipe import PretrainedVae, Recipe
from dis_scale.storage import Folder, folder
from dis_scale.vae import Pixels, Vae

GRID = 100
"""Images of the grid that shows a set, from up to ten shards."""
AT_ONCE = 8
"""Images that are decoded together: some GB of memory at Stable Diffusion's size."""
Report = Callable[[int, int], None]


def find(url: str) -> tuple[Folder | None, Folder]:
    """(sweep, its sealed latents), or (None, latents) where the URL is a folder of latents itself."""
    given = folder(url)
    if given.exists(shards.POINTER):
        return given, shards.latents_of(given)
    found = manifest.find(given)
    if found is None or "shards" not in found:
        raise UserError(f"{given}: neither a sweep whose latents are sealed, nor a folder of sealed latents")
    return None, given


def verify(latents: Folder, fast: bool, report: Report) -> dict[str, str]:
    """What is wrong, by shard, in their order: all bytes against the manifest's hashes, or with `fast` the sizes alone."""
    entries = _manifest(latents)["shards"]
    if fast:
        sizes = latents.sizes()
        checked: Iterator[str | None] = (_wrong_size(latents, e, sizes.get(e["name"])) for e in entries)
        return {e["name"]: wrong for e, wrong in zip(entries, checked, strict=True) if wrong}
    damaged = {}
    with ThreadPoolExecutor(shards.READS_AT_ONCE) as pool:
        for i, wrong in enumerate(pool.map(lambda e: _wrong(latents, e), entries)):
            if wrong:
                damaged[entries[i]["name"]] = wrong
            report(i + 1, len(entries))
    return damaged


def require_whole(latents: Folder, damaged: dict[str, str], sweep: Folder | None) -> None:
    """StorageError that tells what to do where a shard is damaged."""
    if damaged:
        raise StorageError(
            f"{latents}: {len(damaged)} of {len(_manifest(latents)['shards'])} shards are damaged; "
            f"to make them anew: dis-scale data repair {sweep or 'SWEEP'}"
        )


def repair(url: str, report: Report, listed: Callable[[int], None]) -> list[str]:
    """Makes the damaged shards of a sweep's latents anew and names them; UserError where they would not be the same bytes."""
    sweep, latents = find(url)
    if sweep is None:
        raise UserError(
            f"{url}: a folder of latents: give the sweep's folder, whose recipe says where images and VAE are"
        )
    damaged = verify(latents, False, report)
    if damaged:
        found, recipe = _manifest(latents), _recipe(sweep)
        setup = _same_setup(sweep, recipe, latents, found, listed)
        entries = {int(entry["name"].partition(".")[0]): entry for entry in found["shards"]}
        for made in make(setup, [n for n, entry in entries.items() if entry["name"] in damaged], lambda _: None):
            _put_same(latents, made, entries[made.number])
    return list(damaged)


def described(latents: Folder) -> list[str]:
    """Totals, labels, statistics and identity, a line each."""
    m = _manifest(latents)
    channels, size = m["latent"]
    total = sum(shard["bytes"] for shard in m["shards"])
    names = dict(enumerate(m.get("label_names", [])))
    labels = [f"{names.get(int(label), label)} {count:,}" for label, count in m.get("labels", {}).items()]
    refused = f", {len(m['refused'])} refused: {_some(m['refused'])}" if m["refused"] else ", none refused"
    deviations = [abs(m["scale"]) * deviation for deviation in m["std"]]
    return [
        f"latents  {latents}",
        f"images   {m['count']:,} in {len(m['shards'])} shards, {total / 1e6:,.1f} MB{refused}",
        f"latent   {channels}x{size}x{size}, float16 moments of image and mirror image",
        f"labels   {len(labels)} of {m['num_classes']} classes: {_some(labels)}",
        f"mean     {_numbers(m['mean'])} by channel; shift {m['shift']:g}",
        f"std      {_numbers(m['std'])}; scale {m['scale']:g} makes it {_numbers(deviations)}",
        f"source   {_words(m.get('source', {}))}; listing {m.get('listing', '?')[:12]}",
        f"vae      {m['vae'][:12]}",
        f"made     {m.get('resolution', '?')} pixels, {m.get('shard_images', '?')} images a shard, "
        f"{m.get('encode_images', '?')} at once, on {m.get('device', '?')} with torch {m.get('torch', '?')}",
    ]


def decoder(sweep: Folder | None, latents: Folder, path: str | None) -> Vae | None:
    """What decodes the latents: the VAE at `path`, the sweep's, or none needed; None where nobody says.

    UserError for another VAE than made them.
    """
    theirs = _manifest(latents)["vae"]
    if path is not None:
        found = vae.load(PretrainedVae(kind="pretrained", path=path), latents)
    elif sweep is not None:
        found = vae.load(_recipe(sweep).vae, sweep)
    else:
        found = Pixels(torch.nn.Identity())
        return found if found.identity == theirs else None
    shards.require_same_vae(latents, theirs, found.identity)
    return found


def pictures(latents: Folder, decoder: Vae) -> np.ndarray:
    """Up to `GRID` decoded images, uint8 (N, H, W, 3): posterior means, evenly from up to ten shards."""
    m = _manifest(latents)
    entries = [entry for entry in m["shards"] if entry["count"]]
    chosen = entries[:: -(-len(entries) // 10)]
    images = []
    for entry in chosen:
        moments = shards.unpack(manifest.verified(latents, entry["name"], entry), f"{latents}/{entry['name']}").moments
        rows = moments[:: max(1, len(moments) // (GRID // len(chosen)))][: GRID // len(chosen), 0]
        mean = np.split(rows.astype(np.float32), 2, axis=1)[0]
        few = torch.from_numpy((mean - decoder.shift) * decoder.scale).split(AT_ONCE)
        images += [decoder.decode(latents_BCHW) for latents_BCHW in few]
    return np.concatenate(images)


def _manifest(latents: Folder) -> dict[str, Any]:
    found = manifest.find(latents)
    assert found is not None, "`find` has seen it"
    return found


def _recipe(sweep: Folder) -> Recipe:
    return recipes.parse(sweep.read(recipes.FILE).decode(), f"{sweep}/{recipes.FILE}")


def _wrong(latents: Folder, entry: dict[str, Any]) -> str | None:
    try:
        manifest.verified(latents, entry["name"], entry)
    except StorageError as error:
        return str(error)
    return None


def _wrong_size(latents: Folder, entry: dict[str, Any], size: int | None) -> str | None:
    if size == entry["bytes"]:
        return None
    found = (
        "missing, though its manifest names it" if size is None else f"{size} bytes, its manifest says {entry['bytes']}"
    )
    return f"{latents}/{entry['name']}: {found}"


def _same_setup(
    sweep: Folder, recipe: Recipe, latents: Folder, found: dict[str, Any], listed: Callable[[int], None]
) -> Setup:
    """What the set was made with; UserError where that is not at hand any more, so that the bytes would differ."""
    setup = Setup(open_source(recipe.data, shards.store_of(sweep), listed), vae.load(recipe.vae, sweep), recipe)
    ours = {"vae": setup.vae.identity, "listing": setup.source.listing.facts["sha256"], "torch": torch.__version__}
    if different := [f"{key} {found[key]}, now {value}" for key, value in ours.items() if found[key] != value]:
        raise UserError(f"{latents}: made with {'; '.join(different)}: a shard made anew would not be the same bytes")
    if found["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{latents}: made on cuda, and there is no GPU here: a shard made anew would not be the same bytes"
        )
    compute_exactly()
    setup.vae.net.to(found["device"])
    return setup


def _put_same(latents: Folder, made: Made, entry: dict[str, Any]) -> None:
    digest = manifest.digest(shards.pack(made.samples))
    if digest["sha256"] != entry["sha256"]:
        raise StorageError(
            f"{latents}/{entry['name']}: made anew it would be other bytes ({digest['sha256'][:12]}, its manifest says "
            f"{entry['sha256'][:12]}): an image of it has changed since, or hardware of another kind computes; not put"
        )
    shards.put_shard(latents, *made)


def _some(words: list[str]) -> str:
    return ", ".join(words[:10]) + (f", ... ({len(words) - 10} more)" if len(words) > 10 else "")


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def _words(source: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in source.items() if value is not None)
