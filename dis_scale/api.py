"""The Python API: a stored sweep's results, curves, weights, samples and figure, and what a recipe would cost.

`dis_scale.Sweep`, `dis_scale.open_weights` and `dis_scale.plan` are all of it. It leaves nothing in storage: only `state` writes, a
file without content by which a file system tells its time. The folder of a sweep and its paths are in sweep/; weights/opening.py
samples.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image

from dis_scale import vae
from dis_scale.models.tokens import Backbone
from dis_scale.planning import isoflop
from dis_scale.planning.plan import derive
from dis_scale.process.errors import DisScaleError, UserError, lines_of
from dis_scale.recipe import Recipe, reading
from dis_scale.report import figures, tables
from dis_scale.report.points import Report, collect, plan_of
from dis_scale.storage.folder import Folder
from dis_scale.sweep import Sweep, state
from dis_scale.tracking.rows import Row, RowReader
from dis_scale.upkeep import status
from dis_scale.weights.checkpoints import class_names, find_checkpoint, labels_in_words
from dis_scale.weights.export import open_checkpoint
from dis_scale.weights.opening import OpenCheckpoint, labels_in_turn, open_for_sampling, sample_pictures


@dataclass(frozen=True, repr=False)
class StoredSweep:
    """Give the results of a sweep in storage: `StoredSweep.open` opens one."""

    stored: Sweep
    """Its recipe and its paths."""

    @classmethod
    def open(cls, url: str) -> "StoredSweep":
        """Return the sweep at a path or an fsspec URL; UserError if there is none."""
        return cls(Sweep.open(url))

    def __repr__(self) -> str:
        return f"Sweep({str(self.stored)!r})"

    @property
    def models(self) -> list[str]:
        """Names of its models, in the recipe's order."""
        return list(self.stored.recipe.models)

    def images(self, model: str) -> list[int]:
        """Return the counts of images seen at which a model's weights are published, rising; UserError for an unknown model."""
        return state.published_counts(self.stored.run(model))

    def results(self) -> pd.DataFrame:
        """Return a row for each evaluated point, with the columns of the report's CSV; empty cells are not measured.

        A point is one model at one count of images seen with one sampling; `variant` is empty for the main one. `gmacs_forward`
        is in 10^9 multiply-adds, `training_eflops` in 10^18 operations. UserError if there is nothing to report yet.
        """
        return pd.DataFrame(tables.records(self._report()))

    def figure(self) -> Figure:
        """Return the plot of forward Gflops against distance; UserError if there is nothing to report yet."""
        return figures.gflops_distance(self._report())

    def curves(self, model: str) -> pd.DataFrame:
        """Return a row for each logged count of images seen, with a column for each metric of a model's training, such as `loss`.

        Empty cells were not measured there; UserError for an unknown model.
        """
        rows = RowReader(self.stored.run(model).log).new()
        frame = pd.DataFrame(rows, columns=Row._fields).pivot(index="images", columns="name", values="value")
        return frame.rename_axis(columns=None)

    def state(self) -> status.Status:
        """Return what the sweep and each of its models does now, as `dis-scale status` shows it."""
        return status.collect(self.stored, self.stored.folder.time_s())

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label; empty without names, or before the latents are complete."""
        return class_names(self.stored)

    def load(self, model: str, images: int | None = None) -> Backbone:
        """Return a model with its published weights (the exponential average), in evaluation mode, on the CPU.

        `images` are the images seen, by default the last published count. UserError if they are not published; a
        DisScaleError for damaged weights.
        """
        with find_checkpoint(self._published(model, images).url).fetched() as file:
            return open_checkpoint(file)

    def weights(self, model: str, images: int | None = None) -> "Weights":
        """Return a model's published weights, ready to sample; errors as `load`."""
        return open_weights(self._published(model, images).url)

    def sample(self, model: str, images: int | None = None, **settings: Any) -> list[Image.Image]:
        """Return RGB images of a model with its published weights; the settings are those of `Weights.sample`."""
        return self.weights(model, images).sample(**settings)

    def encode(self, pixels_BHWC: np.ndarray) -> torch.Tensor:
        """Return the scaled latents (B, C, h, w) of uint8 images (B, H, W, 3), each the mean of its posterior; on the CPU.

        UserError for others than uint8 images of the sweep's resolution.
        """
        side = self.stored.recipe.data.resolution
        if _described(pixels_BHWC) != ("uint8", (side, side, 3)):
            raise UserError(f"got {_got(pixels_BHWC)}, expected an array of uint8 images (B, {side}, {side}, 3)")
        moments_BXHW = self._vae.encode(pixels_BHWC)
        means_BCHW = moments_BXHW.chunk(2, 1)[0] if self._vae.posterior else moments_BXHW
        return torch.from_numpy(self._vae.scaling.apply(means_BCHW.float().numpy(force=True)))

    def decode(self, latents_BCHW: torch.Tensor) -> np.ndarray:
        """Return the uint8 images (B, H, W, 3) of scaled latents (B, C, h, w), as `encode` returns; UserError for other shapes."""
        channels, side = self._vae.latent(self.stored.recipe.data.resolution)
        if not isinstance(latents_BCHW, torch.Tensor) or _described(latents_BCHW)[1] != (channels, side, side):
            raise UserError(f"got {_got(latents_BCHW)}, expected a tensor of latents (B, {channels}, {side}, {side})")
        return self._vae.decode(latents_BCHW.float())

    @cached_property
    def _vae(self) -> vae.Vae:
        loaded = vae.load(self.stored)
        if known := state.latents_vae(self.stored):
            state.require_same_vae(self.stored.folder, known, loaded.identity)
        return vae.for_samples(self.stored, loaded)

    def _repr_html_(self) -> str:
        """For notebooks: its name and the evaluated points, or what it does while there is nothing to report."""
        try:
            points = self.results()
        except DisScaleError:
            points = pd.DataFrame()
        table = points.dropna(axis=1, how="all").to_html(index=False) if len(points) else escape(self.state().doing)
        return f"<p>{escape(repr(self))}</p>{table}"

    def _report(self) -> Report:
        return collect(self.stored, plan_of(self.stored))

    def _published(self, model: str, images: int | None) -> Folder:
        """Return the folder of a model's published weights; UserError without any."""
        return self.stored.run(model).published_at(state.published_at(self.stored, model, images))


