"""The Python API: a stored sweep's results, weights, samples and figure. `dis_scale.Sweep` is its class.

It writes nothing to storage. The folder of a sweep and its paths are in sweep/; weights/opening.py samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image

from dis_scale.models.tokens import Backbone
from dis_scale.process.errors import UserError
from dis_scale.report import figures, tables
from dis_scale.report.points import Report, collect, plan_of
from dis_scale.storage.folder import Folder
from dis_scale.sweep import Sweep, state
from dis_scale.weights.checkpoints import find_checkpoint
from dis_scale.weights.export import open_checkpoint
from dis_scale.weights.opening import labels_in_turn, open_for_sampling, sample_pictures


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

    def load(self, model: str, images: int | None = None) -> Backbone:
        """Return a model with its published weights (the exponential average), in evaluation mode, on the CPU.

        `images` are the images seen, by default the last published count. UserError if they are not published; a
        DisScaleError for damaged weights.
        """
        with find_checkpoint(self._published(model, images).url).fetched() as file:
            return open_checkpoint(file)

    def sample(
        self,
        model: str,
        images: int | None = None,
        *,
        classes: Sequence[int] | None = None,
        count: int | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        batch: int = 64,
        device: torch.device | str | None = None,
    ) -> list[Image.Image]:
        """Return RGB images of a model with its published weights.

        The labels are `classes` in turn, by default all classes. `count` is by default one image for each of them; `sampler`,
        `steps` and `guidance` are by default the sweep's own, whose channels and times of guidance always hold; `device` is a
        GPU if there is one. An image depends on the seed, its number and its label, not on `batch`. UserError for weights,
        classes or settings that the model does not have.
        """
        opened = open_for_sampling(self._published(model, images).url, None)
        count = count or len(classes or range(opened.model.num_classes or 1))
        labels = labels_in_turn(opened, None if classes is None else list(classes), count)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        parts = sample_pictures(
            opened, labels, sampling=opened.sampling_with(sampler=sampler, steps=steps, guidance=guidance),
            seed=seed, batch=batch, device=device,
        )  # fmt: skip
        return [Image.fromarray(pixels) for pixels in np.concatenate(list(parts))]

    def _report(self) -> Report:
        return collect(self.stored, plan_of(self.stored))

    def _published(self, model: str, images: int | None) -> Folder:
        """Return the folder of a model's published weights; UserError without any."""
        counts = self.images(model)
        if not counts or (images is not None and images not in counts):
            at = "" if images is None else f" at {images:,} images"
            known = ", ".join(f"{count:,}" for count in counts) or "none yet"
            raise UserError(f"{self.stored}: {model} has no published weights{at}: published are {known}")
        return self.stored.run(model).published_at(counts[-1] if images is None else images)
