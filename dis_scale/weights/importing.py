"""Public weights of DiS, DiT or SiT as a published checkpoint of a sweep, to be sampled, evaluated, or trained from.

Read next: models/public.py for the layouts, warm_start.py for a training that begins with such a file.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import safetensors.torch
import torch

from dis_scale.models import construct
from dis_scale.process.errors import UserError
from dis_scale.process.settings import require_no_credentials
from dis_scale.recipe import FileStart, LatentShape
from dis_scale.storage import lease
from dis_scale.storage.folder import Folder
from dis_scale.storage.manifest import Digest
from dis_scale.storage.programs import hash_of
from dis_scale.sweep import RECIPE, Sampled, Sweep, command_lease, state
from dis_scale.sweep.documents import WEIGHTS_FILE, ImportedFrom, PublishedManifest, file_of
from dis_scale.weights.export import SamplingFacts, describe
from dis_scale.weights.warm_start import fit, from_file, in_words, latents_difference


class Imported(NamedTuple):
    """A published checkpoint that was imported."""

    folder: Folder
    images_seen: int
    parameters: int
    notes: Sequence[str]
    """Lines on differences from the recipe."""


def import_weights(sweep: Sweep, model: str, path: str, shape: LatentShape) -> Imported:
    """Publish the weights of a file as the only count of one of the sweep's models; a rerun changes nothing.

    The model's training counts as done, so that a run of the sweep evaluates it. UserError if the file holds another model, or one
    for other pixels, classes or latents; Held if the sweep runs.
    """
    _require_possible(sweep, model)
    require_no_credentials(path, "import")
    settings, train = sweep.recipe.models[model], sweep.recipe.train_of(model)
    start = FileStart(kind="file", path=path, sha256=hash_of([path], "import"))
    source = from_file(start, settings, sweep.recipe.diffusion, "import")
    theirs, ours = source.process, sweep.recipe.diffusion
    if theirs.kind != ours.kind or (theirs.kind == "gaussian" and theirs != ours):  # a flow's samplers take any times
        raise UserError(f"import of {path} as {model}: trained with another process: expected diffusion: {in_words(theirs)}")
    with torch.device("meta"):
        empty = construct(settings, shape, sweep.recipe.data.num_classes)
    fitted = fit(source, empty, f"import of {path} as {model}")
    if changed := fitted.notes[len(source.notes) :]:
        raise UserError(f"import of {path} as {model}: {changed[0]}: expected weights for as many pixels and classes")
    if source.facts is None and sweep.recipe.data.normalise != "vae":
        raise UserError(
            f"import of {path} as {model}: the file does not tell by which factors its latents were scaled: expected "
            "data.normalise: vae, the autoencoder's own"
        )
    if source.facts and (difference := latents_difference(source.facts, sweep)):
        raise UserError(
            f"import of {path} as {model}: trained on {difference}: expected a recipe with the latents that these weights were "
            "trained on; an autoencoder that the sweep trains must be prepared before"
        )
    facts = SamplingFacts.of_sweep(sweep)
    if source.facts and not source.facts.label_dropout:
        if any(each.scale != 1 and each.guide is None for each in sweep.recipe.evaluate.samplings.values()):
            raise UserError(
                f"import of {path} as {model}: it did not learn to do without labels: expected evaluate.guidance: 1, or a model "
                "that guides"
            )
        facts = facts and replace(facts, label_dropout=0.0)
    description = describe(empty, facts)
    data = safetensors.torch.save(fitted.weights, {"dis_scale": json.dumps(description)})
    folder, evaluation = sweep.run(model).published_at(train.images), sweep.evaluation(Sampled(model, train.images))
    with lease.hold(command_lease(sweep.folder), aside=True):
        if not sweep.folder.exists(RECIPE):
            sweep.save_recipe()
        _publish(folder, data, train.images, ImportedFrom(name=path.rpartition("/")[2], sha256=start.sha256), evaluation)
    return Imported(folder, train.images, sum(each.numel() for each in fitted.weights.values()), source.notes)


def _require_possible(sweep: Sweep, model: str) -> None:
    run, recipe = sweep.run(model), sweep.recipe  # refuses an unknown model
    if different := sweep.differences():
        raise UserError(f"import: {sweep} was begun with another recipe: {different[0]}; give this one another name")
    counts = recipe.train_of(model).publish_images
    if len(counts) != 1 or not counts[0] or recipe.models[model].branch or recipe.models[model].start:
        raise UserError(
            f"import: {model} would also be trained: expected a model without branch and start, and one count of images"
        )
    if any(settings.ema_width is not None for settings in recipe.evaluate.samplings.values()):
        raise UserError("import: evaluate.ema_width needs averages that a file of weights lacks: leave it out")
    if state.point_names(run):
        raise UserError(f"import: {model} was trained in {sweep}: choose another model, or another name for the sweep")


def _publish(folder: Folder, data: bytes, images_seen: int, origin: ImportedFrom, evaluation: Folder) -> None:
    known = PublishedManifest.find(folder)
    if known and known.imported != origin:
        raise UserError(
            f"import: {folder} already holds other weights: choose another model, or delete the folder and that of its evaluation, "
            f"{evaluation}"
        )
    if known is None and evaluation.list(incomplete=True):
        raise UserError(f"import: {evaluation} is the evaluation of weights that are no more there: delete it, too")
    if known is None:
        name = file_of(WEIGHTS_FILE, attempt=0)
        folder.write(name, data)
        PublishedManifest(files={name: Digest.of(data)}, images=images_seen, imported=origin).create(folder)
