"""Class folders as disks and mounts really have them: without images, gone while they are listed, unreadable."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dis_scale.data.sources import open_source
from dis_scale.process.errors import DisScaleError, StorageAway, StorageError, UserError
from tests.conftest import Scanning
from tests.support.labelled_images import data, png


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(number))
    return tmp_path


def source(folders: Path) -> dict[str, str]:
    return {"kind": "folder", "url": str(folders)}


def test_a_class_without_images_is_named(folders: Path) -> None:
    """It may be a mount whose disk is not there, or a copy that was interrupted."""
    (folders / "d").mkdir()
    opened = open_source(data(source(folders), num_classes=4))
    assert "1 class without images (d)" in str(opened.left_out)


def test_a_folder_around_the_classes_is_offered(folders: Path) -> None:
    (folders / "photos").mkdir()
    for name in "abc":
        (folders / name).rename(folders / "photos" / name)
    with pytest.raises(UserError, match=r"the source has 1 class \(photos\); if the folders in photos are the classes, give"):
        open_source(data(source(folders), num_classes=3))


def test_a_class_that_vanishes_while_it_is_listed_is_no_empty_one(folders: Path, scanning: Callable[[Scanning], None]) -> None:
    scanning(lambda path, real: real(f"{path}-gone" if path.endswith("/b") else path))
    with pytest.raises(StorageError, match="/b/: it was there, and is gone while it is listed: list it again"):
        open_source(data(source(folders), num_classes=3))


@pytest.mark.parametrize(("number", "kind"), [(errno.EHOSTDOWN, StorageAway), (errno.EACCES, StorageError)])
def test_a_class_that_cannot_be_asked_for_is_no_file(
    folders: Path, scanning: Callable[[Scanning], None], no_pauses: None, number: int, kind: type[DisScaleError]
) -> None:
    (folders / "d").symlink_to(folders / "a")

    class Entry:
        name, path = "d", str(folders / "d")

        def is_dir(self) -> bool:
            raise OSError(number, os.strerror(number))

    scanning(lambda path, real: [*real(path), Entry()] if path == str(folders) else real(path))
    with pytest.raises(kind, match=os.strerror(number)):
        open_source(data(source(folders), num_classes=4))
