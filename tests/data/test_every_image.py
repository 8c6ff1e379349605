"""Every image of a source is encoded once with its label, or named as left out: sources as people have them.

A picture's number is in its pixels; the reader is a plain `tarfile`, and knows nothing of the project.
"""

import io
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dis_scale.data import listing, survey
from dis_scale.data.csv_rows import TAKEN_IN
from dis_scale.data.matching import UNMATCHED
from dis_scale.data.sources import open_source
from dis_scale.process.errors import UndecodableImage, UserError
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep.documents import LatentsManifest
from tests.support.commands import invoke
from tests.support.labelled_images import FEATURES, data, in_shards, parquet, picture, sweep_on, tar
from tests.support.stages import make_latents


class Odd(NamedTuple):
    """A source as people have them: its settings, the label of each picture, what is left out and why, what is refused."""

    settings: dict[str, Any]
    labels: dict[int, int]
    left_out: dict[str, int]
    refused: tuple[str, ...] = ()


def folders(root: Folder) -> Odd:
    numbers = itertools.count()
    labels = dict[int, int]()
    names = ["a/{}.png", "a/deep/{}.PNG", "b.part-1/{}.part-0.png", "linked/{}.webp.png", "\u00e9 *[x]/{}.jfif", "z/{}.ppm"]
    for label, name in enumerate(names):
        for number in itertools.islice(numbers, 20):
            root.write(f"images/{name}".format(number).replace("images/linked", "elsewhere"), picture(number))
            labels[number] = [0, 0, 1, 2, 4, 3][label]
    local = root.local
    assert local is not None
    (local / "images/linked").symlink_to(local / "elsewhere")
    for name in ("a/x.heic", "a/y.heic", "a/notes", "top.png", "a/.hidden.png", ".git/x.png"):
        root.write(f"images/{name}", picture(0))
    left_out = {".heic": 2, "of no known ending": 1, "images beside the class folders": 1, "hidden": 2}
    root.write("images/a/empty.png", b"")
    return Odd({"kind": "folder", "url": f"{root}/images"}, labels, left_out, ("a/empty.png",))


def tars(root: Folder) -> Odd:
    labels = {number: number % 5 for number in range(100)}
    for first in range(0, 100, 50):
        members: dict[str, bytes] = {}
        for number in range(first, first + 50):
            members |= {f"{number}.png": picture(number), f"{number}.cls": str(labels[number]).encode()}
        members |= {f"{first + 49}.txt": b"a caption", "._x.png": b"of a Mac", f"x{first}.png": b"broken", f"x{first}.cls": b"0"}
        root.write(f"images.part-{first}.tar", with_links(tar(members)))
    return Odd(
        {"kind": "tar", "url": root.url},
        labels,
        {".txt": 2, "hidden": 2, "links in tars": 4},
        ("images.part-0.tar/x0.png", "images.part-50.tar/x50.png"),
    )


def with_links(archive: bytes) -> bytes:
    """Add a hard and a symbolic link to a tar."""
    buffer = io.BytesIO(archive)
    with tarfile.open(fileobj=buffer, mode="a") as out:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = kind, "0.png"
            out.addfile(link)
    return buffer.getvalue()


def parquet_files(root: Folder) -> Odd:
    """Structs of bytes and path, the first row group and one more row without bytes; no rows; bytes alone beside other columns."""
    labels = {number: number % 2 for number in range(100)}
    first, second, third = ([(picture(n), labels[n]) for n in range(100) if n % 3 == part] for part in range(3))
    root.write("a.part-0.parquet", parquet([*[(None, 0)] * 7, *first, (None, 1)], group=7))
    root.write("b.parquet", parquet([]))
    root.write("c.parquet", of_bytes(second, pa.large_binary(), pa.array([y for _, y in second], pa.int8())))
    root.write("d.parquet", of_bytes(third, pa.binary(), pa.array([y for _, y in third]).dictionary_encode()))
    for name in ("._c.parquet", "_SUCCESS", "README.md", "deep/e.parquet"):
        root.write(name, b"none")
    nulls = tuple(f"a.part-0.parquet#{row}" for row in (*range(7), 7 + len(first)))
    return Odd({"kind": "parquet", "url": root.url}, labels, {"hidden": 1, UNMATCHED: 2, "sub-folders": 1}, nulls)


