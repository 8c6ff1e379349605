"""Removal of a complete sweep, with the latents and the listing that no other sweep uses. Behind `dis-scale delete`.

Read next: retention.py, for what a sweep that stays can spare.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from dis_scale.data import listing
from dis_scale.process.errors import Held, StorageError, UserError
from dis_scale.process.threads import in_order
from dis_scale.recipe import SweepStart
from dis_scale.storage import lease
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.storage.manifest import NAME as MANIFEST
from dis_scale.sweep import RECIPE, Sweep, command_lease, sweeps_below
from dis_scale.sweep.contents import walk
from dis_scale.sweep.documents import LatentsPointer, TrackingIds
from dis_scale.upkeep import retention
from dis_scale.upkeep.retention import Note, Unneeded


@dataclass(frozen=True)
class Removal:
    """What is deleted with a sweep, and what is not."""

    sweep: Sweep
    own: list[Unneeded]
    """Files in the sweep's folder, grouped by its sub-folders."""
    unshared: list[Unneeded]
    """Latents and listing that no other sweep uses."""
    notes: list[Note]

    @property
    def parts(self) -> list[Unneeded]:
        return [*self.own, *self.unshared]


def find(sweep: Sweep) -> Removal:
    """Return what deleting a sweep would remove.

    Held if the sweep or one of its stages runs, UserError if it is not where its recipe's name belongs.
    """
    if Sweep.below(sweep.store, sweep.recipe).folder != sweep.folder:
        raise UserError(f"{sweep} holds the sweep {sweep.recipe.name}, whose folder has another name: delete it by hand")
    if _is_around_us(sweep.folder):
        raise UserError(f"{sweep}: this shell is in its folder: leave it (cd) first")
    require_stopped(sweep)
    unshared, kept = _unshared(sweep)
    tracking = TrackingIds.find_intact(sweep.folder)
    copies = [Note("mlflow", f"its runs stay in {tracking.uri}")] if tracking else []
    linked = sorted(path for path in sweep.folder.local.rglob("*") if path.is_symlink()) if sweep.folder.local else []
    links = [Note("kept", f"what {path} leads to: it is a link, which is deleted") for path in linked]
    return Removal(sweep, _own(sweep.folder), unshared, [*kept, *_begun_from(sweep), *copies, *links])


def _is_around_us(folder: Folder) -> bool:
    """Return whether this process's working folder is in the folder, which could not be deleted then."""
    with contextlib.suppress(FileNotFoundError):  # if the working folder is gone
        return bool(folder.local) and Path(folder.url).resolve() in (Path.cwd(), *Path.cwd().parents)
    return False


def delete(removal: Removal) -> None:
    """Delete a sweep while holding its lease; Held if it was started meanwhile. A rerun continues an interrupted deletion."""
    sweep = removal.sweep
    with lease.hold(command_lease(sweep.folder), aside=True) as held:
        require_stopped(sweep, but=command_lease(sweep.folder))
        retention.delete(removal.unshared)
        manifests = [part for part in walk(sweep.folder) if MANIFEST in part.sizes]
        for _ in in_order(manifests, lambda part: part.folder.delete(MANIFEST)):
            pass  # first, so that a folder that is only partly deleted does not exist
        for name in sweep.folder.list():
            if name not in (RECIPE, sweep.leases.name):  # needed by a rerun, and by this block
                sweep.folder.delete(name)
    if held.held():
        sweep.folder.delete()


def require_stopped(sweep: Sweep, but: Folder | None = None) -> None:
    """Raise Held if any lease of the sweep except `but` is held."""
    leases = [sweep.lease(name) for name in sweep.leases.folders()] + [run.lease for run in sweep.all_runs()]
    for folder, holder in lease.live_holders(folder for folder in leases if folder != but).items():
        raise Held(f"{sweep} is running: process {holder} holds {folder}: to stop it, dis-scale stop {sweep}")


def _own(folder: Folder) -> list[Unneeded]:
    """Return the files of a sweep's folder, grouped by its sub-folders; files of the folder itself come last."""
    parts: dict[str, dict[str, int]] = {}
    for part in walk(folder):
        first, _, rest = part.folder.url.removeprefix(folder.url).strip("/").partition("/")
        parts.setdefault(first, {}).update({f"{rest}/{name}".strip("/"): size for name, size in part.sizes.items()})
    own = [Unneeded(name, folder / name, sizes) for name, sizes in sorted(parts.items()) if name]
    return [*own, Unneeded("sweep", folder, parts.get("", {}))]


def _unshared(sweep: Sweep) -> tuple[list[Unneeded], list[Note]]:
    """Return the latents and the listing that only this sweep uses, and a note for each that stays."""
    pointer = LatentsPointer.find_intact(sweep.folder)
    used = {"listing": listing.folder_of(sweep.store, sweep.recipe.data.declared)}
    used |= {"latents": sweep.store / pointer.folder} if pointer else {}
    used = {kind: folder for kind, folder in used.items() if folder.list()}
    try:
        unshared = [each for each in retention.find_unused(sweep.store, sweep.folder) if each.folder in used.values()]
    except UserError as error:
        return [], [Note("kept", f"{kind} {folder}, which others may use: {error}") for kind, folder in used.items()]
    gone = [each.folder for each in unshared]
    kept = {kind: folder for kind, folder in used.items() if folder not in gone}
    return unshared, [Note("kept", f"{kind} {folder}: other sweeps use it") for kind, folder in kept.items()]


def _begun_from(sweep: Sweep) -> list[Note]:
    """Return a note for each model of another sweep of this storage root that begins with weights of this one."""
    notes = []
    for folder in sweeps_below(sweep.store):
        with contextlib.suppress(StorageError, UserError):  # its recipe cannot be read
            for name, model in Sweep.open(folder.url).recipe.models.items():
                if isinstance(model.start, SweepStart) and open_folder(model.start.url) == sweep.folder:
                    notes.append(Note("needed", f"{model.start.words}: {name} of {folder} begins with it"))
    return notes
