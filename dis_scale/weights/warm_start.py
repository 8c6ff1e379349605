"""Warm start: a training that begins at 0 images with weights from a file or from another sweep (`models.<name>.start`).

Weights that depend on the number of pixels or classes are fitted; all else must be equal. Moments are new, and averages begin at
these weights. Attempts read the weights until the first resume point is complete. Read next: export.py, training/loop.py.
"""

import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dis_scale import vae
from dis_scale.models import check_finite, construct
from dis_scale.models.settings import FamilySettings
from dis_scale.models.tokens import Backbone
from dis_scale.process.errors import UserError
from dis_scale.recipe import FileStart, Flow, Gaussian, LatentShape, Recipe, SweepStart
from dis_scale.storage.programs import read_programs
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.documents import EncodedBy, LatentsManifest
from dis_scale.vae import Vae
from dis_scale.vae.scaling import Scaling
from dis_scale.weights.export import SamplingFacts, open_checkpoint, sampling_facts, trained_for
from dis_scale.weights.published import load_published


class StartWeights(NamedTuple):
    """Weights by our names, the settings of their model, and lines on other differences from the recipe."""

    settings: FamilySettings
    weights: dict[str, Tensor]
    process: Gaussian | Flow
    """Process that they were trained for."""
    notes: list[str]
    facts: SamplingFacts | None = None
    """Facts of the file, if it has them, or of the sweep, if it has its latents."""


def load_into(model: Backbone, sweep: Sweep, name: str, log: Callable[[str], None]) -> None:
    """Copy the start's weights, read on rank 0, into a model on the CPU of every rank. Collective."""
    if dist.get_rank() == 0:
        start = sweep.recipe.models[name].start
        fitted = fit(read_source(sweep.recipe, name), model, f"models.{name}.start")
        model.load_state_dict(fitted.weights)
        check_finite(model)
        difference = latents_difference(fitted.facts, sweep) if fitted.facts else ""
        notes = [*fitted.notes, f"warning: trained on {difference}"] if difference else fitted.notes
        for line in (f"begins with the weights of {start and start.words}", *notes):
            log(f"{name}: {line}")
    hosts = dist.new_group(backend="gloo")
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), 0, group=hosts)


def require_fits(recipe: Recipe, names: Collection[str], shape: LatentShape) -> None:
    """Read the starts of these models, if any, and compare them with the models; UserError for one that does not fit."""
    for start in filter(None, dict.fromkeys(recipe.models[name].start for name in names)):
        same = [name for name in names if recipe.models[name].start == start]
        source = read_source(recipe, same[0])  # one at a time: the largest have gigabytes
        for name in same:
            with torch.device("meta"):
                model = construct(recipe.models[name], shape, recipe.data.num_classes)
            fit(source, model, f"models.{name}.start")


def read_source(recipe: Recipe, name: str) -> StartWeights:
    """Return the source of a model's start; UserError if it is missing or damaged."""
    settings, where = recipe.models[name], f"models.{name}.start"
    match settings.start:
        case FileStart() as start:
            return from_file(start, settings, recipe.diffusion, f"{where}.path")
        case SweepStart() as start:
            return _from_sweep(start, recipe, where)
        case _:
            raise ValueError(f"{name} has no start")


def from_file(start: FileStart, settings: FamilySettings, process: Gaussian | Flow, where: str) -> StartWeights:
    """Return the weights of a file for a model of these settings and process.

    Raises UserError if the file cannot be read, if its model predicts velocities and the process is no flow, or if it predicts
    another quantity of the same kind of process.
    """
    (data,) = read_programs([start.path], start.sha256, where)
    with tempfile.TemporaryDirectory() as folder:
        name = start.path.partition("?")[0] if "://" in start.path else start.path
        file = Path(folder) / f"weights{Path(name).suffix}"
        file.write_bytes(data)
        try:
            model = open_checkpoint(file, settings.heads_in_file)
            facts = sampling_facts(file)
        except UserError as error:
            raise UserError(f"{where}: {start.path}: {str(error).replace(str(file), 'the file')}") from error
    if model.process == "flow" and process.kind != "flow":
        raise UserError(
            f"{where}: {start.path} holds a {type(model).__name__}, which predicts velocities: expected diffusion.kind flow"
        )
    theirs = trained_for(model, facts)
    _require_prediction(theirs, process, f"{where}: {start.path}")
    return StartWeights(model.settings, model.as_ours().state_dict(), theirs, _other_process(theirs, process), facts)