def of_bytes(rows: list[tuple[bytes, int]], images: pa.DataType, labels: pa.Array) -> bytes:
    """A file with images that are no structs, between other columns."""
    schema = pa.schema({"image.bytes": pa.string(), "label": labels.type, "image": images}).with_metadata(
        {"huggingface": json.dumps(FEATURES)}
    )
    columns = [pa.array(["another"] * len(rows)), labels, pa.array([x for x, _ in rows], images)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), buffer, row_group_size=11)
    return buffer.getvalue()


def csv(root: Folder) -> Odd:
    labels = {number: number % 5 for number in range(100)}
    for number in labels:
        root.write(f"{number % 3}/x.part-{number}.png", picture(number))
    lines = [f'{number % 3}/x.part-{number}.png, "one, ""two""", "{label}"' for number, label in labels.items()]
    lines[7] = lines[7].replace("one", "a caption\r\nof two lines")
    root.write("labels.csv", "\r\n".join(["\ufeffpath,caption,label", *lines]).encode())
    return Odd({"kind": "csv", "url": f"{root}/labels.csv"}, labels, {TAKEN_IN: 1})


@pytest.mark.parametrize("source", [folders, tars, parquet_files, csv])
def test_every_image_is_encoded_once_or_named(source: Callable[[Folder], Odd], tmp_path: Path) -> None:
    settings, labels, left_out, refused = source(open_folder(tmp_path / "source"))
    sweep = sweep_on(tmp_path, settings, "precompute.shard_images=16", "data.undecodable=skip", classes=max(labels.values()) + 1)
    latents = make_latents(sweep)
    assert in_shards(latents) == Counter(labels.items())
    assert sorted(LatentsManifest.require(latents).refused) == sorted(refused)
    listed = open_source(sweep.recipe.data, sweep.store)
    assert {why: count for why, (count, _) in listed.listing.manifest.left_out.items()} == left_out
    one = {"images beside the class folders": "image beside the class folders", "sub-folders": "sub-folder"} | {
        TAKEN_IN: re.sub("^([a-z]+)s", r"\1", TAKEN_IN)
    }
    words = {one.get(why, why) if count == 1 else why: count for why, count in left_out.items()}
    assert all(f"{count:,} {why} (" in listed.left_out for why, count in words.items())


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_names_that_are_not_utf_8_are_stored_as_escapes(kind: str, tmp_path: Path) -> None:
    """A class, and a broken image; JSON has no room for their bytes."""
    root, members = open_folder(tmp_path / "source"), {"a/1.png": picture(1), "caf\udce9/2.png": picture(2)}
    members |= {"caf\udce9/\udcfe.png": b"broken"}
    for name, content in members.items() if kind == "folder" else ():
        root.write(name, content)
    if kind == "tar":
        root.write("a.tar", tar(members))
    source = {"kind": kind, "url": root.url} | ({"label": "folder"} if kind == "tar" else {})
    sweep = sweep_on(tmp_path, source, "data.undecodable=skip", "precompute.shard_images=16", classes=2)
    sweep.save_recipe()
    latents = make_latents(sweep)
    manifest = LatentsManifest.require(latents)
    assert in_shards(latents) == Counter({(1, 0): 1, (2, 1): 1})
    assert manifest.made_from.label_names == ("a", r"caf\udce9")
    assert manifest.refused == ("a.tar/" * (kind == "tar") + r"caf\udce9/\udcfe.png",)
    before = latents.read("000000.tar")
    latents.write("000000.tar", b"damaged")
    code, output = invoke("data", "repair", sweep.folder.url)
    assert (code, latents.read("000000.tar")) == (0, before), output


