"""Read back everything that a sweep's results rest on, and name what is damaged or missing. Behind `dis-scale verify`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from dis_scale.errors import StorageAway, StorageError
from dis_scale.evaluation import npz
from dis_scale.progress import ReportShare
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder
from dis_scale.sweep import METRICS, TRACKING, Sweep, state
from dis_scale.threads import in_order


class Check(NamedTuple):
    """One file to read back; `cure` says what to do if `read` raises StorageError."""

    read: Callable[[], Any]
    cure: str


def verify_sweep(sweep: Sweep, report: ReportShare) -> list[str]:
    """Return a line for each damaged or missing file, with its cure; `report` gets the files read so far, and their number.

    These are latents, autoencoder, classifiers, reference statistics, resume points, published weights, kept samples and metrics.
    """
    damaged = [
        f"{sweep.run(model).published_at(n)}: published weights are missing; {_LOST}"
        for model, counts in state.missing_published(sweep).items()
        for n in counts
    ]
    checks = list(_checks(sweep))
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
    except (StorageError, FileNotFoundError) as error:
        return [f"{error}; {check.cure}"]
    return []


_LOST = "restore them from a backup: only training makes them; a fork from an earlier resume point makes others"
_NEXT_RUN = "the next run of the sweep makes it again"
_TRAINED = "restore it from a backup: the sweep's latents and distances rest on it"


def _checks(sweep: Sweep) -> Iterator[Check]:
    """Yield a check of each file. Manifests are read here, and a damaged one is itself a check that fails."""
    latents = state.find_latents(sweep.folder)
    if latents:
        for shard in manifest.require(latents)["shards"]:
            yield Check(
                partial(manifest.verified, latents, shard["name"], shard), f"repair: dis-scale data repair {sweep}"
            )
    made = [sweep.vae, *(sweep.extractor(name) for name in sweep.extractors.folders())]
    for folder in made:
        yield from _files(folder, _TRAINED)
    for name in sweep.references.list():
        if name.endswith(".npz"):
            yield Check(partial(_read_npz, sweep.references, name), f"delete it: {_NEXT_RUN}")
    for model in sweep.recipe.models:
        run = sweep.run(model)
        for point in state.point_names(run):
            yield from _files(run.resume_point(point), "training uses the resume point before it")
        for count in state.published_counts(run):
            yield from _files(run.published_at(count), _LOST)
        for sampled in state.measured(sweep, model):
            yield from _evaluation(sweep.evaluation(sampled))
    if sweep.folder.exists(TRACKING):
        yield Check(partial(sweep.folder.read_json, TRACKING), f"delete it: {_NEXT_RUN}")


def _files(folder: Folder, cure: str) -> Iterator[Check]:
    """Yield a check of each file in a complete folder; none for an incomplete one, which does not exist."""
    try:
        contents = manifest.find(folder)
    except StorageAway:
        raise
    except StorageError:
        yield Check(partial(manifest.require, folder), cure)
        return
    if contents:
        for name in contents["files"]:
            yield Check(partial(manifest.read, folder, name, contents), cure)


def _evaluation(folder: Folder) -> Iterator[Check]:
    yield Check(partial(folder.read_json, METRICS), f"delete it: {_NEXT_RUN}, from the kept samples")
    for name in folder.list():
        if name.endswith(".npz"):
            yield Check(partial(_read_npz, folder, name), "delete it: it is sampled again if a metric needs it")


def _read_npz(folder: Folder, name: str) -> None:
    npz.from_bytes(folder.read(name), f"{folder}/{name}")
