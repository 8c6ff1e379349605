"""Images of every kind of source have one order and are read by position; mistakes are named."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dis_scale.data import images, shards, tars
from dis_scale.data.mixing import permutation
from dis_scale.data.sources import Source, load_subset, open_source
from dis_scale.process.errors import DisScaleError, StorageAway, StorageError, UndecodableImage, UserError
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sweep, extractors
from tests.conftest import TINY
from tests.support import labelled_images
from tests.support.labelled_images import CLASSES, KINDS, LABELS, data, png


def test_the_digits_are_complete() -> None:
    source = open_source(data({"kind": "digits"}, 10))
    assert (len(source), source.pixels(0, 32).shape) == (1797, (32, 32, 3))
    assert sorted(source.names) == [f"digits/{i:04d}" for i in range(1797)]


def order_of(source: Source) -> list[int]:
    """The number of the picture at each position."""
    return permutation(len(source)).tolist() if source.mixed else list(range(len(source)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_pictures_in_its_order_or_the_mixed_one(kind: str, store_url: str) -> None:
    source = open_source(data(KINDS[kind](open_folder(store_url) / "images")))
    order = order_of(source)
    assert source.mixed == (kind in ("class_folders", "csv_file"))
    assert list(source.labels) == [LABELS[i] for i in order]
    assert source.label_names == (["0", "1"] if kind == "webdataset_cls" else CLASSES)
    assert len(set(source.names)) == len(LABELS)
    expected = [images.decode(png(i), "", 16) for i in order]
    ranges = list(source.read_ranges(range(1, 7), most=4))
    assert [i for part in ranges for i in part] == list(range(1, 7))
    decoded = [image for part in ranges for image in source.decoded(part, 16)]
    for i, image in enumerate(decoded, 1):
        np.testing.assert_array_equal(image, expected[i])
        np.testing.assert_array_equal(source.pixels(i, 16), expected[i])


def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Record (path, bytes) of each read from storage."""
    seen, read = [], Folder.read

    def counted(self: Folder, path: str, *span: int) -> bytes:
        content = read(self, path, *span)
        seen.append((path, len(content)))
        return content

    monkeypatch.setattr(Folder, "read", counted)
    return seen


def test_neighbours_in_a_tar_are_one_range_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(data(labelled_images.webdataset_cls(open_folder(tmp_path))))
    seen = reads(monkeypatch)
    source.decoded(range(1, 4), 16)
    ((name, size),) = seen
    assert name == "a.tar"
    assert size < sum(len(png(i)) + 3 * 1024 for i in range(1, 4))
    seen.clear()
    source.pixels(5, 16)
    assert seen == [("b.tar", len(png(5)))]


