"""Pictures from one checkpoint, for `dis-scale sample`: a sweep's published weights, an exported file, or a public `.pt`.

Noise is a function of the seed and the sample's number, so the batch size does not change the pictures.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dis_scale import diffusion, vae
from dis_scale.data.encode import tf32
from dis_scale.diffusion.generate import batch_sizes, generate
from dis_scale.diffusion.guidance import forward_images
from dis_scale.diffusion.samplers import Progress
from dis_scale.models import verify_kernels
from dis_scale.models.replay import replayed
from dis_scale.models.tokens import Backbone, check_labels
from dis_scale.process import seeds
from dis_scale.process.errors import UserError, lines_of
from dis_scale.recipe import Flow, Gaussian, Recipe, Sampling, TrainedVae
from dis_scale.recipe.evaluate import Autoguidance
from dis_scale.storage.manifest import Manifest
from dis_scale.sweep import Sweep, state
from dis_scale.vae import Vae
from dis_scale.weights.checkpoints import Located, class_names, find_checkpoint
from dis_scale.weights.export import SamplingFacts, open_checkpoint, sampling_facts, trained_for

NOTHING_GUIDES = "guide: at guidance 1 nothing guides: give a scale of guidance, such as 2"
BESIDE = "vae"
"""Folder beside a copied file of weights, with the autoencoder of its latents."""


@dataclass(frozen=True)
class OpenCheckpoint:
    """A model, the process that it was trained for, and the decoder of its latents."""

    model: Backbone
    process: Gaussian | Flow
    decoder: Vae
    sampling: Sampling
    """Sampling settings of its sweep, otherwise of its file, otherwise of the papers."""
    notes: list[str]
    """Lines on assumptions and differences."""
    recipe: Recipe | None
    """Recipe of its sweep; None outside a sweep."""
    encoder: str
    """Identity of the autoencoder of its latents; the decoder may be another one."""
    located: Located
    guide_at: str | Path | None = None
    """Path of the model that guides it, in place of the model without labels; opened where it is used."""
    class_names: tuple[str, ...] = ()
    """Names of the classes by label; empty without names."""
    facts: SamplingFacts | None = None
    """Known facts about its training; None for a public file outside a sweep."""

    @cached_property
    def guide(self) -> Backbone | None:
        """The model that guides it; UserError if it is missing, or has other latents, classes, process or prediction."""
        if self.guide_at is None:
            return None
        try:
            return _opened_guide(self.guide_at, self)
        except UserError as error:
            raise UserError(f"{error}; it guides the samples: guidance 1 samples without") from error

    def sampling_with(
        self,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_channels: int | None = None,
    ) -> Sampling:
        """Return its sampling settings, changed by the arguments that are not None.

        `guidance` is the scale, with or without a guiding model. UserError for invalid values, and for a scale that does not fit.
        """
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise UserError(f"steps: got {steps!r}, expected a whole number from 1 on")
        if guidance is not None and (not isinstance(guidance, int | float) or not 0 <= guidance < math.inf):
            raise UserError(f"guidance: got {guidance!r}, expected a number from 0 on")
        changes = {"sampler": sampler, "steps": steps, "guidance": guidance, "guidance_channels": guidance_channels}
        sampling = self.sampling.model_copy(update={name: value for name, value in changes.items() if value is not None})
        if self.guide_at is not None and guidance is None and sampling.scale == 1:
            raise UserError(NOTHING_GUIDES)
        if self.guide_at is None and self.recipe and (refusal := self.recipe.guidance_refusal(sampling.guidance)):
            raise UserError(f"--guidance: {refusal}")
        if self.guide_at is None and sampling.scale != 1 and self.facts and self.facts.label_dropout == 0:
            raise UserError(
                f"--guidance: got {sampling.scale:g}, expected 1: the model did not learn to do without labels: set it to 1, or "
                "name another model that guides it"
            )
        return sampling


def open_for_sampling(
    at: str | Path | Located, vae_path: str | None, heads: int | None = None, guide_at: str | Path | None = None
) -> OpenCheckpoint:
    """Open the model at a path or URL. Outside a sweep, it needs `vae_path`, unless its latents are pixels.

    The process and the scaling of latents come from the file. If it has none, they come from its sweep, otherwise
    they are assumed. `guide_at` is the path of a worse model that guides, by default the one of the sweep's own guidance. Raises
    UserError if the sweep's VAE did not encode the latents. Another VAE at `vae_path` only adds a note.
    """
    located = at if isinstance(at, Located) else find_checkpoint(str(at))
    with located.fetched() as file:
        model, in_file = open_checkpoint(file, heads), sampling_facts(file)
    sweep = located.sweep
    facts = in_file or (SamplingFacts.of_sweep(sweep) if sweep else None)
    process, decoder = _process_of(model, facts, sweep), _decoder(located, vae_path, facts)
    notes = _vae_notes(located, model, decoder, vae_path, facts)
    if facts:
        decoder = replace(decoder, normalised=facts.scaling)
    elif sweep:
        decoder = vae.for_samples(sweep, decoder)
    else:
        notes.append(_assumed(model, process, decoder))
    if sweep:
        notes += _averages(sweep)
    sampling = _sampling_of(process, facts, sweep)
    guide = sampling.guide
    if guide and sweep and guide_at is None:
        guide_at = sweep.run(guide.by).published_at(guide.images).url
    if guide and guide_at is None:
        notes.append(f"unguided its sweep guides it by {guide.by} at {guide.images:,} images: give that model to guide")
    scale = sampling.scale if guide_at is not None or not isinstance(sampling.guidance, Autoguidance) else 1.0
    sampling = sampling.model_copy(update={"guidance": scale})
    names = (class_names(sweep) if sweep else ()) or (facts.label_names if facts else ())
    encoder, recipe = facts.vae.identity if facts else decoder.identity, sweep.recipe if sweep else None
    return OpenCheckpoint(model, process, decoder, sampling, notes, recipe, encoder, located, guide_at, names, facts)


def _vae_notes(located: Located, model: Backbone, decoder: Vae, vae_path: str | None, facts: SamplingFacts | None) -> list[str]:
    """Return a line if the VAE at `vae_path` did not encode the latents; UserError if it does not fit, or a sweep's did not."""
    if vae_path is not None:
        _require_fit(model, decoder, vae_path)
    if facts is None or facts.vae.identity == decoder.identity:
        return []
    if vae_path is None:
        state.require_same_vae(located.folder / located.name, facts.vae.identity, decoder.identity)
    return [
        f"vae      {vae_path} did not encode the model's latents: its identity is {decoder.identity[:12]}, "
        f"theirs is {facts.vae.identity[:12]}"
    ]


