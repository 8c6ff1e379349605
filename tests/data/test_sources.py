"""Images from anywhere become the same square array in one order, and what cannot be decoded is named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dis_scale.data.sources import open_source, square
from dis_scale.errors import StorageError, UserError
from dis_scale.recipe import Data


def folder_data(url: Path | str, num_classes: int = 2) -> Data:
    return Data.model_validate(
        {"source": {"kind": "folder", "url": str(url)}, "resolution": 16, "num_classes": num_classes}
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, colour in [("cat/b.png", 10), ("cat/a.png", 20), ("dog/c.png", 30)]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 30), (colour, 0, 0)).save(path)
    return tmp_path


def test_the_digits_are_all_there() -> None:
    source = open_source(Data.model_validate({"source": {"kind": "digits"}, "resolution": 32, "num_classes": 10}))
    assert (len(source), source.labels[:3], source.pixels(0, 32).shape) == (1797, [0, 1, 2], (32, 32, 3))


def test_class_folders_are_sorted_and_labelled(images: Path) -> None:
    source = open_source(folder_data(images))
    assert source.names == ["cat/a.png", "cat/b.png", "dog/c.png"]
    assert (source.labels, source.label_names) == ([0, 0, 1], ["cat", "dog"])
    assert source.pixels(2, 16)[0, 0].tolist() == [30, 0, 0]


def test_an_image_that_cannot_be_decoded_is_named(images: Path) -> None:
    (images / "dog/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    source = open_source(folder_data(images))
    with pytest.raises(StorageError, match=r"image dog/broken.png cannot be decoded"):
        source.pixels(source.names.index("dog/broken.png"), 16)


def test_a_truncated_image_is_named(images: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "dog/cut.png")
    data = (images / "dog/cut.png").read_bytes()
    (images / "dog/cut.png").write_bytes(data[: len(data) // 2])
    source = open_source(folder_data(images))
    with pytest.raises(StorageError, match=r"image dog/cut.png cannot be decoded"):
        source.pixels(source.names.index("dog/cut.png"), 16)


def test_a_missing_folder_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no images in class folders below .*/none; expected .*/none/<class>/<image>.png"
    ):
        open_source(folder_data(tmp_path / "none"))


def test_other_classes_than_the_recipe_says_are_refused(images: Path) -> None:
    with pytest.raises(UserError, match=r"data.num_classes: got 3, but the source has 2 classes \(cat, dog"):
        open_source(folder_data(images, num_classes=3))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert square(Image.new(mode, (40, 24)), 16).shape == (16, 16, 3)


def test_rotation_by_exif_is_applied() -> None:
    image = Image.new("RGB", (16, 16))
    image.paste((255, 0, 0), (0, 0, 16, 8))  # red above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.info["exif"] = exif.tobytes()
    image.getexif()[0x0112] = 3
    assert square(image, 16)[15, 8, 0] == 255


def test_large_images_are_halved_by_box_before_the_bicubic_step() -> None:
    """ADM's `center_crop_arr`, written out."""
    pixels = np.random.default_rng(1).integers(0, 255, (100, 70, 3), dtype=np.uint8)
    expected = Image.fromarray(pixels).resize((35, 50), Image.Resampling.BOX).resize((17, 25), Image.Resampling.BOX)
    expected = expected.resize((16, round(25 * 16 / 17)), Image.Resampling.BICUBIC)
    top = (expected.height - 16) // 2
    np.testing.assert_array_equal(square(Image.fromarray(pixels), 16), np.asarray(expected)[top : top + 16])
