"""Decodes one image: from its file's bytes to an upright, square uint8 array, exactly as ADM and DiT do. Errors name the image.

Functions here take bytes, which sources.py reads, so unavailable storage is never reported as a broken image.
"""

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from dis_scale.process.errors import UndecodableImage, printable
from dis_scale.recipe.data import Crop

T = TypeVar("T")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Endings of the files that are taken for images."""

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
"""Pillow's names of the decoded formats, whatever a file is called. For others Pillow starts programs, such as Ghostscript."""
MOST_IN_AN_ENDING = 10
"""Most characters of a file's ending; longer text after a dot is a part of the name."""
_TURNS: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""Operation that makes an image upright, by EXIF's orientation. `ImageOps.exif_transpose` also rewrites all other metadata."""
SYSTEM = ("__MACOSX", "lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information")
"""Folders that macOS adds to archives, and Linux, Synology and Windows to disks."""
IMAGE_BYTES = 2**30
"""Most bytes of an image's file; no more are read. The largest image that Pillow decodes has half as many, uncompressed."""


class InFlight:
    """Bound on the pixels that threads of a process decode at a time. An image larger than `most` is decoded on its own."""

    def __init__(self, most: int = 2**28) -> None:
        self._most = self._left = most
        self._changed, self._first = threading.Condition(), threading.Lock()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until this many pixels are free, and hold them for the block. Small images do not overtake a waiting large one."""
        pixels = min(pixels, self._most)
        with self._first, self._changed:
            self._changed.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += pixels
                self._changed.notify_all()


def hidden(path: str) -> bool:
    """Whether a file, or a folder around it, has a name that begins with a dot, or that a system gives to its own folders."""
    return any((part.startswith(".") and part.strip(".")) or part in SYSTEM for part in path.split("/"))


def ending(name: str) -> str:
    """Return the kind of a file that is no image, by its name, in words."""
    _, dot, kind = name.rpartition(".")
    known = dot and kind.isalnum() and not kind.isdigit() and len(kind) <= MOST_IN_AN_ENDING
    return f".{kind.lower()}" if known else "of no known ending"


def decode(data: bytes, name: str, resolution: int, crop: Crop | None = None, in_flight: InFlight | None = None) -> np.ndarray:
    """Decode to uint8 (resolution, resolution, 3); UndecodableImage if it is empty, damaged, truncated, too large or a bomb.

    Decodes the first frame of an animation. A bomb has more than twice `PIL.Image.MAX_IMAGE_PIXELS` (179 million) pixels. Needs up
    to eight bytes a pixel, which threads bound by one `in_flight`.
    """
    return _decoded(data, name, lambda image: square(image, resolution, crop), in_flight or InFlight())


def exact(data: bytes, name: str, in_flight: InFlight) -> np.ndarray:
    """Decode to uint8 (H, W, 3) as it is, not resized; UndecodableImage and `in_flight` as `decode`."""
    return _decoded(data, name, lambda image: np.asarray(rgb(image)), in_flight)


def measure(data: bytes, name: str, in_flight: InFlight) -> tuple[int, int]:
    """Decode all of an image; return width and height of the upright image. UndecodableImage and `in_flight` as `decode`."""
    return _decoded(data, name, lambda image: _upright(image).size, in_flight)


def _decoded(data: bytes, name: str, use: Callable[[Image.Image], T], in_flight: InFlight) -> T:
    with undecodable(f"image {printable(name)} cannot be decoded"):
        if not data:
            raise ValueError("it is empty (0 bytes)")
        if len(data) > IMAGE_BYTES:
            raise ValueError(f"it has over {IMAGE_BYTES:,} bytes")
        image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the size only
        with in_flight.take(image.width * image.height):
            return use(image)


@contextlib.contextmanager
def undecodable(what: str) -> Iterator[None]:
    """Raise the block's errors as UndecodableImage: on damaged bytes, Pillow and `pickle` raise errors of many kinds."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            why = "it is in none of the formats that are read"  # Pillow's message has an address in memory
        raise UndecodableImage(f"{what}: {why}; repair or remove it, or --set data.undecodable=skip", why) from error


def square(image: Image.Image, resolution: int, crop: Crop | None = None) -> np.ndarray:
    """Make it upright, RGB, centre-cropped and resized as ADM and DiT do: box halving, then bicubic; uint8 (R, R, 3).

    With `crop` it is that square of the upright image; ValueError if the image does not contain it.
    """
    image = _upright(image)
    if crop is not None:
        left, top, side = crop
        if image.width < left + side or image.height < top + side:
            raise ValueError(f"it has {image.width} x {image.height} pixels, and data.crop {list(crop)} needs more")
        image = image.crop((left, top, left + side, top + side))
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    if max(image.size) * scale * resolution > (limit := Image.MAX_IMAGE_PIXELS or 2**27):
        raise ValueError(f"{image.width} x {image.height} is too thin: resized to {resolution} it has over {limit:,} pixels")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return np.asarray(image)[top : top + resolution, left : left + resolution]


def _upright(image: Image.Image) -> Image.Image:
    """Rotate an image by its metadata, and convert it to RGB. Unreadable metadata are ignored, since the pixels are good."""
    image.load()  # metadata may be after the pixels
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise
    except Exception:  # Pillow raises many kinds, as for damaged pixels
        turn = None
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode.startswith("I;16"):
        image = _grey_of_tiff(image)
    return rgb(image if turn is None else image.transpose(turn))


def rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, 8 bits. Alpha is dropped, as in the public loaders; ValueError for pixels without a known range."""
    if image.mode.startswith(("I", "F")):
        return _scaled(image).convert("RGB")
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow's advice for palettes with transparency
    return image.convert("RGB")


def _grey_of_tiff(image: TiffImagePlugin.TiffImageFile) -> Image.Image:
    """Convert grey of up to 16 bits to 8 bits by the file's own range. Pillow neither scales 12 bits nor inverts a negative."""
    most = 2 ** image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
    grey = _eight_bits(np.asarray(image).clip(0, most), most)
    return Image.fromarray(255 - grey if image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0 else grey)


def _scaled(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8 bits; 65535 is white. Pillow's `convert` would clip at 255, so nearly all would be white.

    Pillow returns a PPM of 16 bits in 32 bits, scaled to 65535. Other images of 32 bits have no known range: ValueError.
    """
    if not image.mode.startswith("I;16") and (image.mode, image.format) != ("I", "PPM"):
        raise ValueError(f"its pixels (mode {image.mode}) have no range that defines white: save it in 8 or 16 bits")
    return Image.fromarray(_eight_bits(np.asarray(image), 65535))


def _eight_bits(values: np.ndarray, most: int) -> np.ndarray:
    """Return numbers from 0 to `most`, of 16 bits, as the nearest from 0 to 255."""
    return ((values.astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)