def test_an_image_longer_than_a_read_is_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photograph of over 8 MiB at the begin of a shard would be an empty read, and end each attempt."""
    source = open_source(data(labelled_images.webdataset_cls(open_folder(tmp_path))))
    monkeypatch.setattr(tars, "SPAN_BYTES", 10)
    ranges = list(source.read_ranges(range(len(source)), 16))
    assert ranges == [range(n, n + 1) for n in range(len(source))]
    assert all(isinstance(image, np.ndarray) for each in ranges for image in source.decoded(each, 16))


def test_a_sequential_read_loads_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = open_folder(tmp_path)
    big = [np.random.default_rng(i).bytes(2**21) for i in range(6)]
    root.write("x.parquet", labelled_images.parquet([(b, 0) for b in big]))
    source = open_source(data({"kind": "parquet", "url": root.url}))
    seen = reads(monkeypatch)
    assert [source.read([entry])[0] for entry in source.listing] == big
    assert sum(size for _, size in seen) < 2 * sum(map(len, big))


def test_number_labels_are_kept_and_names_are_sorted(tmp_path: Path) -> None:
    root = open_folder(tmp_path)
    root.write("n.csv", b"path,label\na.png,10\nb.png,2\n")
    root.write("w.csv", b"path,label\na.png,z10\nb.png,z2\n")
    for name in ("a.png", "b.png"):
        root.write(name, png(1))
    numbers, named = (open_source(data({"kind": "csv", "url": f"{root}/{name}.csv"}, n)) for name, n in (("n", 11), ("w", 2)))
    order = permutation(2).tolist()
    assert list(numbers.labels) == [[10, 2][i] for i in order]
    assert (list(named.labels), named.label_names) == (order, ["z10", "z2"])
    root.write("f.tar", labelled_images.tar({"2/a.png": png(1), "10/b.png": png(1)}))
    assert open_source(data({"kind": "tar", "url": f"{root}/f.tar", "label": "folder"})).label_names == ["10", "2"]


def test_paths_of_a_csv_may_be_urls_if_a_setting_allows_it(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in "xyz":
        (tmp_path / f"elsewhere/{name}.png").write_bytes(png(0))
    lines = ["path,label", f"{tmp_path}/elsewhere/x.png,0", f"file://{tmp_path}/elsewhere/y.png,1", "../elsewhere/z.png,1"]
    open_folder(tmp_path).write("lists/l.csv", "\n".join(lines).encode())
    refusing = data({"kind": "csv", "url": f"{tmp_path}/lists/l.csv"})
    allowing = refusing.model_copy(update={"csv_outside": "allow"})
    source = open_source(allowing, open_folder(tmp_path))
    np.testing.assert_array_equal(source.pixels(0, 16), source.pixels(1, 16))
    np.testing.assert_array_equal(source.pixels(0, 16), source.pixels(2, 16))
    listed = open_source(refusing, open_folder(tmp_path))
    with pytest.raises(UserError, match=r"l.csv: image .*elsewhere/[xyz].png is outside the CSV's folder; .*csv_outside=allow"):
        listed.pixels(0, 16)


@pytest.mark.parametrize("again", ["{0}/l/0.png", "file://{0}/l/0.png", "../l/0.png", "{0}/./l//0.png"])
def test_an_image_under_two_paths_of_a_csv_is_one(again: str, tmp_path: Path) -> None:
    open_folder(tmp_path).write("l/0.png", png(0))
    open_folder(tmp_path).write("l/l.csv", f"path,label\n0.png,0\n{again.format(tmp_path)},1\n".encode())
    with pytest.raises(UserError, match=r"l.csv: lines 2 and 3 name the same image, of 1 such lines"):
        open_source(data({"kind": "csv", "url": f"{tmp_path}/l/l.csv"}, csv_outside="allow"))


@pytest.mark.parametrize("path", ["/x.png", "file:///x.png"])
def test_a_path_below_the_root_is_not_below_the_current_folder(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").write_bytes(png(0))
    (tmp_path / "l.csv").write_text(f"path,label\n{path},0\n")
    with pytest.raises(UserError, match=r"1 of its images are not there: .*x.png \(line 2\)"):
        open_source(data({"kind": "csv", "url": f"{tmp_path}/l.csv"}, 1, csv_outside="allow"))


def test_a_point_in_a_path_of_a_csv_is_its_folder(store_url: str) -> None:
    root = open_folder(store_url)
    root.write("a/0.png", png(0))
    root.write("l.csv", b"path,label\n./a//0.png,0\n")
    assert open_source(data({"kind": "csv", "url": f"{root}/l.csv"}, 1)).pixels(0, 16).shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_names_of_images_mean_nothing_to_the_file_system(kind: str, store_url: str) -> None:
    """Of `a*.png` fsspec would read `ab.png`, if there is no other; `zip::a.png` would be a file of an archive."""
    root, names = open_folder(store_url), ["a*.png", "zip::a.png", "a[b].png", "a?.png", "a b#%20.png"]
    for number, name in enumerate(names):
        root.write(f"0/{name}", png(number))
    root.write("0/ab.png", png(9))
    lines = [f"0/{name},0" for name in [*names, "ab.png"]]
    root.write("l.csv", "\n".join(["path,label", *lines]).encode())
    source = open_source(data({"kind": kind, "url": store_url + ("/l.csv" if kind == "csv" else "")}, 1))
    for name, number in zip([*names, "ab.png"], [*range(len(names)), 9], strict=True):
        position = list(source.names).index(f"0/{name}")
        np.testing.assert_array_equal(source.pixels(position, 16), images.decode(png(number), "", 16))


@pytest.mark.parametrize("path", ["../x.png", "a/../../x.png", "..", "/etc/passwd", "file:///etc/passwd", "s3://other/x.png"])
def test_a_csv_may_not_name_files_outside_its_folder(path: str, tmp_path: Path) -> None:
    open_folder(tmp_path).write("lists/l.csv", f"path,label\na..b/x.png,0\n{path},1\n".encode())
    with pytest.raises(UserError) as caught:
        open_source(data({"kind": "csv", "url": f"{tmp_path}/lists/l.csv"}))
    assert f"{tmp_path}/lists/l.csv: image {path} is outside the CSV's folder; if the CSV is yours, --set" in str(caught.value)


@pytest.mark.parametrize("kind", ["class_folders", "csv_file", "webdataset_cls"])
def test_a_huge_file_is_no_image_and_is_not_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(data(KINDS[kind](open_folder(tmp_path) / "images")))

    def allow(most_bytes: int) -> None:
        for module in (images, tars):
            monkeypatch.setattr(module, "IMAGE_BYTES", most_bytes)

    allow(len(png(0)))
    assert source.pixels(0, 16).shape == (16, 16, 3)
    allow(50)
    seen = reads(monkeypatch)
    with pytest.raises(UndecodableImage, match=r"cannot be decoded: it has over 50 bytes; repair or remove it"):
        source.pixels(0, 16)
    assert [size for _, size in seen] == [51]


def test_a_line_without_end_is_no_csv(tmp_path: Path) -> None:
    open_folder(tmp_path).write("l.csv", b"path,label\na.png,0\n" + b"x" * (2**20 + 1) + b",1\n")
    with pytest.raises(UserError, match=r"l.csv: not a CSV of images: a line has over 1,048,576 characters"):
        open_source(data({"kind": "csv", "url": f"{tmp_path}/l.csv"}))


def test_a_huge_row_group_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_folder(tmp_path).write("x.parquet", labelled_images.parquet([(png(i), i % 2) for i in range(6)]))
    source = open_source(data({"kind": "parquet", "url": str(tmp_path)}))
    monkeypatch.setattr("dis_scale.data.parquet.GROUP_BYTES", 100)
    words = r"x.parquet: row group 0 has [\d,]+ bytes in column 'image.bytes', and 100 are read at most: write smaller row groups"
    with pytest.raises(UserError, match=words):
        source.pixels(0, 16)


SAMPLE = labelled_images.tar({"1.png": png(1), "1.cls": b"0"})
DAMAGED_HEADER = SAMPLE.replace(b"1.cls", b"0.cls", 1)
TWICE = labelled_images.parquet([(png(1), 0)], columns=("image", "label", "label"))
PARQUET = labelled_images.parquet([(png(1), 0)])


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    """A folder of Hugging Face's, above the one with the files."""
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").touch()
    with pytest.raises(UserError, match=r"no files '\*.parquet' in .*; expected .*.parquet, there are README.md, data"):
        open_source(data({"kind": "parquet", "url": str(tmp_path)}))