def test_half_a_surrogate_pair_in_a_label_of_json_is_an_escape(tmp_path: Path) -> None:
    members = {k: v for i, label in enumerate((r"a\ud800", "b"))
               for k, v in ((f"{i}.png", picture(i)), (f"{i}.json", b'{"label": "%s"}' % label.encode()))}  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar(members))
    source = data({"kind": "tar", "url": str(tmp_path), "label": "json"})
    assert open_source(source, open_folder(tmp_path / "store")).label_names == [r"a\ud800", "b"]


def test_folders_of_a_system_are_no_classes(tmp_path: Path) -> None:
    """Of a disk's root, and of a Synology, which keeps small copies."""
    for folder in ("a", "a/@eaDir/1.png", "lost+found", "$RECYCLE.BIN", "b"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a/1.jpg", "a/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "b/2.jpg"):
        (tmp_path / name).write_bytes(picture(1))
    source = open_source(data({"kind": "folder", "url": str(tmp_path)}))
    assert (source.label_names, sorted(source.names)) == (["a", "b"], ["a/1.jpg", "b/2.jpg"])
    assert source.left_out == "1 hidden (a/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg)"


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_a_pipe_is_no_image_and_nobody_waits_for_it(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a/1.png")
    (tmp_path / "l.csv").write_text("path,label\na/1.png,0\n")
    source = open_source(data({"kind": kind, "url": f"{tmp_path}/l.csv" if kind == "csv" else str(tmp_path)}, 1))
    with pytest.raises(UndecodableImage, match=r"image a/1.png: there is no such file"):
        source.pixels(0, 8)


@pytest.mark.parametrize("image", ["jpg", "JPG", None])
def test_capitals_in_an_ending_mean_nothing(image: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"1.JPG": picture(1), "1.CLS": b"0", "2.Jpg": picture(2), "2.cls": b"1"}))
    source = {"kind": "tar", "url": str(tmp_path)} | ({"image": image} if image else {})
    assert list(open_source(data(source)).labels) == [0, 1]


