"""One image: every mode to RGB, upright, cropped and resized as ADM does; undecodable images are named."""

import hashlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from dis_scale.data.images import SUFFIXES, InFlight, decode, measure, square
from dis_scale.process.errors import UndecodableImage


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "PA", "CMYK", "YCbCr", "1", "I;16", "I;16B"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    made = square(Image.new(mode, (40, 24)), 16)
    assert made.shape == (16, 16, 3)
    if mode.startswith("I"):
        return
    for colour in ((255, 255, 255), (0, 0, 0), (200, 40, 90)):
        image = Image.new("RGB", (40, 24), colour).convert(mode, dither=Image.Dither.NONE)
        grey = round(0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])
        expected = {"L": [grey] * 3, "LA": [grey] * 3, "1": [255 * (grey > 127)] * 3}.get(mode, colour)
        tolerance = 30 if mode in ("P", "PA") and colour == (200, 40, 90) else 2  # the palette of a browser
        assert np.abs(square(image, 16)[0, 0].astype(int) - expected).max() <= tolerance, mode


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(kind: str) -> None:
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    grey = decode(saved(Image.fromarray(values), kind), "x", 16)
    np.testing.assert_array_equal(grey[:, :, 0].ravel(), np.arange(256))


def test_alpha_is_dropped_and_a_transparent_palette_does_not_warn() -> None:
    image = Image.new("P", (16, 16))
    image.putpalette([200, 100, 50] + [0] * 765)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_array = decode(saved(image, "PNG", transparency=b"\x00\x10"), "x", 16)
    assert image_array[0, 0].tolist() == [200, 100, 50]
    assert square(Image.new("RGBA", (16, 16), (9, 8, 7, 0)), 16)[0, 0].tolist() == [9, 8, 7]


def test_cmyk_jpegs_keep_their_colours() -> None:
    pixels = decode(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), "x", 16)
    assert pixels[8, 8, 0] > 240
    assert pixels[8, 8, 1] < 15


def test_an_avif_is_an_image() -> None:
    assert ".avif" in SUFFIXES
    red, green, _ = decode(saved(Image.new("RGB", (16, 16), "red"), "AVIF"), "x", 16)[8, 8].tolist()
    assert red > 240 > 15 > green


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_used(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert decode(data, "x", 16)[8, 8].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("orientation", "where"), [*enumerate([(0, 0), (0, 15), (15, 15), (15, 0), (0, 0), (0, 15), (15, 15), (15, 0)], 1)]
)
def test_rotation_by_exif_is_applied(orientation: int, where: tuple[int, int]) -> None:
    """The stored picture's red corner is the upper left one."""
    image = Image.new("RGB", (16, 16))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(saved(image, "PNG", exif=exif.tobytes()), "x", 16)
    assert np.argwhere(pixels[:, :, 0] == 255).tolist() == [list(where)]


def with_chunk(kind: bytes, content: bytes) -> bytes:
    """Return a PNG with a chunk of metadata before its pixels."""
    png = saved(Image.new("RGB", (16, 8), "red"), "PNG")
    return png[:33] + struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)) + png[33:]


ORIENTED = struct.pack("<HHII", 0x112, 3, 1, 6)