def test_a_web_server_that_does_not_answer_is_no_missing_file(no_pauses: None) -> None:
    with pytest.raises(StorageAway):
        open_source(data({"kind": "parquet", "url": "http://127.0.0.1:9/x.parquet"}))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("below", ["", "/set"])
def test_a_folder_that_is_called_like_a_file_is_a_folder(kind: str, below: str, store_url: str) -> None:
    """As Spark writes Parquet; beside files it is a sub-folder."""
    url = f"{store_url}{below}/x.{kind}"
    open_folder(url).write(f"part-0.{kind}", SAMPLE if kind == "tar" else PARQUET)
    open_folder(url).write("_SUCCESS", b"x")
    source = open_source(data({"kind": kind, "url": url}))
    assert len(source) == 1
    assert source.left_out.startswith("1 file that data.source.files does not match (_SUCCESS), 1 class without images")
    if below:
        open_folder(store_url).write(f"set/a.{kind}", SAMPLE if kind == "tar" else PARQUET)
        beside = open_source(data({"kind": kind, "url": store_url + below}))
        assert len(beside) == 1
        assert beside.left_out.startswith(f"1 sub-folder (x.{kind}), 1 class without images")


@pytest.mark.parametrize("classes", [2, "none"])
def test_a_zip_is_no_folder(classes: int | str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").touch()
    with pytest.raises(UserError, match=r"a.zip is a file: give a folder of images \(unpack a zip\)"):
        open_source(data({"kind": "folder", "url": f"{tmp_path}/a.zip"}, classes))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("folder", r"data.source.url: no images in class folders below .*/none; expected .*/none/<class>/<image>.png"),
        ("tar", r"data.source.url: no files '\*.tar' in .*/none; expected .*/none/<name>.tar"),
        ("parquet", r"data.source.url: no files '\*.parquet' in .*/none; expected .*/none/<name>.parquet"),
        ("csv", r"data.source.url: no file .*/none"),
    ],
)
def test_a_source_without_images_is_named(tmp_path: Path, kind: str, words: str) -> None:
    with pytest.raises(DisScaleError, match=words):
        open_source(data({"kind": kind, "url": f"{tmp_path}/none"}))