def test_links_that_lead_nowhere_are_images_that_cannot_be_decoded(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("a/1.png", "b/2.png"):
        open_folder(root).write(name, picture(1))
    links = {"gone.png": "nowhere", "loop.png": f"{root}", "self.png": f"{root}/a/self.png", "loop": f"{root}", "disk": "/nowhere"}
    for name, to in links.items():
        (root / "a" / name).symlink_to(to)
    source = {"kind": "folder", "url": str(root)}
    with pytest.raises(UndecodableImage, match=r"image a/\w+.png: there is no such file; correct the link or the CSV"):
        make_latents(sweep_on(tmp_path, source, "precompute.shard_images=16", classes=2))
    skipping = sweep_on(tmp_path, source, "data.undecodable=skip", "precompute.shard_images=16", classes=2)
    assert in_shards(make_latents(skipping)) == Counter({(1, 0): 1, (1, 1): 1})
    left_out = open_source(skipping.recipe.data).listing.manifest.left_out
    assert {why: count for why, (count, _) in left_out.items()} == {
        "links to a folder around them": 1,
        "links that lead nowhere": 1,
    }
    found = survey.take_survey(root.as_posix(), lambda _: None, lambda *_: None)
    assert (found.count, {each.name for each in found.broken}) == (2, {"a/gone.png", "a/loop.png", "a/self.png"})


def test_parquet_whose_first_row_group_has_only_paths_is_read(tmp_path: Path) -> None:
    """Its other images have bytes; the first is one that cannot be decoded."""
    (tmp_path / "a.parquet").write_bytes(parquet([(None, 0), (picture(1), 1)], group=1))
    source = open_source(data({"kind": "parquet", "url": str(tmp_path)}, undecodable="skip"))
    assert [isinstance(source.decoded(range(i, i + 1), 8)[0], UndecodableImage) for i in range(2)] == [True, False]


def test_an_image_that_a_linked_folder_shows_twice_is_one_image(tmp_path: Path) -> None:
    """torchvision's ImageFolder has it twice, of two classes if the link is one."""
    root = tmp_path / "set"
    open_folder(tmp_path).write("elsewhere/cats/5.png", picture(5))
    for name in ("a/1.png", "a/deep/2.png", "b/3.png", ".store/4.png"):
        open_folder(root).write(name, picture(int(name[-5])))
    for name, to in {"a/again": "deep", "c": ".store", "b/x": f"{tmp_path}/elsewhere", "b/y": f"{tmp_path}/elsewhere/cats"}.items():
        (root / name).symlink_to(to)
    source, twice = {"kind": "folder", "url": str(root)}, "images that a link shows a second time"
    sweep = sweep_on(tmp_path, source, "precompute.shard_images=16", classes=3)
    assert in_shards(make_latents(sweep)) == Counter({(1, 0): 1, (2, 0): 1, (3, 1): 1, (4, 2): 1, (5, 1): 1})
    left_out = open_source(sweep.recipe.data).listing.manifest.left_out
    assert left_out == {twice: (2, "a/again/2.png"), "hidden": (1, ".store/4.png")}
    for link, to, other in (("d", "a", "a"), ("d", "b/x/cats", "b/x/cats")):
        (root / link).symlink_to(to)
        with pytest.raises(UserError, match=f"{other} and {link} in {root} show the same, by the link {link}, which"):
            open_source(data(source, 4))
        assert len(open_source(data(source, "none"))) == 5
        (root / link).unlink()


def test_a_hidden_link_shows_no_image_for_the_first_time(tmp_path: Path) -> None:
    """Programs that keep their files elsewhere have such a link, and links through it."""
    root = tmp_path / "set"
    for name in ("a/1.png", "b/2.png"):
        open_folder(tmp_path / "disk").write(name, picture(1))
    root.mkdir()
    for name, to in {".store": str(tmp_path / "disk"), "a": ".store/a", "b": ".store/b"}.items():
        (root / name).symlink_to(to)
    for classes in (2, "none"):
        assert len(open_source(data({"kind": "folder", "url": str(root)}, classes))) == 2


def test_a_class_folder_whose_disk_is_not_there_is_refused(tmp_path: Path) -> None:
    """The classes after it would have other numbers."""
    for name in ("a/1.png", "c/2.png"):
        open_folder(tmp_path).write(name, picture(1))
    (tmp_path / "b").symlink_to("/nowhere")
    with pytest.raises(UserError, match=r"/b is a link that leads nowhere: mount what it leads to, or delete it"):
        open_source(data({"kind": "folder", "url": str(tmp_path)}, 3))
    assert len(open_source(data({"kind": "folder", "url": str(tmp_path)}, "none"))) == 2


@pytest.mark.parametrize("line", ["0.png,maillot, tank suit", "0.png,a,b,c"])
def test_a_line_of_a_csv_with_more_fields_than_its_header_is_refused(line: str, tmp_path: Path) -> None:
    """`maillot` and `maillot, tank suit` are two classes of ImageNet."""
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "a.csv").write_text(f"path,label\n{line}\n")
    with pytest.raises(UserError, match=r"a.csv: line 2: expected a path and a label, in quotes if it has a comma, got"):
        open_source(data({"kind": "csv", "url": f"{tmp_path}/a.csv"}))
    (tmp_path / "a.csv").write_text("path,label,label\n0.png,0,1\n")
    with pytest.raises(UserError, match=r"a.csv: its header names 'label' twice"):
        open_source(data({"kind": "csv", "url": f"{tmp_path}/a.csv"}))