@pytest.mark.parametrize(
    ("data", "upright"),
    [
        (with_chunk(b"eXIf", b"garbage!garbage!"), False),
        (with_chunk(b"eXIf", b"II*\0"), False),
        (with_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  10\nzzzz"), False),
        (with_chunk(b"eXIf", b"II*\0\x08\0\0\0\x01\0" + ORIENTED + bytes(4)), True),
        (with_chunk(b"eXIf", b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHI4s", 0x11A, 2, 4, b"abc") + ORIENTED + bytes(4)), True),
    ],
    ids=["garbage", "cut", "no digits", "good", "a resolution in letters"],
)
def test_metadata_that_cannot_be_read_do_not_spoil_the_image(data: bytes, upright: bool) -> None:
    assert measure(data, "x", InFlight()) == ((8, 16) if upright else (16, 8))
    assert decode(data, "x", 8)[4, 4].tolist() == [255, 0, 0]


def center_crop_arr(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """From guided-diffusion's image_datasets.py (MIT), which DiT also uses."""
    while min(*pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize([x // 2 for x in pil_image.size], resample=Image.Resampling.BOX)
    scale = image_size / min(*pil_image.size)
    pil_image = pil_image.resize([round(x * scale) for x in pil_image.size], resample=Image.Resampling.BICUBIC)
    arr = np.array(pil_image)
    crop_y = (arr.shape[0] - image_size) // 2
    crop_x = (arr.shape[1] - image_size) // 2
    return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]


@pytest.mark.parametrize("shape", [(100, 70), (70, 100), (16, 16), (15, 40), (33, 31), (200, 33), (5, 9)])
def test_crop_and_resize_equal_the_public_code(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    np.testing.assert_array_equal(square(image, 16), center_crop_arr(image, 16))


def test_a_square_is_cut_out_before_resizing() -> None:
    image = noise(100, 70)
    np.testing.assert_array_equal(square(image, 16, (5, 31, 60)), center_crop_arr(image.crop((5, 31, 65, 91)), 16))
    with pytest.raises(UndecodableImage, match=r"image x cannot .*70 x 100 pixels, and data.crop \[11, 31, 60\] needs more"):
        decode(saved(image, "PNG"), "x", 16, (11, 31, 60))


def test_crop_and_resize_are_frozen() -> None:
    """Stored latents depend on these bytes: a Pillow that changes them makes another data set."""
    assert hashlib.sha256(square(noise(100, 70), 16).tobytes()).hexdigest()[:16] == "f1b0785cebb88265"


def bomb() -> bytes:
    """A PNG of 60 bytes whose header claims 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", r"it is empty \(0 bytes\)"),
        (b"no picture", "it is in none of the formats that are read"),
        (b"\x89PNG\r\n\x1a\n broken", "in none of the formats that are read|broken PNG"),
        (saved(noise(64, 64), "PNG")[:6000], "truncated|unexpected end"),
        (saved(noise(64, 64), "JPEG")[:1500], "truncated"),
        (bomb(), "exceeds limit of .* pixels, could be decompression bomb"),
        (saved(Image.fromarray(np.eye(8, dtype=np.float32)), "TIFF"), r"mode F\) have no range that defines white"),
        (saved(Image.fromarray(np.eye(8, dtype=np.float32)), "PPM"), r"mode F\) have no range that defines white"),
        (saved(Image.fromarray(np.full((8, 8), 255, np.int32)), "TIFF"), r"mode I\) have no range that defines white"),
    ],
    ids=["empty", "words", "broken", "cut PNG", "cut JPEG", "bomb", "floats", "PFM", "32 bits"],
)
def test_an_undecodable_image_is_named_with_the_reason(data: bytes, why: str) -> None:
    words = rf"image a/b.png cannot be decoded: .*({why}).*; repair or remove it, or --set data.undecodable=skip"
    with pytest.raises(UndecodableImage, match=words):
        decode(data, "a/b.png", 16)


def grey_tiff(bits: int, photometric: int, value: int) -> bytes:
    """Return a TIFF of 8 x 8 pixels of one value; two of 12 bits are in three bytes."""
    two = struct.pack("<HH", value, value) if bits == 16 else (value << 12 | value).to_bytes(3, "big")
    pixels = two * 32
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 8, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(("bits", "photometric", "shown"), [(12, 1, 191), (16, 1, 191), (16, 0, 64)])
def test_grey_tiffs_have_the_range_and_the_sign_that_they_say(bits: int, photometric: int, shown: int) -> None:
    """Pillow gives the numbers as they are stored: a negative came out as its opposite, 12 bits nearly black."""
    data = grey_tiff(bits, photometric, round(0.75 * (2**bits - 1)))
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "I;16"
    assert set(decode(data, "x", 8).ravel().tolist()) <= {shown, shown + 1}