@dataclass(frozen=True, repr=False)
class Weights:
    """A model with its weights, the decoder of its latents, and the settings that it is sampled with."""

    opened: OpenCheckpoint

    def __repr__(self) -> str:
        return f"Weights({str(self.opened.located)!r})"

    @property
    def model(self) -> Backbone:
        """The network, in evaluation mode."""
        return self.opened.model

    def sample(
        self,
        *,
        classes: Sequence[int | str] | str | None = None,
        count: int | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        batch: int = 64,
        device: torch.device | str | None = None,
    ) -> list[Image.Image]:
        """Return RGB images.

        The labels are `classes` in turn, each a label or a class's name, or a text of them with commas; by default all classes.
        `count` is by default one image for each of them; `sampler`, `steps` and `guidance` are by default the sweep's own, whose
        channels and times of guidance always hold; `device` is a GPU if there is one. An image depends on the seed, its number and
        its label, not on `batch`.
        UserError for weights, classes or settings that the model does not have.
        """
        labels = None if classes is None else self._labels(classes)
        if count is None:
            count = len(range(self.opened.model.num_classes or 1) if labels is None else labels)
        if min(count, batch) < 1:
            raise UserError(f"got count {count} and batch {batch}, expected at least 1")
        each_label = labels_in_turn(self.opened, labels, count)
        try:
            where = torch.zeros(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
        except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built for CUDA
            raise UserError(f"device {device!r}: {lines_of(error)[0]}") from error
        parts = sample_pictures(
            self.opened, each_label, sampling=self.opened.sampling_with(sampler=sampler, steps=steps, guidance=guidance),
            seed=seed, batch=batch, device=where,
        )  # fmt: skip
        return [Image.fromarray(pixels) for pixels in np.concatenate(list(parts))]

    def _labels(self, classes: Sequence[int | str] | str) -> list[int]:
        names = self.opened.class_names
        if isinstance(classes, str):
            return labels_in_words(names, classes)
        if not isinstance(classes, Iterable) or not all(isinstance(each, int | np.integer | str) for each in classes):
            raise UserError(f"classes: got {classes!r}, expected labels or names of classes, such as [1, 7]")
        return [labels_in_words(names, [each])[0] if isinstance(each, str) else int(each) for each in classes]


def _described(x: Any) -> tuple[str, tuple[int, ...]]:
    """Type of the numbers and shape behind the batch; nothing for what has none, or no images."""
    shape = tuple(getattr(x, "shape", ()))
    return str(getattr(x, "dtype", "")), shape[1:] if shape and shape[0] else ()


def _got(x: Any) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if hasattr(x, "dtype") else type(x).__name__


def open_weights(
    at: str | Path, vae: str | Path | None = None, heads: int | None = None, guide: str | Path | None = None
) -> Weights:
    """Return the weights at a path or URL: of a sweep, a copied folder or file, or a public `.pt` file of DiS, DiT or SiT.

    `vae` is needed only where the sweep's autoencoder is not beside the weights: a folder, a hub id, or `none` for pixels;
    `heads` for a public DiT of no published size. `guide` is a worse model that guides it (arXiv 2406.02507). It warns
    of what is assumed, or differs.

    UserError if there are no weights, or no autoencoder that fits them.
    """
    opened = open_for_sampling(at, None if vae is None else str(vae), heads, guide)
    for note in opened.notes:
        warnings.warn(note, stacklevel=2)
    return Weights(opened)


def plan(recipe: str | Path | Recipe, overrides: Sequence[str] = (), images: int | None = None) -> pd.DataFrame:
    """Return a row for each model of a recipe: parameters, multiply-adds, operations of its training and of one evaluation.

    `recipe` is a file, a shipped name, or that of a sweep, `overrides` are `a.b=value` for the first two; without the number of the
    source's `images`, epochs are unknown. UserError for a wrong recipe.
    """
    if isinstance(overrides, str) or (overrides and isinstance(recipe, Recipe)):
        raise UserError(f"overrides: got {overrides!r}, expected a list of a.b=value, for a recipe's file")
    loaded = recipe if isinstance(recipe, Recipe) else reading.load(recipe, [*overrides])
    numbers = derive(isoflop.price(loaded), images, "not given")
    models = {name: asdict(model) for name, model in numbers.models.items()}
    return pd.DataFrame.from_dict(models, orient="index").rename_axis("model")