@pytest.mark.parametrize(
    ("name", "content", "settings", "words"),
    [
        (
            "a.tar", labelled_images.tar({"1.png": png(1)}), {},
            r"a.tar: 1.png has no label: expected a .cls next to it with one; otherwise set data.num_classes: none, or",
        ),
        (
            "a.tar", labelled_images.tar({"1.png": png(1), "1.json": b'{"class": 1}'}), {"label": "json"},
            r"a.tar: 1.json: no label 'label': KeyError: 'label'",
        ),
        (
            "a.tar", labelled_images.tar({"1.png": png(1), "1.cls": b"\xff"}), {},
            r"a.tar: 1.cls: no label as text: UnicodeDecodeError: ",
        ),
        (
            "a.tar", labelled_images.tar({"1.jpg": png(1), "1.seg.png": png(2), "1.cls": b"0"}), {},
            r"a.tar: 1.jpg and 1.seg.png are two images of one sample: .*; say which .* = jpg, or rename",
        ),
        (
            "a.tar", labelled_images.tar({"img.0.png": png(1), "img.1.png": png(2), "img.cls": b"0"}), {},
            r"two images of one sample: a sample's name ends at its first dot; say which .* = 0.png, or rename them",
        ),
        (
            "a.tar", labelled_images.tar({"cat/1.jpg": png(1), "cat/1.png": png(2)}), {"label": "folder"},
            r"a.tar: cat/1.jpg and cat/1.png are two images of one sample: .*; say which .* = jpg, or rename them",
        ),
        (
            "a.tar", labelled_images.tar({"1.jpg": png(1), "1.seg.png": png(2)}), {"label": "tar"},
            r"a.tar: 1.jpg and 1.seg.png are two images of one sample: .*; say which .* = jpg, or rename them",
        ),
        (
            "a.tar", labelled_images.tar({"1.x\nerror: run.png": png(1), "1.y.png": png(2), "1.cls": b"0"}), {},
            r"= x\\nerror: run.png, or rename them",
        ),
        (
            "a.tar", labelled_images.tar({"1.png": png(1), "1.json": b"[" * 10**5}), {"label": "json"},
            r"a.tar: 1.json: no label 'label': RecursionError: ",
        ),
        (
            "a.tar", labelled_images.tar({"1.png": png(1), "1.cls": b"9" * 5000}), {},
            r"image a.tar/1.png: label '9{98}, expected either a name or a number from 0 in all",
        ),
        ("a.parquet", TWICE, {}, r"data.source.label: .*a.parquet has two columns 'label': write it again with one of"),
        ("a.tar", SAMPLE[:700], {}, r"a.tar: not a complete tar: unexpected end of data"),
        ("a.tar", DAMAGED_HEADER, {}, r"a.tar: not a complete tar: .*damaged or truncated at byte "),
        ("a.csv", b"path,class\n1.png,0\n", {}, r"data.source.label: no column 'label' in .*a.csv; it has path, class"),
        (
            "a.csv", b"path,label\n1.png,0\n2.png\n", {},
            r"a.csv: line 3: expected a path and a label, in quotes if it has a comma, got \['2.png', None\]",
        ),
        (
            "a.csv", b"path,label\n1.png,0\n2.png,cat\n", {},
            r"image 2.png: label 'cat', expected either a name or a number from 0 in all",
        ),
        (
            "a.csv", b"path,label\n1.png,01\n2.png,1\n", {},
            r"a.csv: image 2.png: label '1', and '01' before: write numbers in one way",
        ),
        ("a.csv", b"path,label\n1.png,cat\n2.png,nan\n", {}, r"line 3: expected a path and a label, .*got \['2.png', 'nan'\]"),
        (
            "a.csv", b"path;label\n1.png;0\n", {},
            r"data.source.path: no column 'path', and no comma in .*a.csv; it has path;label",
        ),
        ("a.csv", "path,label\n1.png,r\xe4d\n".encode("cp1252"), {}, r"a.csv: not a CSV in UTF-8, as iconv -f WINDOWS-1252"),
        ("a.csv", b"path,label\n1.png,1.0\n2.png,0.0\n", {}, r"image 1.png: label '1.0': write whole numbers from 0, or names"),
        (
            "a.csv", b"path,label\n1.png, \n", {},
            r"a.csv: line 2: expected a path and a label, in quotes if it has a comma, got \['1.png', ''\]",
        ),
        ("a.csv", b"path,label\n1.png,7\n", {}, r"data.num_classes: got 2, but .*a.csv has labels up to 7"),
        (
            "a.parquet", PARQUET, {"label": "class"},
            r"data.source.label: no column 'class' in .*a.parquet; it has image, label",
        ),
        (
            "a.parquet", PARQUET, {"image": "label"},
            r"data.source.image: column 'label' of .*a.parquet is int64, expected bytes of images",
        ),
        (
            "a.parquet", PARQUET, {"label": "labels"},
            r"data.source.label: no column 'labels' \(did you mean 'label'\?\) in .*a.parquet; it has image, label",
        ),
        (
            "a.parquet", labelled_images.parquet([(None, 0)]), {},
            r"data.source.image: column 'image' of .*a.parquet has no bytes, only paths: write the file again with",
        ),
        ("a.parquet", b"PAR1 nothing", {}, r"a.parquet: not a complete Parquet file: "),
        (
            "a.parquet", labelled_images.parquet([(png(1), 2)]), {},
            r"image a.parquet#0: label 2, expected a class from 0 to 1",
        ),
    ],
)  # fmt: skip
def test_mistakes_in_a_source_are_named(tmp_path: Path, name: str, content: bytes, settings: dict[str, str], words: str) -> None:
    (tmp_path / name).write_bytes(content)
    for image in ("1.png", "2.png"):
        (tmp_path / image).write_bytes(png(1))
    kind = name.rpartition(".")[2]
    with pytest.raises(DisScaleError, match=words):
        open_source(data({"kind": kind, "url": f"{tmp_path}/{name}" if kind == "csv" else str(tmp_path), **settings}))


