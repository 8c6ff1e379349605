"""Read back everything that a sweep's results rest on, and name what is damaged or missing. Behind `dis-scale verify`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from dis_scale.evaluation import npz
from dis_scale.process.errors import DisScaleError, StorageAway, StorageError
from dis_scale.process.progress import ReportShare
from dis_scale.process.threads import in_order
from dis_scale.recipe import TrainedVae
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder
from dis_scale.sweep import LATENTS, METRICS, TRACKING, Sweep, state


class Check(NamedTuple):
    """One file to read back; `cure` says what to do if `read` raises StorageError."""

    read: Callable[[], Any]
    cure: str


def verify_sweep(sweep: Sweep, report: ReportShare) -> list[str]:
    """Return a line for each damaged or missing file, with its cure; `report` gets the files read so far, and their number.

    These are latents, autoencoder, classifiers, reference statistics, resume points, published weights, kept samples and metrics.
    """
    checks, damaged = list(_checks(sweep)), list[str]()
    for number, words in enumerate(in_order(checks, _damage, manifest.READING_THREADS), 1):
        damaged += words
        report(number, len(checks))
    return damaged


def _damage(check: Check) -> list[str]:
    """Return what is wrong with a file and the cure: one line or none."""
    try:
        check.read()
    except StorageAway:
        raise
    except (DisScaleError, FileNotFoundError) as error:
        return [f"{error}; {check.cure}"]
    return []


_LOST = "restore them from a backup: only training makes them; a fork from an earlier resume point makes others"
_NEXT_RUN = "the next run that needs it makes it again"
_TRAINED = "restore it from a backup: the sweep's latents and distances rest on it"


def _checks(sweep: Sweep) -> Iterator[Check]:
    """Yield a check of each file. Manifests are read here, and a damaged or missing one is itself a check that fails."""
    models = sweep.recipe.models
    evaluated = {model: state.evaluated_counts(sweep, model) for model in models}
    encoded = sweep.folder.exists(LATENTS) or any(state.published_counts(sweep.run(model)) for model in models)
    if encoded:
        yield from _latents(sweep)
    trains_vae = isinstance(sweep.recipe.vae, TrainedVae)
    yield from _files(sweep.vae, _TRAINED, expected=encoded and trains_vae)
    references = [name for name in sweep.references.list() if name.endswith(".npz")]
    made, needed = set(sweep.extractors.folders()), {name for name, _ in state.classifiers(sweep) if references}
    for name in sorted(made | needed):
        yield from _files(sweep.extractor(name), _TRAINED, expected=name in needed)
    if any(evaluated.values()):
        yield Check(partial(_require_references, sweep), _NEXT_RUN)
    for name in references:
        yield Check(partial(_read_npz, sweep.references, name), f"delete it: {_NEXT_RUN}")
    missing = state.missing_published(sweep)
    for model in models:
        run = sweep.run(model)
        for point in state.point_names(run):
            branches = point.images_seen in sweep.recipe.branches_at(model)
            cure = "restore it: branches begin there" if branches else "training uses the resume point before it"
            yield from _files(run.resume_point(point), cure)
        for count in sorted({*state.published_counts(run), *missing.get(model, ()), *evaluated[model]}):
            yield from _files(run.published_at(count), _LOST, expected=True)
        for sampled in state.measured(sweep, model):
            yield from _evaluation(sweep.evaluation(sampled))
    if sweep.floor.exists(METRICS):
        yield from _evaluation(sweep.floor)
    if sweep.folder.exists(TRACKING):
        yield Check(partial(sweep.folder.read_json, TRACKING), f"delete it: {_NEXT_RUN}")


def _latents(sweep: Sweep) -> Iterator[Check]:
    """Yield a check of each shard of the sweep's latents; one that fails if they cannot be found."""
    cure = f"delete it: {_NEXT_RUN}"
    try:
        pointer = sweep.folder.read_json(LATENTS, "folder", "vae")
        latents, cure = sweep.store / pointer["folder"], f"restore it; otherwise {_NEXT_RUN}"
        contents = manifest.require(latents, "shards", "vae")
        state.require_same_vae(latents, contents["vae"], pointer["vae"])
    except StorageAway:
        raise
    except FileNotFoundError:
        yield Check(partial(_fail, StorageError(f"{sweep}/{LATENTS} is missing")), _NEXT_RUN)
        return
    except DisScaleError as error:
        yield Check(partial(_fail, error), cure)
        return
    for shard in contents["shards"]:
        yield Check(partial(manifest.verified, latents, shard["name"], shard), f"repair: dis-scale data repair {sweep}")


def _files(folder: Folder, cure: str, expected: bool = False) -> Iterator[Check]:
    """Yield a check of each file in a complete folder; none for an incomplete one, which does not exist, if none is `expected`."""
    try:
        if manifest.find(folder) is None and not expected:
            return
        contents = manifest.require(folder, "files")
    except StorageAway:
        raise
    except StorageError as error:
        yield Check(partial(_fail, error), cure)
        return
    for name in contents["files"]:
        yield Check(partial(manifest.read, folder, name, contents), cure)


def _fail(error: Exception) -> None:
    raise error


def _evaluation(folder: Folder) -> Iterator[Check]:
    yield Check(partial(state.read_metrics, folder), f"delete it: {_NEXT_RUN}, from the kept samples")
    for name in folder.list():
        if name.endswith(".npz"):
            yield Check(partial(_read_npz, folder, name), "delete it: it is sampled again if a metric needs it")


def _require_references(sweep: Sweep) -> None:
    """StorageError if the statistics of the real images are missing under an extractor."""
    if missing := state.references_missing(sweep):
        raise StorageError(f"{sweep.references}: the statistics under {', '.join(missing)} are missing")


def _read_npz(folder: Folder, name: str) -> None:
    npz.from_bytes(folder.read(name), f"{folder}/{name}")
