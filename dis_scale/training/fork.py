"""Starts a new run from another run's resume point; rolling back is a fork from an earlier point.

The sweep's stored recipe gains the model under the new name. The original run stays as it is.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from dis_scale.process.errors import Damaged, UserError
from dis_scale.recipe import Model
from dis_scale.recipe.reading import with_model
from dis_scale.storage import lease
from dis_scale.storage.folder import Folder
from dis_scale.storage.lease import Lease
from dis_scale.sweep import COPIED, PointName, Run, Sweep, command_lease, state
from dis_scale.sweep.documents import Origin, PublishedManifest, ResumePointManifest


def fork_run(sweep: Sweep, model: str, images_seen: int, new: str, settings: Sequence[str] = ()) -> Run:
    """Start the run `new` of a sweep at the resume point where `model` had seen `images_seen` images; return the run.

    `settings` (`a=value`) change its training from there on. Published weights up to there are copied, except damaged ones. A
    rerun completes an interrupted fork. Raises UserError if the fork is not possible. Raises Held while a command runs the sweep,
    since the fork changes the sweep's recipe.
    """
    with lease.hold(command_lease(sweep.folder), aside=True) as held:
        # opened under the lease, since another fork may have changed the recipe meanwhile
        return _fork(Sweep.open(sweep.folder.url), model, images_seen, new, settings, held)


def _fork(sweep: Sweep, model: str, images_seen: int, new: str, settings: Sequence[str], held: Lease) -> Run:
    run, name = sweep.run(model), state.point_at(sweep.run(model), images_seen)
    origin = Origin(model=model, images=images_seen, resume_point=str(name or ""))
    grown = replace(sweep, recipe=with_model(sweep.recipe, new, _outside_studies(sweep.recipe.models[model]), settings))
    if new in sweep.recipe.models and grown.recipe.models[new] != sweep.recipe.models[new]:
        raise UserError(f"--as {new}: this sweep has a model of that name, with other settings: choose another name")
    target = grown.run(new)
    _require_free(sweep, target, origin, new)
    copied = target.resume_point(PointName(images_seen, COPIED))  # copied last
    if not ResumePointManifest.exists(copied):
        if name is None:
            raise _no_point(run, model, images_seen)
        _require_possible(sweep, grown, model, images_seen, new)
        manifest = ResumePointManifest.require(point := run.resume_point(name))
        manifest.read_files(point)  # raises on damage before anything is written; keeps no data, which may exceed memory
        origin.write(target.folder)
        for count in [n for n in state.published_counts(run) if n <= images_seen]:
            published = run.published_at(count)
            try:
                _copy(PublishedManifest.require(published), published, target.published_at(count), new, held)
            except Damaged as error:
                logging.getLogger(__name__).warning("%s; %s continues without it", error, new)
        _copy(manifest, point, copied, new, held)
    held.require_held()
    grown.save_recipe()
    return target


def _outside_studies(model: Model) -> Model:
    """Return the model without its branch's study budget: a fork is trained differently, so it belongs to no study."""
    branch = model.branch and model.branch.model_copy(update={"budget": None})
    return model.model_copy(update={"branch": branch})


def _require_possible(sweep: Sweep, grown: Sweep, model: str, images_seen: int, new: str) -> None:
    """Raise UserError if the fork's settings do not fit its beginning, or the weights that `model` has published."""
    settings = grown.recipe.train_of(new)
    if images_seen % settings.batch_images:
        raise UserError(f"--at {images_seen}: not a multiple of the new run's batch_images {settings.batch_images}")
    published = set(state.published_counts(sweep.run(model)))
    passed = [n for n in settings.publish_images if n <= images_seen and n not in published]
    if passed:
        raise UserError(
            f"publish_images: {passed[0]} is not after {images_seen}, where the new run begins, and {model} has not published it"
        )
    if images_seen >= settings.images:
        raise UserError(
            f"--at {images_seen}: the new run would end at {settings.images} images, before it has trained: publish later ones"
        )


def _require_free(sweep: Sweep, target: Run, origin: Origin, new: str) -> None:
    """Raise UserError if the name is in use, except by the same untrained fork. Delete another untrained one outside the recipe."""
    begun = Origin.find_intact(target.folder)
    if begun and not target.lease.list():
        if (begun.model, begun.images) == (origin.model, origin.images):
            return
        if new not in sweep.recipe.models:
            target.folder.delete()
    if new in sweep.recipe.models or target.folder.list():
        raise UserError(f"--as {new}: this sweep has a run of that name: choose another name")


def _no_point(run: Run, model: str, images_seen: int) -> UserError:
    """Return the error of a missing resume point, which names the counts that exist."""
    complete = state.complete_points(run, state.point_names(run))
    counts = ", ".join(str(n) for n in sorted({name.images_seen for name in complete})) or "none"
    return UserError(
        f"--at {images_seen}: {model} has no resume point there; it has {counts} (train.keep_resume and "
        "train.keep_spaced set how many stay)"
    )


def _copy(manifest: ResumePointManifest | PublishedManifest, source: Folder, target: Folder, model: str, held: Lease) -> None:
    """Copy files, then their manifest, changed to name the new run's model. Do nothing if the manifest exists already."""
    if manifest.exists(target):
        return
    for name in manifest.files:
        target.write(name, manifest.read_file(source, name))
    progress = manifest.progress and manifest.progress.model_copy(update={"model": model})
    held.require_held()
    manifest.changed(progress=progress, below=None).write(target)