def test_a_subset_has_no_period_of_the_sources_order(tmp_path: Path) -> None:
    """Of six classes in turn every sixth image, which classifiers hold out, was all of one class."""
    open_folder(tmp_path).write("x.parquet", labelled_images.parquet([(png(i), i % 6) for i in range(60)], metadata=None))
    settings = data({"kind": "parquet", "url": str(tmp_path)}, 6)
    pictures, labels = load_subset(open_source(settings), settings)
    assert Counter(labels.tolist()) == dict.fromkeys(range(6), 10)
    assert len({*labels[::6].tolist()}) > 3
    assert pictures.shape == (60, settings.resolution, settings.resolution, 3)


def test_frames_with_numbers_behind_a_dot_are_images(tmp_path: Path) -> None:
    """Without labels no two images are of one sample."""
    open_folder(tmp_path).write("a.tar", labelled_images.tar({f"frame.{i:04d}.png": png(i) for i in range(3)}))
    assert len(open_source(data({"kind": "tar", "url": str(tmp_path)}, "none"))) == 3


def test_the_recipe_selects_one_of_several_images_of_a_sample(tmp_path: Path, large_tars: None) -> None:
    """Also in a large tar, which is indexed as it is read."""
    members = {f"{i}.{kind}": png(i) for i in range(2) for kind in ("jpg", "seg.png")} | {"0.cls": b"0", "1.cls": b"1"}
    open_folder(tmp_path).write("a.tar", labelled_images.tar(dict(sorted(members.items()))))
    source = open_source(data({"kind": "tar", "url": str(tmp_path), "image": "jpg"}))
    assert list(source.names) == ["a.tar/0.jpg", "a.tar/1.jpg"]


def test_other_classes_than_the_recipe_says_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.num_classes: got 3, but the source has 2 classes \(cat, dog"):
        open_source(data(labelled_images.class_folders(open_folder(tmp_path)), 3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_image_is_named_and_its_neighbours_are_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    intact = png
    monkeypatch.setattr(labelled_images, "png", lambda i: b"" if i == 2 else intact(i))
    source = open_source(data(KINDS[kind](open_folder(tmp_path))))
    decoded = [image for part in source.read_ranges(range(7), 16) for image in source.decoded(part, 16)]
    ((position, error),) = [(i, image) for i, image in enumerate(decoded) if isinstance(image, UndecodableImage)]
    assert order_of(source)[position] == 2
    assert f"image {source.names[position]} cannot be decoded: it is empty (0 bytes); repair or remove it" in str(error)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"csv_file"}))