def _other_process(theirs: Gaussian | Flow, ours: Gaussian | Flow) -> list[str]:
    return [] if theirs == ours else [f"warning: trained with another diffusion than this recipe's: {in_words(theirs)}"]


def in_words(process: Gaussian | Flow) -> str:
    """Return a process as written in a recipe."""
    return f"{{{', '.join(f'{name}: {value}' for name, value in process)}}}"


def _require_prediction(theirs: Gaussian | Flow, ours: Gaussian | Flow, where: str) -> None:
    """Raise UserError if both processes are of one kind, and the models predict different quantities."""
    if theirs.kind == ours.kind and theirs.prediction != ours.prediction:
        raise UserError(f"{where} predicts the {theirs.prediction}: set diffusion.predicts to it, got {ours.prediction}")


def latents_difference(theirs: SamplingFacts, sweep: Sweep) -> str:
    """Return in words how the latents that weights were trained on differ from the sweep's; empty if they do not.

    A sweep without latents is compared by its recipe, which lacks the numbers of a scaling by channel.
    """
    latents, normalise = state.find_latents(sweep.folder), sweep.recipe.data.normalise
    their_vae = f"latents of autoencoder {theirs.vae.identity[:12]}"
    if latents is None and state.vae_missing(sweep):
        return f"{their_vae}, this sweep's is still to be trained"
    manifest = LatentsManifest.require(latents) if latents else None
    ours: EncodedBy | Vae = manifest.encoding if manifest else vae.load(sweep)
    if ours.identity != theirs.vae.identity:
        return f"{their_vae}, this sweep's is {ours.identity[:12]}"
    if (theirs.scaling is None) != (normalise == "vae"):
        return f"latents that were scaled otherwise than by data.normalise {normalise}"
    scaling = theirs.scales_by
    own = Scaling(ours.shift, ours.scale) if manifest is None else Scaling.of(manifest, normalise)
    if (manifest or normalise == "vae") and not scaling.is_close(own):
        return f"latents with shift {scaling.shift} and scale {scaling.scale}, this sweep's have {own.shift} and {own.scale}"
    return ""


def _from_sweep(start: SweepStart, recipe: Recipe, where: str) -> StartWeights:
    sweep = Sweep.open(start.url)
    run = sweep.run(start.model)
    try:
        state.published_at(sweep, start.model, start.images)
    except UserError as error:
        raise UserError(f"{where}.images: {error}") from None
    its = sweep.recipe
    _require_prediction(its.diffusion, recipe.diffusion, f"{where}: {start.model} of {sweep}")
    notes = _other_process(its.diffusion, recipe.diffusion)
    if its.data.source != recipe.data.source:
        notes.append("warning: trained on other images than this recipe's, whose classes may be others")
    weights = load_published(run, start.images)
    return StartWeights(its.models[start.model], weights, its.diffusion, notes, SamplingFacts.of_sweep(sweep))


def fit(source: StartWeights, model: Backbone, where: str) -> StartWeights:
    """Return the source with weights in the shapes of `model`, and a note on each weight that was changed.

    Learned positions of another number of patches are interpolated (bicubic with antialiasing, as `timm` does); fixed ones are no
    weights. A table of another number of classes is replaced by the model's own. Raises UserError for any other difference.
    """
    theirs, ours = source.settings.sizes, model.settings.sizes
    for key in sorted((theirs.keys() | ours.keys()) - model.settings.only_initial, key=lambda key: (key != "kind", key)):
        if theirs.get(key) != ours.get(key):
            raise UserError(f"{where}: its model has {key} {theirs.get(key)}, this one {ours.get(key)}: expected the same")
    own, weights, notes = model.state_dict(), dict(source.weights), list(source.notes)
    if different := sorted(own.keys() ^ weights.keys()):
        raise UserError(f"{where}: only one of the two models has classes, or weights are missing: {', '.join(different[:3])}")
    for name, weight in own.items():
        if weights[name].shape == weight.shape:
            continue
        rows = len(weights[name]) - 1
        if name == "label.weight":
            notes.append(f"new table of {model.num_classes} classes instead of {rows}")
            weights[name] = weight
        elif resized := model.resized(name, weights[name]):
            weights[name], note = resized
            notes.append(note)
        else:
            shapes = f"shape {tuple(weights[name].shape)}, this model's has {tuple(weight.shape)}"
            raise UserError(f"{where}: {name} has {shapes}: expected latents of as many channels")
    return source._replace(weights=weights, notes=notes)