def test_parquet_files_whose_numbers_mean_other_classes_are_refused(tmp_path: Path) -> None:
    other = {"info": {"features": {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}}}
    for name, metadata in (("a", FEATURES), ("b", other)):
        (tmp_path / f"{name}.parquet").write_bytes(parquet([(picture(0), 0)], metadata=metadata))
    with pytest.raises(UserError, match=r"b.parquet: its classes are dog, cat, those of the first file cat, dog"):
        open_source(data({"kind": "parquet", "url": str(tmp_path)}))


def test_an_image_on_two_lines_of_a_csv_is_refused(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "labels.csv").write_text("path,label\n0.png,0\n1.png,0\n2.png,1\n1.png,1\n0.png,0\n")
    with pytest.raises(UserError, match=r"labels.csv: lines [23] and [56] name the same image, of 2 such lines: leave"):
        open_source(data({"kind": "csv", "url": f"{tmp_path}/labels.csv"}))
    (tmp_path / "labels.csv").write_text("path,label\n0.png,0\n1.png,0\n./0.png,1\na/..//1.png,0\n")
    with pytest.raises(UserError, match=r"labels.csv: lines [23] and [45] name the same image, of 2 such lines: leave"):
        open_source(data({"kind": "csv", "url": f"{tmp_path}/labels.csv"}, csv_outside="allow"))


def test_all_missing_files_of_a_csv_are_named_at_once_or_skipped(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    lines = [f"{number}.png,0" for number in range(7)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *lines, "gone/x.png,1"]))
    source = {"kind": "csv", "url": f"{tmp_path}/labels.csv"}
    with pytest.raises(UserError, match=r"3 of its images are not there: 5.png \(line 7\), 6.png \(line 8\), gone/x.png"):
        open_source(data(source))
    skipping = open_source(data(source, undecodable="skip"))
    decoded = skipping.decoded(range(8), 8)
    missing = {skipping.names[i] for i, image in enumerate(decoded) if isinstance(image, UndecodableImage)}
    assert missing == {"5.png", "6.png", "gone/x.png"}


@pytest.mark.parametrize("path", ["folder", "1.png/x.png", "x" * 300 + ".png", "a\0b.png"])
def test_a_line_of_a_csv_that_names_no_file_is_a_missing_one(path: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "1.png").write_bytes(picture(1))
    (tmp_path / "labels.csv").write_text(f"path,label\n1.png,0\n{path},1\n")
    source = open_source(data({"kind": "csv", "url": f"{tmp_path}/labels.csv"}, undecodable="skip"))
    broken = [image for image in source.decoded(range(2), 8) if isinstance(image, UndecodableImage)]
    assert ["there is no such file" in str(each) for each in broken] == [True]


def test_two_colons_in_a_path_are_refused(tmp_path: Path) -> None:
    """fsspec reads a chain of stores: here in a folder, in a line of a CSV."""
    (tmp_path / "a::b/cat").mkdir(parents=True)
    (tmp_path / "a::b/cat/1.png").write_bytes(picture(1))
    (tmp_path / "labels.csv").write_text("path,label\na::b/cat/1.png,0\n")
    for kind, url in (("folder", f"{tmp_path}/a::b"), ("csv", f"{tmp_path}/labels.csv")):
        with pytest.raises(UserError, match=r"storage .*a::b.*: got '::' in the path of a folder.*: rename the folder"):
            open_source(data({"kind": kind, "url": url}, 1))


def test_a_relative_folder_is_another_source_in_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for project in ("a", "b"):
        (tmp_path / project).mkdir()
        monkeypatch.chdir(tmp_path / project)
        keys += [data({"kind": "folder", "url": url}).declared for url in ("photos", f"{tmp_path}/{project}/photos/")]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert listing.folder_of(open_folder(tmp_path), keys[0]) != listing.folder_of(open_folder(tmp_path), keys[2])
