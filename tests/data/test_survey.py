"""A first look at a folder of images: what is counted, and every broken image by name."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dis_scale.data.survey import Survey, describe, take_survey
from dis_scale.process.errors import UserError


def image(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 9, np.uint8)).save(path)


def surveyed(folder: Path) -> Survey:
    return take_survey(str(folder), lambda _: None, lambda *_: None)


def test_class_folders_sizes_and_progress(tmp_path: Path) -> None:
    for i in range(30):
        image(tmp_path / "cat" / f"{i}.png", 40, 64 if i else 20)
    image(tmp_path / "dog" / "1.PNG", 100, 300)
    (tmp_path / "empty").mkdir()
    image(tmp_path / ".hidden" / "1.png", 5, 5)
    image(tmp_path / "beside.png", 7, 7)
    reports: list[tuple[int, int]] = []
    found = take_survey(str(tmp_path), lambda _: None, lambda done, total: reports.append((done, total)))
    assert found.classes == {"cat": 30, "dog": 1, "empty": 0}
    assert (found.sides, found.count, found.median_side) == ({40: 29, 20: 1, 100: 1}, 31, 40)
    assert found.share_of(40) == 30 / 31
    assert (found.broken, found.beside) == ([], 1)
    assert reports == [(n, 31) for n in range(1, 32)]
    lines = describe(found)
    assert "classes  3: cat 30, dog 1, empty 0" in lines
    assert "sizes    shorter side 20 to 100 pixels, median 40" in lines
    assert "empty    class folders without an image that can be decoded: empty; each stays a class: delete or fill it" in lines
    assert "unused   1 image beside the class folders" in lines


def test_deeper_images_belong_to_the_first_folder_and_parts_of_a_set_are_no_classes(tmp_path: Path) -> None:
    root = tmp_path / "data/set"
    for name in ("train/cat/1.png", "train/dog/deep/2.png"):
        image(root / name, 40, 40)
    assert surveyed(tmp_path).nested == "data/set/train"
    found = surveyed(root)
    assert (found.classes, found.nested) == ({}, "train")
    assert f"nested   train has folders of images: for these as classes, give {root}/train" in describe(found)
    assert surveyed(root / "train").classes == {"cat": 1, "dog": 1}
    image(root / "val" / "cat" / "3.png", 40, 40)
    with pytest.raises(UserError, match=rf"train and val in {root} are parts of a set: give the folder of one of them"):
        surveyed(root)


def test_images_without_class_folders_are_unlabelled(tmp_path: Path) -> None:
    image(tmp_path / "1.png", 40, 40)
    image(tmp_path / "only" / "2.png", 40, 40)
    found = surveyed(tmp_path)
    assert (found.classes, found.count, found.beside) == ({}, 2, 0)
    assert "classes  none: the images are not in two or more class folders" in describe(found)


def test_every_broken_image_is_named_at_once(tmp_path: Path) -> None:
    image(tmp_path / "good.png", 40, 40)
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:-30])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"<html>")
    found = surveyed(tmp_path)
    assert [each.name for each in found.broken] == ["cut.png", "empty.jpg", "text.jpg"]
    assert found.broken[1].why == "it is empty (0 bytes)"
    assert found.broken[2].why == "it is in none of the formats that are read"
    assert all(each.why for each in found.broken)
    assert "broken   3 of 4 images cannot be decoded" in describe(found)


def test_names_that_are_not_utf8_can_be_printed(tmp_path: Path) -> None:
    image(tmp_path / "a" / "good.png", 40, 40)
    image(tmp_path / os.fsdecode(b"\xff") / "good.png", 40, 40)
    (tmp_path / "a" / os.fsdecode(b"\xfe.png")).write_bytes(b"")
    found = surveyed(tmp_path)
    assert found.classes == {"a": 1, "\\udcff": 1}
    assert [each.name for each in found.broken] == ["a/\\udcfe.png"]


def test_a_folder_without_a_good_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        UserError, match=rf"no images in {tmp_path} or its folders \(.jpg, .*\); .*a recipe .*; there are 1 .txt \(notes.txt\)$"
    ):
        surveyed(tmp_path)
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of its 1 images can be decoded; the first: 1\.png it is empty"):
        surveyed(tmp_path)
