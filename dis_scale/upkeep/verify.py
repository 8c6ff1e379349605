"""Read back everything that a sweep's results rest on, and name what is damaged or missing. Behind `dis-scale verify`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from dis_scale.process.errors import Damaged, StorageError, UserError
from dis_scale.process.progress import ReportShare
from dis_scale.process.threads import in_order
from dis_scale.recipe import TrainedVae
from dis_scale.storage import npy
from dis_scale.storage.folder import Folder
from dis_scale.storage.manifest import READING_THREADS, Manifest, read_verified
from dis_scale.sweep import PointName, Sweep, state
from dis_scale.sweep.contents import Stored, walk
from dis_scale.sweep.documents import LatentsManifest, LatentsPointer, PublishedManifest, StoredClassifier, TrackingIds


class Check(NamedTuple):
    """One file to read back; `cure` says what to do if `read` raises Damaged."""

    read: Callable[[], Any]
    cure: str


class Verified(NamedTuple):
    """Lines for damaged or missing files, each with its cure; and for files that storage refuses to read, which may be intact."""

    damaged: list[str]
    refused: list[str]


def verify_sweep(sweep: Sweep, report: ReportShare) -> Verified:
    """Return the damaged and the unreadable files; `report` gets the number of files read so far, and of all files.

    Reads latents, autoencoder, classifiers, reference statistics, resume points, published weights, kept samples and metrics.
    StorageError for a manifest that storage refuses to read, StorageAway if storage does not answer.
    """
    of_parts = in_order(_checks(sweep), lambda some: list(some()), READING_THREADS)
    checks, found = [check for some in of_parts for check in some], Verified([], [])
    for number, (damaged, refused) in enumerate(in_order(checks, _verified, READING_THREADS), 1):
        found.damaged.extend(damaged)
        found.refused.extend(refused)
        report(number, len(checks))
    return found


def _verified(check: Check) -> Verified:
    """Return what is wrong with a file: one line or none."""
    try:
        check.read()
    except (Damaged, UserError, FileNotFoundError) as error:
        return Verified([f"{error}; {check.cure}"], [])
    except StorageError as error:  # no damage: the cure would delete what may be good
        return Verified([], [str(error)])
    return Verified([], [])


_NEXT_RUN = "the next run that needs it makes it again"
_CURES = {
    "autoencoder": "restore it from a backup: the sweep's latents and distances rest on it",
    "classifier": "restore it from a backup: the sweep's latents and distances rest on it",
    "resume point": "training uses the resume point before it",
    "published": "restore them from a backup: only training makes them; a fork from an earlier resume point makes others",
    "reference": f"delete it: {_NEXT_RUN}",
    "evaluation": f"delete it: {_NEXT_RUN}, from the kept samples",
    "floor": f"delete it: {_NEXT_RUN}, from the kept samples",
}
_SAMPLES = "delete it: it is sampled again if a metric needs it"


def _checks(sweep: Sweep) -> Iterator[Callable[[], Iterator[Check]]]:
    """Yield for each part of a sweep a function that reads the part's manifest and yields the checks of its files.

    A damaged or missing manifest is itself a check that fails.
    """
    parts = walk(sweep.folder, behind_links=True)
    published = {part.model for part in parts if part.kind.name == "published" and part.exists}
    encoded = LatentsPointer.exists(sweep.folder) or bool(published)
    if encoded:
        yield partial(_latents, sweep)
    yield partial(_missing, sweep, parts, encoded=encoded)
    yield from (partial(_of_part, sweep, part) for part in parts)
    if TrackingIds.exists(sweep.folder):
        yield lambda: iter([Check(partial(TrackingIds.read, sweep.folder), f"delete it: {_NEXT_RUN}")])


def _of_part(sweep: Sweep, part: Stored) -> Iterator[Check]:
    if part.kind.name in ("evaluation", "floor") and part.exists and part.kind.document:
        yield Check(partial(part.kind.document.read, part.folder), _CURES[part.kind.name])
        yield from _npz_files(part, _SAMPLES)
    elif part.kind.name == "reference" and part.folder == sweep.references:
        yield from _npz_files(part, _CURES["reference"])
    elif part.kind.name in _CURES and part.exists:
        yield from _manifest_files(part, _cure(sweep, part))


def _cure(sweep: Sweep, part: Stored) -> str:
    point = PointName.parse(part.folder.name) if part.kind.name == "resume point" else None
    if point and part.model in sweep.recipe.models and point.images_seen in sweep.recipe.branches_at(part.model):
        return "restore it: branches begin there"
    return _CURES[part.kind.name]


def _missing(sweep: Sweep, parts: list[Stored], *, encoded: bool) -> Iterator[Check]:
    """Yield checks that fail for missing parts which other parts of the sweep show to have existed."""
    if encoded and isinstance(sweep.recipe.vae, TrainedVae) and not Manifest.exists(sweep.vae):
        yield Check(partial(Manifest.require, sweep.vae), _CURES["autoencoder"])
    if any(part.folder == sweep.references for part in parts):
        for name, _ in state.classifiers(sweep):
            if not StoredClassifier.exists(sweep.extractor(name)):
                yield Check(partial(StoredClassifier.require, sweep.extractor(name)), _CURES["classifier"])
    if any(part.kind.name == "evaluation" and part.exists for part in parts):
        yield Check(partial(_require_references, sweep), _NEXT_RUN)
    passed = state.missing_published(sweep)
    for model in sweep.recipe.models:
        expected = {*passed.get(model, ()), *state.evaluated_counts(sweep, model)}
        lost = expected - {*state.published_counts(sweep.run(model))}
        for count in sorted(lost):
            folder = sweep.run(model).published_at(count)
            yield Check(partial(PublishedManifest.require, folder), _CURES["published"])


def _latents(sweep: Sweep) -> Iterator[Check]:
    """Yield a check of each shard of the sweep's latents; one that fails if they cannot be found."""
    cure = f"delete it: {_NEXT_RUN}"
    try:
        pointer = LatentsPointer.read(sweep.folder)
        latents, cure = sweep.store / pointer.folder, f"restore it; otherwise {_NEXT_RUN}"
        manifest = LatentsManifest.require(latents)
        state.require_same_vae(latents, manifest.encoding.identity, pointer.vae)
    except FileNotFoundError:
        yield Check(partial(_fail, Damaged(f"{sweep}/{LatentsPointer.NAME}", "missing")), _NEXT_RUN)
        return
    except (Damaged, UserError) as error:
        yield Check(partial(_fail, error), cure)
        return
    for shard in manifest.shards:
        yield Check(partial(read_verified, latents, shard.name, shard.digest), f"repair: dis-scale data repair {sweep}")


