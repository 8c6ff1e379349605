"""Blocks of samples: block b of a published checkpoint is a function of (recipe, published weights, b), whoever draws it.

A block holds samples [b S, (b + 1) S): their features, the judge's verdicts, and of the first ones the pictures for the grid.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from dis_scale import checkpoint, diffusion, models
from dis_scale.diffusion.generate import generate
from dis_scale.digits import Classifier
from dis_scale.errors import DisScaleError, StorageError
from dis_scale.evaluation import sealed
from dis_scale.evaluation.features import JUDGE, Extractor, Features, load_classifier, load_extractors
from dis_scale.models import Backbone
from dis_scale.recipe import LatentShape, Recipe
from dis_scale.storage import Folder
from dis_scale.vae import Vae, to_unit

GRID = 100
DECODE = 50
"""Images decoded at once."""
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
        return sealed.to_bytes(arrays)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Block":
        """The block in `data`; StorageError names a damaged one."""
        arrays = sealed.from_bytes(data, where)
        parts: dict[str, dict[str, np.ndarray]] = {}
        for key in arrays.keys() - {"right", "pictures"}:
            name, field = key.split(".")
            parts.setdefault(name, {})[field] = arrays[key]
        features = {name: Features(**(part | {"identity": str(part["identity"])})) for name, part in parts.items()}  # type: ignore[arg-type]
        return cls(features, arrays["right"], arrays["pictures"])


@dataclass(frozen=True)
class Studio:
    """What drawing needs beside the weights: decoder, extractors and judge, loaded once a worker."""

    recipe: Recipe
    sweep: Folder
    vae: Vae
    extractors: list[Extractor]
    judge: Classifier | None
    device: torch.device

    def model(self, name: str, images: int) -> Backbone:
        """A published model in evaluation; StorageError names a damaged one."""
        weights = checkpoint.load_published(self.sweep / "runs" / name, images)
        shape = self.vae.latent(self.recipe.data.resolution)
        return load_model(self.recipe, name, shape, weights).to(self.device)

    def draw(self, model: Backbone, block: int) -> Block:
        """Samples of one block, guided, decoded and looked at."""
        settings, classes = self.recipe.evaluate, self.recipe.data.num_classes
        numbers = block_numbers(settings.samples, settings.block_images, block)
        labels = [n % classes for n in numbers]
        with torch.no_grad():
            latents = generate(
                model, diffusion.build(self.recipe.diffusion), labels, list(numbers), sampler=settings.sampler,
                steps=settings.steps, guidance=settings.guidance, seed=self.recipe.seed, device=self.device,
            )  # fmt: skip
        require_finite(latents, numbers)
        pixels = np.concatenate([self.vae.decode(part) for part in latents.split(DECODE)])
        seen = {extractor.name: extractor(pixels) for extractor in self.extractors}
        return Block(seen, self._judged(pixels, labels), pixels[: max(0, GRID - numbers.start)])

    def _judged(self, pixels: np.ndarray, labels: list[int]) -> np.ndarray:
        if self.judge is None:
            return np.full(len(labels), -1, np.int8)
        with torch.no_grad():
            seen = self.judge(to_unit(pixels)).argmax(1).numpy()
        return (seen == np.array(labels)).astype(np.int8)


def open_studio(recipe: Recipe, sweep: Folder, decoder: Vae, device: torch.device) -> Studio:
    """The sweep's studio; a judge there is where the sweep trained one."""
    judge = load_classifier(sweep, JUDGE) if recipe.evaluate.trained else None
    return Studio(recipe, sweep, decoder, load_extractors(recipe.evaluate, sweep, device), judge, device)


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
    models.check_finite(model)
    return model.eval().requires_grad_(False)


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