def _assumed(model: Backbone, process: Gaussian | Flow, decoder: Vae) -> str:
    """Return the line on the assumptions about a public file."""
    if process.kind == "flow":
        how = f"linear flow: its variance is zero, as in {type(model).__name__}"
    else:
        how = f"gaussian process, {process.betas} betas, {process.steps} steps"
    return f"assumed  {how}; latents by scale {decoder.scale} and shift {decoder.shift}: the file does not tell"


def _sampling_of(process: Gaussian | Flow, facts: SamplingFacts | None, sweep: Sweep | None) -> Sampling:
    """Return the sampling settings of the sweep, otherwise of the file, otherwise of the papers."""
    if sweep:
        return sweep.recipe.evaluate.sampling
    if facts:
        return facts.sampling
    return Sampling(sampler="euler_maruyama" if process.kind == "flow" else "ddpm", steps=250)


def _averages(sweep: Sweep) -> list[str]:
    """Return a line if the sweep's own samples are of other averages than its published weights."""
    width = sweep.recipe.evaluate.ema_width
    return [] if width is None else [f"average  its sweep measures the average of width {width:g}: this is the exponential one"]


def has_sweeps_vae(located: Located) -> bool:
    """Return whether a sweep trained the checkpoint's VAE: its own sweep, or one that stored the VAE beside the weights."""
    if located.sweep:
        return isinstance(located.sweep.recipe.vae, TrainedVae)
    return Manifest.exists(located.folder / BESIDE)


def _process_of(model: Backbone, facts: SamplingFacts | None, sweep: Sweep | None) -> Gaussian | Flow:
    """Return the process that a model was trained for, by its facts, else by its sweep, else as published."""
    return sweep.recipe.diffusion if sweep and not facts else trained_for(model, facts)


def _opened_guide(at: str | Path, guided: OpenCheckpoint) -> Backbone:
    """Open a model that guides another one; UserError unless it has the same latents, classes, process and prediction."""
    located, model = find_checkpoint(str(at)), guided.model
    with located.fetched() as file:
        guide, facts = open_checkpoint(file), sampling_facts(file)
    if (guide.shape, guide.num_classes) != (model.shape, model.num_classes):
        raise UserError(
            f"{located} cannot guide: it has latents {guide.shape} and {guide.num_classes} classes, expected {model.shape} "
            f"and {model.num_classes}"
        )
    facts = facts or (SamplingFacts.of_sweep(located.sweep) if located.sweep else None)
    theirs, ours = _process_of(guide, facts, located.sweep), guided.process
    if (theirs.kind, theirs.prediction) != (ours.kind, ours.prediction):
        raise UserError(
            f"{located} cannot guide: it predicts the {theirs.prediction} of a {theirs.kind} process, expected the "
            f"{ours.prediction} of a {ours.kind} process"
        )
    if isinstance(theirs, Gaussian) and isinstance(ours, Gaussian) and (theirs.betas, theirs.steps) != (ours.betas, ours.steps):
        raise UserError(
            f"{located} cannot guide: its process has {theirs.betas} betas and {theirs.steps} steps, "
            f"expected {ours.betas} betas and {ours.steps} steps"
        )
    if facts and facts.vae.identity != guided.encoder:
        raise UserError(f"{located} cannot guide: its latents are of another autoencoder")
    if facts and guided.facts:
        _require_alike(located, facts, guided.facts)
    return guide


