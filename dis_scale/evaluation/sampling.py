"""Blocks of samples: block b of a published checkpoint is a function of (recipe, published weights, b), whoever draws it.

A block holds samples [b S, (b + 1) S): their features, the judge's verdicts, and the pictures of those that the grid shows. It is
drawn in micro-batches of a fixed size, since the last digits of a model's sums depend on it.
"""

import contextlib
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from dis_scale import checkpoint, diffusion, models, seeds
from dis_scale.data import shards
from dis_scale.diffusion.generate import generate
from dis_scale.errors import DisScaleError, StorageError, UserError
from dis_scale.evaluation import npz
from dis_scale.evaluation.features import JUDGE, Extractor, Features, load_classifier, load_extractors
from dis_scale.models import Backbone
from dis_scale.recipe import Evaluate, LatentShape, Recipe
from dis_scale.small_nets import Classifier
from dis_scale.storage import Folder
from dis_scale.vae import Vae, to_unit

COLUMNS, ROWS = 10, 10
"""Of the grid: classes, and samples of each."""
PARTS = ("sampling", "decoding", "features")
"""What drawing spends its time on."""
GOLDEN = (5**0.5 - 1) / 2
FIELDS = ("identity", "pooled", "spatial", "logits")
"""Of `Features`, as a block's file names them."""


@dataclass(frozen=True)
class Block:
    """Features by extractor; `right` (S) whether the judge sees the class that was asked for, -1 without; grid pictures."""

    features: Mapping[str, Features]
    right: np.ndarray
    pictures: np.ndarray

    def to_bytes(self) -> bytes:
        arrays = {"right": self.right, "pictures": self.pictures}
        for name, seen in self.features.items():
            parts = {field: getattr(seen, field) for field in FIELDS}
            arrays |= {f"{name}.{field}": np.asarray(part) for field, part in parts.items() if part is not None}
        return npz.to_bytes(arrays)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Block":
        """The block in `data`; StorageError names a damaged one."""
        arrays = npz.from_bytes(data, where)
        parts: dict[str, dict[str, np.ndarray]] = {}
        for key in arrays.keys() - {"right", "pictures"}:
            name, field = key.split(".")
            parts.setdefault(name, {})[field] = arrays[key]
        features = {name: Features(**(part | {"identity": str(part["identity"])})) for name, part in parts.items()}  # type: ignore[arg-type]
        return cls(features, arrays["right"], arrays["pictures"])


