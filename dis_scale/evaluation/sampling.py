"""Blocks of samples: block b of a published checkpoint is a function of (recipe, published weights, b) on any worker.

Block b has samples [b S, (b + 1) S): their features, the judge's verdicts, and the pictures that the grid shows. Micro-batches
have a fixed size, because the last digits of a model's sums depend on it.
"""

import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import distribution
from itertools import accumulate, islice

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from dis_scale import diffusion, models
from dis_scale.data.encode import tf32
from dis_scale.data.sources import Source
from dis_scale.diffusion.generate import Generator, batch_sizes, generate
from dis_scale.diffusion.guidance import forward_images
from dis_scale.evaluation.classifiers import Classifier
from dis_scale.evaluation.features import Extractor, Features, load_classifier, load_extractors
from dis_scale.models.tokens import Backbone
from dis_scale.process import seeds
from dis_scale.process.errors import NotFinite, StorageError, UserError
from dis_scale.recipe import Evaluate, LatentShape, Recipe
from dis_scale.recipe.evaluate import JUDGE
from dis_scale.storage import npy
from dis_scale.sweep import Sweep
from dis_scale.sweep.documents import LatentsManifest
from dis_scale.sweep.state import require_latents
from dis_scale.vae import Vae, to_unit
from dis_scale.weights.published import load_average, load_published

COLUMNS, ROWS = 10, 10
"""Classes in the grid, and samples of each."""
REAL_ROWS = 2
"""Rows of real images."""
TRIED = 20
"""Most images that are tried for a column of real images."""
NEIGHBOURS = 2048
"""Entries of a listing at each of `COLUMNS` positions, among which real images are chosen."""
PARTS = ("sampling", "decoding", "features")
"""Timed parts of sampling."""
GOLDEN = (5**0.5 - 1) / 2
FONT = str(distribution("matplotlib").locate_file("matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf"))
"""A file of matplotlib: Pillow's own font has no letters beyond English."""
OTHER_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "PingFang.ttc", "Arial Unicode.ttf")
"""Fonts of the system for letters that `FONT` lacks, such as Chinese ones."""
SMALLEST = 9
"""Pixels of the smallest letters of a name."""
COLUMN_NAMES = "columns"


@dataclass(frozen=True)
class SampleBlock:
    """Features by extractor, the grid's pictures, and `right` (S): 1 if the judge sees the requested class, -1 without a judge."""

    features: Mapping[str, Features]
    right: np.ndarray
    pictures: np.ndarray

    def to_bytes(self) -> bytes:
        arrays = {"right": self.right, "pictures": self.pictures}
        for name, features in self.features.items():
            arrays |= {f"{name}.{field}": np.asarray(v) for field, v in vars(features).items() if v is not None}
        return npy.sealed(arrays)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "SampleBlock":
        """Read a block; StorageError names a damaged one."""
        arrays = npy.unsealed(data, where)
        parts: dict[str, dict[str, np.ndarray]] = {}
        for key in arrays.keys() - {"right", "pictures"}:
            name, field = key.split(".")
            parts.setdefault(name, {})[field] = arrays[key]
        features = {name: Features(**(part | {"identity": str(part["identity"])})) for name, part in parts.items()}  # type: ignore[arg-type]
        return cls(features, arrays["right"], arrays["pictures"])