def _manifest_files(part: Stored, cure: str) -> Iterator[Check]:
    """Yield a check of each file that a folder's manifest names."""
    assert part.kind.document is not None
    try:
        manifest = part.kind.document.read(part.folder)
    except (Damaged, FileNotFoundError) as error:
        if isinstance(error, Damaged) or part.kind.name != "resume point":  # pruned since it was listed, its manifest first
            yield Check(partial(_fail, error), cure)
        return
    assert isinstance(manifest, Manifest)
    for name in manifest.files:
        yield Check(partial(_read_unless_pruned, part, manifest, name), cure)


def _read_unless_pruned(part: Stored, manifest: Manifest, name: str) -> None:
    try:
        manifest.read_file(part.folder, name)
    except Damaged:
        if part.kind.name != "resume point" or manifest.exists(part.folder):
            raise


def _npz_files(part: Stored, cure: str) -> Iterator[Check]:
    for name in sorted(part.sizes):
        if name.endswith(".npz"):
            yield Check(partial(_read_npz, part.folder, name), cure)


def _fail(error: Exception) -> None:
    raise error


def _require_references(sweep: Sweep) -> None:
    """Raise Damaged if an extractor's statistics of the real images are missing. Lost classifiers have checks of their own."""
    try:
        missing = state.references_missing(sweep)
    except Damaged:
        return
    if missing:
        raise Damaged(sweep.references, f"the statistics under {', '.join(missing)} are missing")


def _read_npz(folder: Folder, name: str) -> None:
    npy.unsealed(folder.read(name), f"{folder}/{name}")