def test_a_deleted_image_is_not_reported_as_broken(kind: str, tmp_path: Path) -> None:
    source = open_source(data(KINDS[kind](open_folder(tmp_path))))
    for path in tmp_path.rglob("*.*"):
        path.unlink()
    with pytest.raises(StorageError, match=r" is gone: it was there when the source was listed; .*data.source.version") as caught:
        source.pixels(3, 16)
    assert not isinstance(caught.value, UndecodableImage)


def test_a_tar_that_was_cut_after_it_was_listed_is_not_reported_as_broken_images(store_url: str) -> None:
    """Within the first image; with `undecodable: skip` the images would be left out of the set."""
    root = open_folder(store_url) / "images"
    source = open_source(data(labelled_images.class_folders_in_a_tar(root)))
    root.write("all.tar", root.read("all.tar")[:1500])
    with pytest.raises(StorageError, match=r"all.tar: it was written again after it was listed") as caught:
        source.decoded(range(0, len(source)), 16)
    assert not isinstance(caught.value, UndecodableImage)


def test_hugging_face_without_class_names_gives_numbers(tmp_path: Path) -> None:
    root = open_folder(tmp_path)
    root.write("x.parquet", labelled_images.parquet([(png(0), 1)], metadata=None))
    assert open_source(data({"kind": "parquet", "url": root.url})).label_names == ["0", "1"]
    root.write("x.parquet", labelled_images.parquet([(png(0), "b"), (png(1), "a")], metadata=None))
    named = open_source(data({"kind": "parquet", "url": root.url}))
    assert (list(named.labels), named.label_names) == ([1, 0], ["a", "b"])


@pytest.mark.parametrize("metadata", [[], {"info": None}, {"info": {"features": {"label": {"_type": "ClassLabel", "names": 3}}}}])
def test_hugging_faces_metadata_of_another_form_is_as_if_there_was_none(metadata: Any, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(labelled_images.parquet([(png(0), 1)], metadata=metadata))
    assert open_source(data({"kind": "parquet", "url": str(tmp_path)})).label_names == ["0", "1"]


def test_labels_in_json_may_be_numbers_but_not_lists(tmp_path: Path) -> None:
    root = open_folder(tmp_path)
    source = {"kind": "tar", "url": root.url, "label": "json"}
    root.write("x.tar", labelled_images.tar({"1.png": png(1), "1.json": json.dumps({"label": 1}).encode()}))
    assert list(open_source(data(source)).labels) == [1]
    root.write("x.tar", labelled_images.tar({"1.png": png(1), "1.json": json.dumps({"label": [1]}).encode()}))
    with pytest.raises(UserError, match=r"x.tar: 1.json: label \[1\], expected a number or a name"):
        open_source(data(source))


def test_images_are_cropped_as_the_recipe_says_in_latents_of_their_own(tmp_path: Path) -> None:
    """The listing is shared: it has no pixels."""
    url = labelled_images.class_folders(open_folder(tmp_path / "images"))["url"]
    settings = [f"data.source={{kind: folder, url: {url}}}", "data.num_classes=2", f"storage.root={tmp_path}"]
    plain, cropped = (sweep_of(reading.load(TINY, [*settings, *more])) for more in ([], ["data.crop=[2, 4, 16]"]))
    assert shards.latents_folder(plain, "v") != shards.latents_folder(cropped, "v")
    assert extractors.reference_facts(plain, "x", "w") != extractors.reference_facts(cropped, "x", "w")
    source = open_source(cropped.recipe.data, cropped.store)
    assert source.listing.where == open_source(plain.recipe.data, plain.store).listing.where
    (i,) = (i for i, name in enumerate(source.names) if name.endswith("/3.png"))
    picture = np.asarray(Image.open(io.BytesIO(png(3))))
    np.testing.assert_array_equal(source.pixels(i, 16), picture[4:20, 2:18])


def sweep_of(recipe: Recipe) -> Sweep:
    return Sweep.below(open_folder(recipe.storage.root), recipe)
