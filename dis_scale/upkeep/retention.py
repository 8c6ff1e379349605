"""Files that no result of a sweep needs any more, with their sizes. Behind `dis-scale gc`.

In the sweep: samples of finished evaluations, leases of earlier attempts, dumps of failed steps of trained models, weights of
attempts that died before they had published them. In its storage root: latents and listings that no sweep there uses. All files
that are needed to continue, fork, evaluate or report stay.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from dis_scale.data import listing
from dis_scale.process.errors import StorageError, UserError
from dis_scale.process.threads import in_order
from dis_scale.storage import lease
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.storage.manifest import NAME as MANIFEST
from dis_scale.sweep import RECIPE, SWEEPS, Sweep, command_lease, state, store_of, sweeps_below
from dis_scale.sweep.contents import Stored, walk
from dis_scale.sweep.documents import PublishedManifest

KEPT = "latents and listings are kept"


class Unneeded(NamedTuple):
    """Files in one folder that no result needs."""

    kind: str
    folder: Folder
    sizes: dict[str, int]
    """Bytes by file."""
    require_unused: Callable[[], None] = lambda: None
    """Called right before the deletion; UserError if a sweep has begun to need the files since they were listed."""

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes.values())

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "url": self.folder.url, "files": len(self.sizes), "bytes": self.size_bytes}


class Note(NamedTuple):
    """A note on a part that stays, or on a user of a part that is deleted."""

    kind: str
    words: str


def open_store(root: str) -> Folder:
    """Return the storage root at a URL or path; UserError if nothing there is one."""
    store = open_folder(root)
    if store.exists(RECIPE):
        raise UserError(f"{root} is a sweep: expected its storage root, {store_of(store)}")
    if not {"latents", listing.LISTINGS} & set(store.folders()) and not sweeps_below(store):
        raise UserError(f"{root}: expected a storage root, with sweeps, latents or {listing.LISTINGS} in it")
    return store


def find_unneeded(sweep: Sweep) -> list[Unneeded]:
    """Return the files of the sweep itself that can be deleted."""
    outdated = {sweep.evaluation(sampled).url for sampled in state.outdated(sweep)}
    models = list(sweep.recipe.models)
    trained = [m for m, done in zip(models, in_order(models, partial(state.trained, sweep)), strict=True) if done]
    found, parts = list[Unneeded](), walk(sweep.folder)
    for part, spare in zip(parts, in_order(parts, _spare), strict=True):
        sizes = part.sizes
        match part.kind.name:
            case "evaluation" | "floor" if part.folder.url not in outdated:
                found.append(Unneeded("samples", part.folder, spare))
            case "published":
                found.append(Unneeded("weights of other attempts", part.folder, spare))
            case "lease":
                found.append(Unneeded("leases", part.folder, _chosen(sizes, set(lease.earlier(sizes)).__contains__)))
            case "failed step" if part.model in trained:
                found.append(Unneeded("failed steps", part.folder, sizes))
    return [unneeded for unneeded in found if unneeded.sizes]


def _spare(part: Stored) -> dict[str, int]:
    """Return the files of a part that can be deleted: of published weights, files that their manifest does not name; of an
    evaluation, its samples if its metrics are intact, since damaged metrics are rebuilt from the samples."""
    if part.kind.name == "published":
        published = PublishedManifest.find_intact(part.folder) if part.exists else None
        named = {MANIFEST, *(published.files if published else part.sizes)}
        return _chosen(part.sizes, lambda name: name not in named)
    samples = _chosen(part.sizes, lambda name: name.startswith("block-"))
    intact = samples and part.exists and part.kind.document and part.kind.document.find_intact(part.folder)
    return samples if intact else {}


def _chosen(sizes: dict[str, int], wanted: Callable[[str], bool]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if wanted(name)}


def find_unused(store: Folder, except_for: Folder | None = None) -> list[Unneeded]:
    """Return the latents and listings below a storage root that no sweep there uses, not counting the one in `except_for`.

    UserError if a sweep there runs, cannot be read, or has no latents yet: it may be about to use any of them.
    """
    commands = {command_lease(folder): folder for folder in sweeps_below(store) if folder != except_for}
    for command, process in lease.live_holders(commands).items():
        raise UserError(f"{KEPT}: {commands[command]} is running (process {process})")
    used = _used(store, except_for)  # after those seconds: a sweep that began meanwhile has no latents yet, or names them
    folders = [(kind, store / kind / name) for kind in used for name in store.folders(kind) if name not in used[kind]]
    sizes = in_order(folders, lambda each: each[1].sizes())
    found = zip(folders, sizes, strict=True)
    return [Unneeded(*each, of_one, partial(_require_unused, store, except_for, *each)) for each, of_one in found if of_one]


def _require_unused(store: Folder, except_for: Folder | None, kind: str, folder: Folder) -> None:
    if folder.name in _used(store, except_for)[kind]:
        raise UserError(f"{KEPT}: a sweep uses {folder} since they were listed: run the command again")


def _used(store: Folder, except_for: Folder | None) -> dict[str, set[str]]:
    """Return the names of the latents and of the listings that the other sweeps use.

    UserError if a sweep's use is not known: the sweep cannot be read, or has no latents yet.
    """
    all_of_it = sweeps_below(store)
    if store.local and (store.local / SWEEPS).is_symlink() and not all_of_it:
        raise UserError(f"{KEPT}: {store}/{SWEEPS} is a link that leads to no sweep: mount its disk, or remove it")
    others = [folder for folder in all_of_it if folder != except_for]
    names = {name for name in store.list(SWEEPS) if not name.startswith(".")}
    if strange := sorted(names - set(store.folders(SWEEPS))):  # such as a link to a disk that is not mounted
        raise UserError(
            f"{KEPT}: {store}/{SWEEPS}/{strange[0]} is no folder, so what it uses is unknown: mount its disk, or remove it"
        )
    used = list(in_order(others, _require_settled))
    listings = {listing.folder_of(store, sweep.recipe.data.declared).name for sweep, _ in used}
    return {"latents": {latents.name for _, latents in used}, listing.LISTINGS: listings}


def delete(unneeded: Iterable[Unneeded]) -> None:
    """Delete the files: first a folder's manifest, so that a partly deleted folder does not count as existing; then the sidecars
    of shards, so that no shard counts as finished while the shards are deleted.

    UserError if a sweep needs a folder by now: folders before it are deleted, and its own manifest is written again.
    """
    for each in unneeded:
        each.require_unused()
        manifest = None
        with suppress(FileNotFoundError):
            manifest = each.folder.read(MANIFEST) if MANIFEST in each.sizes else None
        if manifest is not None:
            each.folder.delete(MANIFEST)
        try:
            each.require_unused()  # a sweep that was stored during the listing above
        except BaseException:
            if manifest is not None:
                each.folder.write(MANIFEST, manifest)
            raise
        for accounts in (True, False):
            left = [name for name in each.sizes if name != MANIFEST and name.endswith(".json") == accounts]
            for _ in in_order(left, each.folder.delete):
                pass
        if not each.folder.list():
            each.folder.delete()  # on a disk: the empty folder


def _require_settled(folder: Folder) -> tuple[Sweep, Folder]:
    """Return the sweep in a folder, and its latents; UserError if it cannot be read or has no latents yet."""
    try:
        sweep = Sweep.open(folder.url)
        latents = state.find_latents(folder)
    except (StorageError, UserError) as error:
        raise UserError(f"{KEPT}: {folder} cannot be read, so what it uses is unknown: {error}") from error
    if latents is None:
        raise UserError(f"{KEPT}: {folder} has no complete latents yet: finish it, or delete its folder")
    return sweep, latents