def _require_alike(located: Located, theirs: SamplingFacts, ours: SamplingFacts) -> None:
    """Raise UserError unless a guide's latents have the model's scaling, and its classes the same names in the same order."""
    if not theirs.scales_by.is_close(ours.scales_by):
        raise UserError(f"{located} cannot guide: its latents are scaled by {theirs.scales_by}, expected {ours.scales_by}")
    differ = [names for names in zip(theirs.label_names, ours.label_names, strict=False) if names[0] != names[1]]
    if differ:
        raise UserError(f"{located} cannot guide: it has a class {differ[0][0]!r} in the place of {differ[0][1]!r}")


def _decoder(located: Located, vae_path: str | None, facts: SamplingFacts | None) -> Vae:
    """Load the VAE by `vae.decoder_of`, else the one in `vae/` beside the weights; UserError otherwise."""
    encoder = facts.vae if facts else None
    if decoder := vae.decoder_of(vae_path, located.sweep, encoder):
        return decoder
    if (beside := located.folder / BESIDE).list():
        if vae.has_programs(beside):
            raise UserError(f"{beside} has programs, which may do anything: if you trust it, name it: --vae {beside}")
        return vae.from_path(beside.url, encoder)
    raise UserError(
        f"{located} is not in a sweep, so name the VAE of its latents: --vae FOLDER, hub id, or none; or put its folder there as "
        f"{BESIDE}/"
    )


def _require_fit(model: Backbone, decoder: Vae, vae_path: str) -> None:
    """Raise UserError unless the VAE decodes latents of the model's shape to images."""
    channels, size = model.shape
    try:
        pictures = decoder.decode(torch.zeros(1, channels, size, size))
        reason = f"it returns {tuple(pictures.shape)}"
    except RuntimeError as error:
        pictures, reason = None, lines_of(error)[-1]
    if pictures is None or pictures.shape[3] != 3:
        raise UserError(f"--vae {vae_path} does not decode the model's latents, {channels} channels of {size} x {size}: {reason}")


def labels_in_turn(opened: OpenCheckpoint, classes: list[int] | None, count: int) -> list[int] | int:
    """Return labels for `count` samples: these classes in turn, by default all. Return `count` for a model without classes.

    Raises UserError for invalid classes.
    """
    known = opened.model.num_classes
    if known is None:
        if classes is not None:
            raise UserError("--classes: the model has no classes: omit it")
        return count
    if classes is None:
        return [i % known for i in range(count)]
    if not classes:
        raise UserError("--classes: got none, expected at least one label")
    check_labels(torch.tensor(classes), known)
    return [classes[i % len(classes)] for i in range(count)]


def image_names(opened: OpenCheckpoint, labels: Sequence[int] | int) -> list[str]:
    """Return the class of each image of these labels; empty without names."""
    names = opened.class_names
    if isinstance(labels, int) or not names:
        return []
    return [names[label] if label < len(names) else str(label) for label in labels]


def labels_of_all(opened: OpenCheckpoint, how: Literal["balanced", "uniform"], count: int, seed: int) -> list[int] | int:
    """Return labels for `count` samples: each class equally often, or independent of each other and equally likely.

    Return `count` for a model without classes.
    """
    known = opened.model.num_classes
    if known is None or how == "balanced":
        return labels_in_turn(opened, None, count)
    labels: list[int] = seeds.generator("sample labels", seed).integers(known, size=count).tolist()
    return labels


def _stepped(progress: Progress, done: int, parts: int, step: int, steps: int) -> None:
    """Report a step of the part that follows `done` others."""
    progress(done * steps + step, parts * steps)


def sample_pictures(
    opened: OpenCheckpoint,
    labels: Sequence[int] | int,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch: int = 64,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Iterator[np.ndarray]:
    """Yield uint8 images of these labels in parts (B, H, W, 3), `batch` at a time.

    `labels` is the number of images of a model without classes. The default of `sampling` is the checkpoint's own. `progress` gets
    the steps of all parts.
    """
    sampling, count = sampling or opened.sampling, labels if isinstance(labels, int) else len(labels)
    process, model = diffusion.build(opened.process, opened.model.shape), opened.model.to(device)
    guide = opened.guide.to(device) if sampling.scale != 1 and opened.guide else None
    images = forward_images(batch_sizes(count, batch), sampling, by_model=guide is not None)
    for each in (model, guide) if guide else (model,):
        verify_kernels(each, torch.device(device), images, training=False)
    opened.decoder.net.to(device)
    drawn, guides = replayed(model, torch.device(device)), guide and replayed(guide, torch.device(device))
    for done, first in enumerate(range(0, count, batch)):
        stepped = partial(_stepped, progress, done, -(-count // batch)) if progress else None
        numbers = range(first, min(first + batch, count))
        part = None if isinstance(labels, int) else labels[numbers.start : numbers.stop]
        with torch.no_grad(), tf32(allowed=False):  # as in an evaluation
            latents = generate(drawn, process, part, numbers, sampling, seed=seed, device=device, guide=guides, progress=stepped)
            pictures = opened.decoder.decode(latents)
        yield pictures