@dataclass
class Studio:
    """What drawing needs beside the weights: decoder, extractors and judge, loaded once a worker; and where its time went."""

    recipe: Recipe
    sweep: Folder
    vae: Vae
    extractors: list[Extractor]
    judge: Classifier | None
    labels: np.ndarray
    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def model(self, name: str, images: int, drawing: Evaluate) -> Backbone:
        """A published model in evaluation, averaged as the drawing says; StorageError names a damaged one."""
        run, train = self.sweep / "runs" / name, self.recipe.train
        if drawing.ema_width is None:
            weights = checkpoint.load_published(run, images)
        else:
            weights = checkpoint.load_average(run, images, train, drawing.ema_width)
        model = load_model(self.recipe, name, self.vae.latent(self.recipe.data.resolution), weights).to(self.device)
        return model.bfloat16() if drawing.precision == "bf16" else model

    def draw(self, model: Backbone, drawing: Evaluate, block: int) -> Block:
        """Samples of one block, guided, decoded and looked at."""
        numbers = block_numbers(drawing.samples, drawing.block_images, block)
        micro = drawing.batch_images
        parts = [self._pixels(model, drawing, numbers[i : i + micro]) for i in range(0, len(numbers), micro)]
        pixels, labels = np.concatenate(parts), self.labels[numbers.start : numbers.stop]
        with self._timed("features"):
            seen, right = {e.name: e(pixels) for e in self.extractors}, self._judged(pixels, labels)
        shown = set(grid_numbers(self.labels))
        return Block(seen, right, pixels[[number in shown for number in numbers]])

    def _pixels(self, model: Backbone, drawing: Evaluate, numbers: range) -> np.ndarray:
        """The images of a micro-batch, uint8 (B, H, W, 3)."""
        labels = self.labels[numbers.start : numbers.stop].tolist()
        with self._timed("sampling"), torch.no_grad():
            latents = generate(
                model, diffusion.build(self.recipe.diffusion), labels, numbers, sampler=drawing.sampler,
                steps=drawing.steps, guidance=drawing.guidance, interval=drawing.guidance_interval,
                seed=self.recipe.seed, device=self.device,
            )  # fmt: skip
            require_finite(latents, numbers)
        with self._timed("decoding"):
            return self.vae.decode(latents)

    def _judged(self, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if self.judge is None:
            return np.full(len(labels), -1, np.int8)
        with torch.no_grad():
            seen = self.judge(to_unit(pixels)).argmax(1).numpy()
        return (seen == labels).astype(np.int8)

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[part] += time.monotonic() - began


def open_studio(recipe: Recipe, sweep: Folder, decoder: Vae, device: torch.device) -> Studio:
    """The sweep's studio; a judge there is where the sweep trained one, labels come as often as in the training set."""
    judge = load_classifier(sweep, JUDGE) if recipe.evaluate.trained else None
    extractors = load_extractors(recipe.evaluate, sweep, device)
    return Studio(recipe, sweep, decoder, extractors, judge, labels_of(sweep, recipe), device)


def require_finite(latents_BCHW: torch.Tensor, numbers: range) -> None:
    """DisScaleError names the samples that are not finite: as pixels they would pass for black images."""
    bad = [numbers[i] for i in (~latents_BCHW.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()]
    if bad:
        raise DisScaleError(
            f"{len(bad)} samples are not finite, the first number {bad[0]}: did this model's training diverge?"
        )


def load_model(recipe: Recipe, name: str, shape: LatentShape, weights: dict[str, torch.Tensor]) -> Backbone:
    """A model with published weights, in evaluation."""
    model = models.build(recipe.models[name], shape, recipe.data.num_classes, scan=recipe.train.scan)
    model.load_state_dict(weights, strict=False)
    missing = {n for n, _ in model.named_parameters()} ^ weights.keys()
    if missing:
        raise StorageError(f"published weights do not fit {name}: {sorted(missing)[:3]}")
    try:
        models.check_finite(model)
    except UserError as error:
        raise StorageError(f"published weights of {name}: {error}") from error
    return model.eval().requires_grad_(False)


def labels_of(sweep: Folder, recipe: Recipe) -> np.ndarray:
    """The label of each of the sweep's samples."""
    images = shards.latents_manifest(sweep)["labels"]
    return sample_labels(recipe, [images.get(str(label), 0) for label in range(recipe.data.num_classes)])


def sample_labels(recipe: Recipe, counts: Sequence[int]) -> np.ndarray:
    """The label of each sample (samples), as often as among the training set's `counts`; the same whatever their number.

    Shares are hit by steps of the golden ratio (a Kronecker sequence), so that any stretch of samples has nearly the right ones:
    labels drawn at random would add their own noise to every distance.
    """
    start = seeds.generator("sample labels", recipe.seed).random()
    points = (start + np.arange(recipe.evaluate.samples) * GOLDEN) % 1
    return np.searchsorted(np.cumsum(counts) / np.sum(counts), points, side="right")


def grid_numbers(labels: np.ndarray) -> list[int]:
    """The samples that the grid shows, row by row: a column for each of some classes, as many rows as all of them fill."""
    present = np.unique(labels)
    shown = present[np.linspace(0, len(present) - 1, min(COLUMNS, len(present))).round().astype(int)]
    columns = [np.flatnonzero(labels == label)[:ROWS] for label in shown]
    return np.stack([column[: min(map(len, columns))] for column in columns], axis=1).flatten().tolist()


def grid_columns(labels: np.ndarray) -> int:
    """One a class that the grid shows."""
    return len(np.unique(labels[grid_numbers(labels)]))


def arranged(pictures: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Pictures that came by rising sample number, in the grid's order."""
    return pictures[np.argsort(np.argsort(grid_numbers(labels)))]


def block_numbers(samples: int, block_images: int, block: int) -> range:
    return range(block * block_images, min((block + 1) * block_images, samples))


def grid(pictures: np.ndarray, columns: int) -> bytes:
    """A PNG of uint8 pictures (N, H, W, 3), row by row."""
    n, height, width, _ = pictures.shape
    rows = -(-n // columns)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for i, picture in enumerate(pictures):
        y, x = divmod(i, columns)
        sheet[y * height : (y + 1) * height, x * width : (x + 1) * width] = picture
    buffer = io.BytesIO()
    scale = max(1, 64 // height)
    Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST).save(
        buffer, "PNG"
    )
    return buffer.getvalue()