@dataclass
class BlockSampler:
    """Samples blocks. Decoder, extractors and judge are loaded once per worker; `seconds` is the time spent by part."""

    sweep: Sweep
    vae: Vae
    extractors: list[Extractor]
    judge: Classifier | None
    labels: np.ndarray
    """Label of each sample, or its column in the grid if the models have no classes."""
    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    _guides: dict[tuple[str, int, str], Backbone] = field(default_factory=dict)
    """The last guiding model, by name, images and precision. It may also guide the next checkpoints."""

    @property
    def recipe(self) -> Recipe:
        return self.sweep.recipe

    def guide(self, settings: Evaluate) -> Backbone | None:
        """Load the exponential average of the guiding model, if any; StorageError if it is not published, or damaged."""
        if settings.guide is None:
            return None
        by, average = settings.guide, settings.model_copy(update={"ema_width": None})
        if (at := (by.by, by.images, settings.precision)) not in self._guides:
            self._guides.clear()
            self._guides[at] = self.model(by.by, by.images, average)
        return self._guides[at]

    def model(self, name: str, images_seen: int, settings: Evaluate) -> Backbone:
        """Load a published model or one of its averages, as `settings` says; StorageError names a damaged one."""
        run, train = self.sweep.run(name), self.recipe.train_of(name)
        if settings.ema_width is None:
            weights = load_published(run, images_seen)
        else:
            weights = load_average(run, images_seen, train, settings.ema_width)
        model = load_model(self.recipe, name, self.vae.latent(self.recipe.data.resolution), weights).to(self.device)
        verify_sampling(model, settings, self.device)
        return model

    def sample(
        self,
        model: Generator,
        settings: Evaluate,
        block: int,
        guide: Generator | None = None,
        sampled: Callable[[int], None] = lambda _: None,
    ) -> SampleBlock:
        """Sample one block: guide, decode, extract features, judge. `sampled` gets the number of images of each micro-batch."""
        numbers = range(settings.samples)[block * settings.block_images : (block + 1) * settings.block_images]
        parts = []
        for start in range(0, len(numbers), settings.batch_images):
            parts.append(self._pixels(model, settings, numbers[start : start + settings.batch_images], guide))
            sampled(len(parts[-1]))
        pixels, labels = np.concatenate(parts), self.labels[numbers.start : numbers.stop]
        with self._timed("features"):
            features, right = {e.name: e(pixels) for e in self.extractors}, self._judge(pixels, labels)
        return SampleBlock(features, right, pixels[np.isin(numbers, grid_numbers(self.labels))])

    def _pixels(self, model: Generator, settings: Evaluate, numbers: range, guide: Generator | None) -> np.ndarray:
        """Return the images of a micro-batch, uint8 (B, H, W, 3)."""
        labels = None if model.num_classes is None else self.labels[numbers.start : numbers.stop].tolist()
        with self._timed("sampling"), torch.no_grad(), tf32(allowed=settings.precision == "tf32"):
            latents = generate(
                model, diffusion.build(self.recipe.diffusion, model.shape), labels, numbers, settings,
                seed=self.recipe.seed, device=self.device, guide=guide,
            )  # fmt: skip
            require_finite(latents, numbers)
        with self._timed("decoding"):
            return self.vae.decode(latents)

    def _judge(self, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if self.judge is None:
            return np.full(len(labels), -1, np.int8)
        with torch.no_grad():
            right: np.ndarray = self.judge(to_unit(pixels)).argmax(1).numpy() == labels
        return right.astype(np.int8)

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[part] += time.monotonic() - began


def open_sampler(sweep: Sweep, decoder: Vae, device: torch.device) -> BlockSampler:
    """Return the sweep's sampler, with a judge if the sweep trained one and with labels as frequent as in training."""
    judge = load_classifier(sweep, JUDGE) if sweep.recipe.evaluate.trained else None
    return BlockSampler(sweep, decoder, load_extractors(sweep, device), judge, labels_of(sweep), device)


def require_finite(latents_BCHW: torch.Tensor, numbers: range) -> None:
    """Raise NotFinite if samples are not finite: as pixels they would be black."""
    bad = [numbers[i] for i in (~latents_BCHW.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()]
    if bad:
        what = f"samples that are not finite: {len(bad)}, the first number {bad[0]}"
        raise NotFinite(f"{what}: did this model's training diverge, or that of a model that guides it?")


def verify_sampling(model: Backbone, settings: Evaluate, device: torch.device) -> None:
    """Set the precision of sampling, and compare the GPU kernels of each size of batch with the reference."""
    model.precision = "bf16" if settings.precision == "bf16" else "fp32"
    blocks = batch_sizes(settings.samples, settings.block_images)
    batches = {images for block in blocks for images in batch_sizes(block, settings.batch_images)}
    images = forward_images(batches, settings, by_model=settings.guide is not None)
    models.verify_kernels(model, device, images, training=False)


def load_model(recipe: Recipe, name: str, shape: LatentShape, weights: dict[str, torch.Tensor]) -> Backbone:
    """Build a model with published weights, in evaluation mode."""
    model = models.build(recipe.models[name], shape, recipe.data.num_classes, scan=recipe.train.scan)
    model.load_state_dict(weights, strict=False)
    missing = {n for n, _ in model.named_parameters()} ^ weights.keys()
    if missing:
        raise StorageError(f"published weights do not fit {name}: {sorted(missing)[:3]}")
    try:
        models.check_finite(model)
    except UserError as error:
        raise StorageError(f"published weights of {name}: {error}") from error
    return model.eval().requires_grad_(requires_grad=False)


def labels_of(sweep: Sweep) -> np.ndarray:
    """Return the label of each of the sweep's samples. Without classes, return the grid's columns in turn."""
    classes = sweep.recipe.data.num_classes
    if classes is None:
        return np.arange(sweep.recipe.evaluate.samples) % COLUMNS
    counts = LatentsManifest.require(require_latents(sweep.folder)).labels
    return sample_labels(sweep.recipe, [counts.get(str(label), 0) for label in range(classes)])


def sample_labels(recipe: Recipe, counts: Sequence[int]) -> np.ndarray:
    """Return labels (samples) as frequent as in the training set's `counts`, or uniform ones; more samples only append labels.

    Balanced labels follow steps of the golden ratio (a Kronecker sequence), so any range of samples has nearly the right shares:
    random labels add noise to every distance.
    """
    random, samples = seeds.generator("sample labels", recipe.seed), recipe.evaluate.samples
    labels = recipe.evaluate.labels
    points = (random.random() + np.arange(samples) * GOLDEN) % 1 if labels == "balanced" else random.random(samples)
    shares = np.ones(len(counts)) if labels == "uniform" else np.asarray(counts)
    return np.searchsorted(np.cumsum(shares) / np.sum(shares), points, side="right")


def grid_numbers(labels: np.ndarray) -> np.ndarray:
    """Return the numbers of the samples in the grid (rows, columns): a column for each shown class, only complete rows.

    A class with fewer samples than half of the longest possible column has no column, since it would shorten all columns.
    """
    present, counts = np.unique(labels, return_counts=True)
    many = 2 * counts >= min(ROWS, counts.max())
    present, rows = present[many], min(ROWS, counts[many].min())
    shown = present[np.linspace(0, len(present) - 1, min(COLUMNS, len(present))).round().astype(int)]
    return np.stack([np.flatnonzero(labels == label)[:rows] for label in shown], axis=1)


def arrange(pictures: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Reorder pictures from rising sample number to the grid's order."""
    numbers = grid_numbers(labels).flatten()
    return pictures[np.searchsorted(np.sort(numbers), numbers)]  # each number's rank is its picture's index


def column_names(sweep: Sweep, labels: np.ndarray) -> list[str]:
    """Return the class name of each column of the grid; empty for images without classes."""
    if sweep.recipe.data.num_classes is None:
        return []
    names = dict(enumerate(LatentsManifest.require(require_latents(sweep.folder)).made_from.label_names))
    return [names.get(label, str(label)) for label in labels[grid_numbers(labels)[0]].tolist()]


def real_grid(source: Source, resolution: int) -> bytes:
    """Return a PNG of the source's images from `grid`, a column for each class, without images that cannot be decoded.

    Each column tries at most `TRIED` images; a cell without an image is white.
    """
    starts = np.linspace(0, max(0, len(source) - NEIGHBOURS), COLUMNS).astype(int).tolist()
    positions = sorted({i for start in starts for i in range(start, min(start + NEIGHBOURS, len(source)))})
    named = bool(source.label_names)
    labels = np.array([source.labels[i] for i in positions]) if named else np.arange(len(positions)) % COLUMNS
    numbers = grid_numbers(labels)[:REAL_ROWS]
    white = np.full((resolution, resolution, 3), 255, np.uint8)

    def column(label: int) -> list[np.ndarray]:
        some = islice(np.flatnonzero(labels == label).tolist(), TRIED)
        read = (source.decoded(range(positions[n], positions[n] + 1), resolution)[0] for n in some)
        found = list(islice((image for image in read if isinstance(image, np.ndarray)), len(numbers)))
        return found + [white] * (len(numbers) - len(found))

    columns = [column(label) for label in labels[numbers[0]].tolist()]
    names = [source.label_names[label] for label in labels[numbers[0]]] if named else []
    return grid(np.stack([image for row in zip(*columns, strict=True) for image in row]), len(columns), names)


def cell_pixels(size: int) -> int:
    """Return the size of a picture in a grid: small ones are enlarged by a whole factor, to at most 64 pixels."""
    return size * max(1, 64 // size)


def grid(pictures: np.ndarray, columns: int, names: Sequence[str] = ()) -> bytes:
    """Return a PNG of uint8 pictures (N, H, W, 3), row by row. `names` are the names of the columns or of all pictures, if any.

    Names are above the pictures; names that all rows repeat are above the first row only. A row of names adds a quarter of a cell
    to the height. The PNG's text `COLUMN_NAMES` has the names as JSON. If no font has the letters of a name, its number among the
    distinct names is drawn, from 0.
    """
    n, height, width, _ = pictures.shape
    cell = cell_pixels(height)
    header, wide = cell // 4, width * cell // height
    if all(name == names[i % columns] for i, name in enumerate(names)):
        names = names[:columns]
    bottoms = list(accumulate(cell + header * any(names[i : i + columns]) for i in range(0, n, columns)))
    image = Image.new("RGB", (columns * wide, bottoms[-1]), "white")
    draw, distinct = ImageDraw.Draw(image), list(dict.fromkeys(names))
    for i, picture in enumerate(pictures):
        left, top = i % columns * wide, bottoms[i // columns] - cell
        image.paste(Image.fromarray(picture).resize((wide, cell), Image.Resampling.NEAREST), (left, top))
        if i < len(names):
            _write_name(draw, names[i], str(distinct.index(names[i])), (left + wide / 2, top - header / 2), wide)
    buffer, words = io.BytesIO(), PngInfo()
    words.add_itxt(COLUMN_NAMES, json.dumps(list(names)))
    image.save(buffer, "PNG", pnginfo=words)
    return buffer.getvalue()


def _font_for(name: str, pixels: int) -> ImageFont.FreeTypeFont | None:
    """Return the first font that has all letters of a name."""
    for file in (FONT, *OTHER_FONTS):
        with suppress(OSError):  # not on this machine
            font = ImageFont.truetype(file, pixels)
            no_letter = bytes(font.getmask("\U0010ffff"))
            if not any(bytes(font.getmask(letter)) == no_letter for letter in set(name)):
                return font
    return None


def _write_name(draw: ImageDraw.ImageDraw, name: str, number: str, middle: tuple[float, float], wide: int) -> None:
    """Write a name, shortened to the width; write its number if no font has its letters."""
    pixels = max(SMALLEST, wide // 12)
    if (font := _font_for(name, pixels)) is None:
        name, font = number, ImageFont.truetype(FONT, pixels)
    while draw.textlength(name, font) > wide * 0.95:
        name = f"{name[:-2].rstrip()}…"
    draw.text(middle, name, "black", font, anchor="mm")
