"""Labelled images in one order that the source's content fixes, and how one becomes a square array.

Not for latents: those are shards.py and latents.py.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dis_scale.errors import StorageError, UndecodableImage, UserError
from dis_scale.recipe import Data, DigitsSource, FolderSource
from dis_scale.storage import folder

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Source:
    """Labelled images; position i of the dataset is `names[i]`, of class `labels[i]`, opened by `open(i)`."""

    names: list[str]
    labels: list[int]
    label_names: list[str]
    open: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, i: int, resolution: int) -> np.ndarray:
        """Image i as uint8 (resolution, resolution, 3).

        UndecodableImage names one that is no image; storage that is away is another StorageError, never a broken image.
        """
        try:
            return square(self.open(i), resolution)
        except FileNotFoundError as error:
            raise StorageError(f"image {self.names[i]} is gone: it was there when the source was listed") from error
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
            why = " ".join(str(error).split())
            raise UndecodableImage(
                f"image {self.names[i]} cannot be decoded: {why}; mend or remove it, or --set data.undecodable=skip"
            ) from error


def open_source(data: Data) -> Source:
    """The recipe's source; UserError where it is missing, empty or has other classes than the recipe says."""
    match data.source:
        case DigitsSource():
            source = _digits()
        case FolderSource(url=url):
            source = _class_folders(url)
    if len(source.label_names) != data.num_classes:
        shown = ", ".join(source.label_names[:5])
        raise UserError(
            f"data.num_classes: got {data.num_classes}, but the source has {len(source.label_names)} classes ({shown}, ...)"
        )
    return source


def square(image: Image.Image, resolution: int) -> np.ndarray:
    """Upright, RGB, centre-cropped and resized as ADM and DiT do it: box halving, then bicubic; uint8 (R, R, 3)."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return np.asarray(image)[top : top + resolution, left : left + resolution]


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    names = [f"digits/{i:04d}" for i in range(len(grey))]
    return Source(names, [int(y) for y in digits.target], list("0123456789"), lambda i: Image.fromarray(grey[i]))


def _class_folders(url: str) -> Source:
    root = folder(url)
    classes = [name for name in root.list() if not name.startswith(".")]
    names, labels = [], []
    for label, name in enumerate(classes):
        images = [f"{name}/{file}" for file in root.list(name) if file.lower().endswith(IMAGE_SUFFIXES)]
        names += images
        labels += [label] * len(images)
    if not names:
        raise UserError(
            f"data.source.url: no images in class folders below {root}; expected {root}/<class>/<image>.png"
        )
    return Source(names, labels, classes, lambda i: Image.open(io.BytesIO(root.read(names[i]))))
