"""Images without labels: from sources that have none, and from labelled ones whose labels are not read."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dis_scale.data.images import square
from dis_scale.data.sources import open_source
from dis_scale.process.errors import UserError
from dis_scale.storage.folder import Folder, open_folder
from tests.support import labelled_images, store_requests
from tests.support.labelled_images import KINDS, data, png


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_ignored_without_classes(kind: str, tmp_path: Path) -> None:
    """The same images as with labels, in a listing of their own: both can be below one root."""
    source, store = KINDS[kind](open_folder(tmp_path) / "images"), open_folder(tmp_path / "store")
    labelled, unlabelled = (open_source(data(source, classes), store) for classes in (2, "none"))
    assert (list(unlabelled.labels), unlabelled.label_names) == ([0] * 7, [])
    assert list(unlabelled.names) == list(labelled.names)
    np.testing.assert_array_equal(unlabelled.pixels(3, 16), labelled.pixels(3, 16))
    assert unlabelled.listing.where != labelled.listing.where


def unlabelled_folder(root: Folder) -> dict[str, Any]:
    for i in range(3):
        root.write(f"{i}.png", png(i))
    root.write("more/3.png", png(3))
    root.write("notes.txt", b"not an image")
    return {"kind": "folder", "url": root.url}


def unlabelled_tar(root: Folder) -> dict[str, Any]:
    root.write("a.tar", labelled_images.tar({f"{i}.png": png(i) for i in range(4)}))
    return {"kind": "tar", "url": root.url}


def unlabelled_parquet(root: Folder) -> dict[str, Any]:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array([png(i) for i in range(4)])}), buffer, row_group_size=3)
    root.write("a.parquet", buffer.getvalue())
    return {"kind": "parquet", "url": root.url}


def unlabelled_csv(root: Folder) -> dict[str, Any]:
    for i in range(4):
        root.write(f"{i}.png", png(i))
    root.write("paths.csv", b"path\n0.png\n1.png\n2.png\n3.png\n")
    return {"kind": "csv", "url": f"{root}/paths.csv"}


@pytest.mark.parametrize("unlabelled", [unlabelled_folder, unlabelled_tar, unlabelled_parquet, unlabelled_csv])
def test_unlabelled_images_need_no_label(unlabelled: Callable[[Folder], dict[str, Any]], store_url: str) -> None:
    images = unlabelled(open_folder(store_url) / "images")
    source = open_source(data(images, "none"))
    pictures = [source.pixels(i, 16).tobytes() for i in range(len(source))]
    expected = [square(Image.open(io.BytesIO(png(i))), 16).tobytes() for i in range(4)]
    assert sorted(pictures) == sorted(expected)
    with pytest.raises(UserError):
        open_source(data(images, 2))


def test_an_unlabelled_folder_is_listed_once(tmp_path: Path) -> None:
    """In S3 a list of its folders is one of all files: a million names are a thousand requests."""
    source = data(labelled_images.class_folders(open_folder(tmp_path)), "none")
    with store_requests.noted() as requests:
        assert len(open_source(source)) == len(labelled_images.LABELS)
    assert [path for verb, path in requests if verb == "list"] == [str(tmp_path), f"{tmp_path}/cat", f"{tmp_path}/dog"]
