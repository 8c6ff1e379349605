"""Every image of a source is encoded once with its label, or named as left out: sources as people have them.

A picture's number is in its pixels; the reader is a plain `tarfile`, and knows nothing of the project.
"""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import re
import subprocess
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dis_scale.data import listing, survey
from dis_scale.data.csv_rows import TAKEN_IN
from dis_scale.data.sources import open_source
from dis_scale.data.tars import UNMATCHED
from dis_scale.process.errors import StorageError, UndecodableImage, UserError
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep.documents import LatentsManifest
from tests.data.test_mixing import sweep_of
from tests.support.commands import invoke
from tests.support.labelled_images import FEATURES, data, parquet, tar
from tests.support.stages import make_latents

LARGE = np.random.default_rng(0).bytes(2 * 10**6)
"""Long enough that a hole or a second tar lies beyond one window of the listing."""


def picture(number: int) -> bytes:
    """An image whose colour is its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def in_shards(latents: Folder) -> Counter[tuple[int, int]]:
    """The (number of the picture, label) of all samples."""
    found = Counter[tuple[int, int]]()
    for name in latents.list():
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(latents.read(name))) as shard:
                files = {member.name: shard.extractfile(member).read() for member in shard}  # type: ignore[union-attr]
            for key in {name.partition(".")[0] for name in files}:
                pixels = np.load(io.BytesIO(files[f"{key}.moments.npy"]))[0, :2, 0, 0].astype(float)
                red, green = np.round((pixels + 1) * 127.5).astype(int).tolist()
                found[red + 256 * green, json.loads(files[f"{key}.json"])["label"]] += 1
    return found


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
    sweep = sweep_of(tmp_path, settings, "precompute.shard_images=16", "data.undecodable=skip", classes=max(labels.values()) + 1)
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
    sweep = sweep_of(tmp_path, source, "data.undecodable=skip", "precompute.shard_images=16", classes=2)
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


def test_what_tars_have_twice_or_from_a_mac_or_that_is_beside_them_is_left_out(tmp_path: Path) -> None:
    """`tar --update` appends a changed file; a Mac adds a folder; `files` selects; a reader of tars sees no sub-folder."""
    (tmp_path / "first").mkdir()
    for number, label in ((1, b"0"), (2, b"1"), (3, b"0")):
        (tmp_path / f"first/{number}.png").write_bytes(picture(number))
        (tmp_path / f"first/{number}.cls").write_bytes(label)
    for changed in (False, True):
        if changed:
            (tmp_path / "first/1.png").write_bytes(picture(9))
            (tmp_path / "first/1.cls").write_bytes(b"1")
            for file in (tmp_path / "first").iterdir():
                os.utime(file, (2e9, 2e9) if file.stem == "1" else (1e9, 1e9))
        subprocess.run(["tar", "--update" if changed else "--create", "-f", "../part-a.tar", "--sort=name", "."],
                       cwd=tmp_path / "first", check=True)  # fmt: skip
    root = open_folder(tmp_path / "set")
    root.write("part-a.tar", (tmp_path / "part-a.tar").read_bytes())
    root.write("part-b.tar", tar({"4.png": picture(4), "4.cls": b"0", "__MACOSX/4.png": b"x", ".git/5.png": picture(5)}))
    for name in ("deep/part-c.tar", "notes", ".DS_Store", "other.tar"):
        root.write(name, b"")
    source = {"kind": "tar", "url": root.url, "files": "part-*.tar"}
    sweep = sweep_of(tmp_path, source, "precompute.shard_images=16", classes=2)
    assert in_shards(make_latents(sweep)) == Counter({(9, 1): 1, (2, 1): 1, (3, 0): 1, (4, 0): 1})
    left_out = open_source(sweep.recipe.data, sweep.store).listing.manifest.left_out
    assert {why: count for why, (count, _) in left_out.items()} == {
        "files that their tar has again": 2,
        "hidden": 3,
        "sub-folders": 1,
        "files that data.source.files does not match": 2,
    }


def test_a_folder_of_a_tar_is_no_class_if_it_is_the_tar_itself(tmp_path: Path) -> None:
    """`tar -c .` writes `./` before each name, other programs do not: a sample may have both."""
    both = {"./1.png": picture(1), "1.cls": b"1", "a//2.png": picture(2), "a/./2.cls": b"0"}
    (tmp_path / "a.tar").write_bytes(tar(both))
    assert list(open_source(data({"kind": "tar", "url": str(tmp_path)})).labels) == [1, 0]
    (tmp_path / "a.tar").write_bytes(tar({"./cat/1.png": picture(1), "./dog/2.png": picture(2), "./3.png": picture(3)}))
    with pytest.raises(UserError, match=r"a.tar: 3.png has no label: expected a folder around it"):
        open_source(data({"kind": "tar", "url": str(tmp_path), "label": "folder"}, 3))


def test_folders_of_a_system_are_no_classes(tmp_path: Path) -> None:
    """Of a disk's root, and of a Synology, which keeps small copies."""
    for folder in ("a", "a/@eaDir/1.png", "lost+found", "$RECYCLE.BIN", "b"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a/1.jpg", "a/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "b/2.jpg"):
        (tmp_path / name).write_bytes(picture(1))
    source = open_source(data({"kind": "folder", "url": str(tmp_path)}))
    assert (source.label_names, sorted(source.names)) == (["a", "b"], ["a/1.jpg", "b/2.jpg"])
    assert source.left_out == "1 hidden (a/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg)"


@pytest.mark.parametrize("key", ["a//2.png", "/b/3.png"])
def test_a_key_with_an_empty_folder_is_refused_by_name(key: str, bucket: str) -> None:
    """Its folder would be a class of another's name."""
    for name in ("a/1.png", key):
        open_folder(bucket).write(f"im/{name}", picture(1))
    with pytest.raises(UserError, match=rf"im/{key}: an empty name of a folder \(//\): rename it or delete it"):
        open_source(data({"kind": "folder", "url": f"{bucket}/im"}))


@pytest.mark.parametrize("kind", [b"M", b"Z", tarfile.FIFOTYPE])
def test_a_member_of_a_tar_that_is_no_file_is_counted(kind: bytes, tmp_path: Path) -> None:
    """Such as the rest of a file that began in another volume, or of a letter that no program knows."""
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        for name, type_ in (("folder", tarfile.DIRTYPE), ("1.png", tarfile.REGTYPE), ("2.png", kind)):
            member = tarfile.TarInfo(name)
            member.type = type_
            out.addfile(member)
    source = open_source(data({"kind": "tar", "url": str(tmp_path), "label": "tar"}, 1))
    assert (list(source.names), source.left_out) == (["a.tar/1.png"], "1 member of tars that are no files (a.tar/2.png)")


def test_a_huge_json_that_is_no_label_is_counted(tmp_path: Path) -> None:
    """Such as the annotations of a set."""
    (tmp_path / "a.tar").write_bytes(tar({"all.json": bytes(17 * 2**20), "cat/1.png": picture(1)}))
    source = {"kind": "tar", "url": str(tmp_path), "label": "folder"}
    assert open_source(data(source, 1)).left_out == "1 .json (a.tar/all.json)"
    assert len(open_source(data(source | {"label": "json"}, "none"))) == 1
    with pytest.raises(StorageError, match=r"a.tar: all.json has 17,825,792 bytes, and a label at most 16,777,216"):
        open_source(data(source | {"label": "json"}))


@pytest.mark.parametrize("classes", [1, "none"])
def test_labels_without_an_image_are_counted(classes: int | str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"0.cls": b"0", "1.cls": b"0", "1.png": picture(1), "2.cls": b"\xff"}))
    source = open_source(data({"kind": "tar", "url": str(tmp_path)}, classes))
    assert (list(source.names), source.left_out) == (["a.tar/1.png"], "2 labels without an image (a.tar/0.cls)")


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


@pytest.mark.parametrize(("pack", "program"), [(gzip.compress, "gunzip"), (bz2.compress, "bunzip2"), (lzma.compress, "unxz")])
def test_a_compressed_tar_is_named_by_its_bytes(pack: Callable[[bytes], bytes], program: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(pack(tar({"1.png": picture(1), "1.cls": b"0"})))
    with pytest.raises(StorageError, match=rf"a.tar: it is compressed, and images are read by byte range: {program} it"):
        open_source(data({"kind": "tar", "url": str(tmp_path)}))


def test_two_sets_with_the_same_keys_in_one_tar_are_named(tmp_path: Path) -> None:
    """As two shards are joined whose keys begin at 0: unpacked, the second would replace the first."""
    (tmp_path / "a.tar").write_bytes(tar({f"{i}.png": picture(i) for i in range(3)}))
    with tarfile.open(tmp_path / "a.tar", "a") as out:
        for i in range(3):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(picture(10 + i))
            out.addfile(member, io.BytesIO(picture(10 + i)))
    source = open_source(data({"kind": "tar", "url": str(tmp_path / "a.tar")}, "none"))
    assert [int(source.pixels(i, 8)[0, 0, 0]) for i in range(len(source))] == [10, 11, 12]
    assert "3 files that their tar has again: two sets with the same keys? If so, write the second" in source.left_out


@pytest.mark.parametrize("again", ["1.png", "./1.png"])
def test_a_file_that_a_large_tar_has_twice_is_refused(again: str, tmp_path: Path, large_tars: None) -> None:
    """Its members are not kept: there may be ten million."""
    once = {"1.png": picture(1), "1.cls": b"0"}
    (tmp_path / "a.tar").write_bytes(tar(once))
    source = data({"kind": "tar", "url": str(tmp_path)})
    assert len(open_source(source)) == 1
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo(again))
    with pytest.raises(UserError, match=r"a.tar: it has a file twice, as tar --update leaves it"):
        open_source(source)


def test_links_that_lead_nowhere_are_images_that_cannot_be_decoded(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("a/1.png", "b/2.png"):
        open_folder(root).write(name, picture(1))
    links = {"gone.png": "nowhere", "loop.png": f"{root}", "self.png": f"{root}/a/self.png", "loop": f"{root}", "disk": "/nowhere"}
    for name, to in links.items():
        (root / "a" / name).symlink_to(to)
    source = {"kind": "folder", "url": str(root)}
    with pytest.raises(UndecodableImage, match=r"image a/\w+.png: there is no such file; correct the link or the CSV"):
        make_latents(sweep_of(tmp_path, source, "precompute.shard_images=16", classes=2))
    skipping = sweep_of(tmp_path, source, "data.undecodable=skip", "precompute.shard_images=16", classes=2)
    assert in_shards(make_latents(skipping)) == Counter({(1, 0): 1, (1, 1): 1})
    left_out = open_source(skipping.recipe.data).listing.manifest.left_out
    assert {why: count for why, (count, _) in left_out.items()} == {
        "links to a folder around them": 1,
        "links that lead nowhere": 1,
    }
    found = survey.take_survey(root.as_posix(), lambda _: None, lambda *_: None)
    assert (found.count, {each.name for each in found.broken}) == (2, {"a/gone.png", "a/loop.png", "a/self.png"})


@pytest.mark.parametrize(
    ("names", "lacking"),
    [
        (["a-000", "a-001", "a-003", "a-004", "b-7"], (1, "a-002.tar")),
        (["a-8", "a-9", "a-11", "a-13"], (2, "a-10.tar")),
        (["2012", "2017"], None),
        (["images-0", "images-50"], None),
        (["a-00000-of-00003", "a-00001-of-00003", "a-00002-of-00003"], None),
    ],
)
def test_tars_that_the_numbers_of_others_skip_are_named(names: list[str], lacking: tuple[int, str] | None, tmp_path: Path) -> None:
    for number, name in enumerate(names):
        (tmp_path / f"{name}.tar").write_bytes(tar({f"{number}.png": picture(number), f"{number}.cls": b"0"}))
    for other in ("log-1.txt", "log-3.txt", ".b-1.tar", ".b-3.tar"):
        (tmp_path / other).touch()
    left_out = open_source(data({"kind": "tar", "url": str(tmp_path)}, 1)).listing.manifest.left_out
    assert left_out.get("files that the numbers of the others skip: were all downloaded?") == lacking


def test_a_file_that_numbers_of_six_digits_count_and_that_is_not_there_is_named(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        (tmp_path / f"a-{number:06d}-of-000004.tar").write_bytes(tar({f"{number}.png": picture(1), f"{number}.cls": b"0"}))
    with pytest.raises(UserError, match=r"lacks 1 of the files that the names of the others count: a-000002-of-000004.tar"):
        open_source(data({"kind": "tar", "url": str(tmp_path)}, 1))


@pytest.mark.parametrize("other", ["a-00000-of-00001.tar", "a-00000-of-00002-0123456789abcdef.tar"])
def test_two_versions_of_a_numbered_set_are_refused(other: str, tmp_path: Path) -> None:
    """As a second download to the same folder leaves them, after the set was uploaded again."""
    for name in ("a-00000-of-00002.tar", "a-00001-of-00002.tar", other):
        (tmp_path / name).write_bytes(tar({"1.png": picture(1), "1.cls": b"0"}))
    source = {"kind": "tar", "url": str(tmp_path), "files": "a-*-of-00002.tar"}
    with pytest.raises(UserError, match=r"a-00000-of-\S+ and a-\S+ are of two versions of a set, whose images"):
        open_source(data(source | {"files": "*.tar"}, 1))
    if "00001" in other:
        assert len(open_source(data(source, 1))) == 2


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
    sweep = sweep_of(tmp_path, source, "precompute.shard_images=16", classes=3)
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


def test_a_file_that_its_tar_has_again_as_a_link_is_left_out(tmp_path: Path) -> None:
    """The link is there once the tar is unpacked, and links in tars are not followed."""
    with tarfile.open(tmp_path / "a.tar", "w") as made:
        for name in ("1.png", "2.png", "3.png", "4.png"):
            member = tarfile.TarInfo(name)
            member.size = len(picture(1))
            made.addfile(member, io.BytesIO(picture(1)))
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "2.png"
        made.addfile(link)
    listing = open_source(data({"kind": "tar", "url": str(tmp_path), "label": "tar"}, "none")).listing
    assert sorted(entry.name for entry in listing) == ["a.tar/2.png", "a.tar/3.png", "a.tar/4.png"]
    assert {why: count for why, (count, _) in listing.manifest.left_out.items()} == {
        "links in tars": 1,
        "files that their tar has again": 1,
    }


def test_a_label_with_a_byte_order_mark_is_that_number(tmp_path: Path) -> None:
    members = dict[str, bytes]()
    for i in range(12):
        members |= {f"{i}.png": picture(i), f"{i}.cls": f"\ufeff{i}".encode()}
    (tmp_path / "a.tar").write_bytes(tar(members))
    source = open_source(data({"kind": "tar", "url": str(tmp_path), "label": "cls"}, 12))
    assert {entry.name: entry.label for entry in source.listing} == {f"a.tar/{i}.png": i for i in range(12)}


@pytest.mark.parametrize("lost", [1_100_000, 2_000_000])
def test_a_download_whose_last_piece_is_zeros_is_refused(lost: int, tmp_path: Path) -> None:
    """As a program leaves it that takes the space first. Readers take the zeros for the tar's end."""
    good = tar({f"{i}.png": picture(i) + bytes(20_000) for i in range(150)})
    (tmp_path / "a.tar").write_bytes(good[:-lost] + bytes(lost))
    with pytest.raises(StorageError, match=r"a.tar: not a complete tar: damaged or truncated at byte \d+, or there is"):
        open_source(data({"kind": "tar", "url": str(tmp_path), "label": "tar"}, "none"))


@pytest.mark.parametrize("blocks", [1, 20, 32, 100, 2048])
@pytest.mark.parametrize("records", [0, 2])
def test_a_tar_ends_with_zeros_that_fill_a_record(blocks: int, records: int, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture(1) + bytes(records * blocks * 512))
    subprocess.run(["tar", "-b", str(blocks), "-cf", tmp_path / "a.tar", "-C", tmp_path, "x.png"], check=True)
    assert len(open_source(data({"kind": "tar", "url": str(tmp_path), "label": "tar"}, "none"))) == 1


@pytest.mark.parametrize("what", ["a hole of zeros", "two tars in one file", "zeros to the end"])
def test_a_tar_that_ends_before_its_file_is_refused(what: str, tmp_path: Path) -> None:
    """Python's `tarfile`, and so WebDataset's own reader, end there without a word."""
    images = {f"{i}.png": picture(i) for i in range(20)} | {"x.bin": LARGE}
    good = tar(images | {f"{i}.png": picture(i) for i in range(20, 30)})
    header = good.index(b"10.png".ljust(100, b"\0"))
    bad = {
        "a hole of zeros": good[:header] + bytes(20 * 1024) + good[header + 20 * 1024 :],
        "two tars in one file": good + good,
        "zeros to the end": good[:header] + bytes(len(good) - header),
    }
    (tmp_path / "a.tar").write_bytes(bad[what])
    with pytest.raises(StorageError, match=r"a.tar: not a complete tar: damaged or truncated at byte \d+, or there is"):
        open_source(data({"kind": "tar", "url": str(tmp_path), "label": "tar"}, "none"))


@pytest.mark.parametrize("form", [["gnu"], ["posix", "--sparse-version=0.0"], ["posix", "--sparse-version=0.1"], ["posix"]])
def test_a_sparse_member_of_a_tar_is_refused(form: list[str], tmp_path: Path) -> None:
    """Its bytes are no range of the file, and the map of its holes may be as long as the file."""
    with (tmp_path / "a.png").open("wb") as file:
        file.write(picture(1))
        file.truncate(2**20)
    subprocess.run(["tar", "--sparse", "--format", *form, "-cf", "a.tar", "a.png"], cwd=tmp_path, check=True)
    with pytest.raises(StorageError, match=r"a.tar: .*a.png has holes that are left out: write it without --sparse"):
        open_source(data({"kind": "tar", "url": str(tmp_path), "label": "tar"}, "none"))


def test_a_file_that_is_written_again_after_it_was_listed_is_refused(store_url: str) -> None:
    """Rows in another order: each label would be of another image."""
    root, store = open_folder(store_url) / "images", open_folder(store_url) / "store"
    rows = [(picture(number), number % 2) for number in range(40)]
    files: dict[str, Callable[[Iterable[int]], bytes]] = {
        "tar": lambda order: tar({k: v for i in order for k, v in ((f"{i}.png", rows[i][0]), (f"{i}.cls", b"01"[i % 2 :][:1]))}),
        "parquet": lambda order: parquet([rows[i] for i in order]),
    }  # fmt: skip
    for kind, file in files.items():
        recipe = data({"kind": kind, "url": (root / kind).url})
        (root / kind).write(f"a.{kind}", file(range(40)))
        open_source(recipe, store).pixels(0, 8)
        (root / kind).write(f"a.{kind}", file(reversed(range(40))))
        with pytest.raises(StorageError, match=rf"a.{kind}: it was written again after it was listed .*data.source.version"):
            open_source(recipe, store).pixels(0, 8)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_file_that_is_written_again_while_a_process_reads_it_is_refused(kind: str, store_url: str) -> None:
    """Hours after it was opened; what was read before is of the listed file."""
    root = open_folder(store_url) / "images"
    rows = [(picture(number), number % 2) for number in range(40)]

    def write(numbers: list[int]) -> None:
        members = {k: v for i in numbers for k, v in ((f"{i}.png", rows[i][0]), (f"{i}.cls", b"01"[i % 2 :][:1]))}
        root.write(f"a.{kind}", tar(members) if kind == "tar" else parquet([rows[i] for i in numbers], group=5))

    write(list(range(40)))
    source = open_source(data({"kind": kind, "url": root.url}))
    assert source.pixels(0, 8)[0, 0, 0] == 0
    write(list(reversed(range(40))))
    with pytest.raises(StorageError, match=rf"a.{kind}: it was written again after it was listed"):
        source.pixels(20, 8)


def test_labels_that_are_corrected_after_they_were_listed_are_refused(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    file, store = tmp_path / "labels.csv", open_folder(tmp_path / "store")
    for labels in ("0101", "1010"):
        file.write_text("\n".join(["path,label", *(f"{i}.png,{y}" for i, y in enumerate(labels))]))
        os.utime(file, (int(labels), int(labels)))
        source = {"kind": "csv", "url": str(file)}
        if labels == "0101":
            assert sorted(open_source(data(source), store).labels) == [0, 0, 1, 1]
            continue
        with pytest.raises(StorageError, match=r"labels.csv: it was written again after it was listed"):
            open_source(data(source), store)


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


class WholeServer(SimpleHTTPRequestHandler):
    """Answers with the complete file, whatever range is asked for."""

    def log_message(self, *_: object) -> None:
        pass


def test_a_web_server_without_byte_ranges_is_named_and_no_file_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({f"{i}.png": picture(i) for i in range(20)} | {"x.bin": LARGE}))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(WholeServer, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.tar"
        with pytest.raises(StorageError, match=r"a.tar: the server ignores byte ranges: copy it to a disk or a store"):
            open_source(data({"kind": "tar", "url": url}, "none"))
        server.shutdown()


class WebServer(SimpleHTTPRequestHandler):
    """Serves a folder with its files' times, by range."""

    def do_GET(self) -> None:
        data, (first, last) = (Path(self.translate_path(self.path)).read_bytes(), re.findall(r"\d+", self.headers["Range"]))
        part = data[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


def test_a_file_of_a_web_server_that_is_written_again_is_refused(tmp_path: Path) -> None:
    """It has as many bytes as before, and the server states its time only."""
    file = tmp_path / "a.parquet"
    file.write_bytes(parquet([(picture(1), 0), (picture(2), 1)], metadata=None))
    os.utime(file, (10**9, 10**9))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(WebServer, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        recipe = data({"kind": "parquet", "url": f"http://127.0.0.1:{server.server_port}/a.parquet"})
        assert len(open_source(recipe, open_folder(tmp_path / "store"))) == 2
        os.utime(file)
        with pytest.raises(StorageError, match=r"a.parquet: it was written again after it was listed \(.*2001"):
            open_source(recipe, open_folder(tmp_path / "store")).pixels(0, 8)
        server.shutdown()


class NoTimeServer(WebServer):
    """Serves a folder by range, and states neither time nor ETag."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Last-Modified":
            super().send_header(keyword, value)


def test_a_file_whose_server_states_no_version_is_refused(tmp_path: Path) -> None:
    """If it was written again, nothing would tell, and all labels could be wrong."""
    (tmp_path / "a.tar").write_bytes(tar({"1.png": picture(1), "1.cls": b"0"}))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(NoTimeServer, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.tar"
        with pytest.raises(UserError, match=r"a.tar: its server states neither a time nor an ETag, .*: copy it to a disk"):
            open_source(data({"kind": "tar", "url": url}))
        server.shutdown()


def test_parquet_files_whose_numbers_mean_other_classes_are_refused(tmp_path: Path) -> None:
    other = {"info": {"features": {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}}}
    for name, metadata in (("a", FEATURES), ("b", other)):
        (tmp_path / f"{name}.parquet").write_bytes(parquet([(picture(0), 0)], metadata=metadata))
    with pytest.raises(UserError, match=r"b.parquet: its classes are dog, cat, those of the first file cat, dog"):
        open_source(data({"kind": "parquet", "url": str(tmp_path)}))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_hidden_files_of_a_mac_are_no_tars_and_a_link_that_leads_nowhere_is_named(kind: str, tmp_path: Path) -> None:
    """A Mac writes `._a.tar` beside `a.tar` on a disk of another system."""
    content = tar({"1.png": picture(1), "1.cls": b"0"}) if kind == "tar" else parquet([(picture(1), 0)])
    (tmp_path / f"a.{kind}").write_bytes(content)
    (tmp_path / f"._a.{kind}").write_bytes(b"\0\5\x16\7" + bytes(4092))
    source = data({"kind": kind, "url": str(tmp_path)})
    assert open_source(source).left_out.startswith(f"1 hidden (._a.{kind}), 1 class without images")
    (tmp_path / f"b.{kind}").symlink_to("nowhere")
    with pytest.raises(UserError, match=rf"b.{kind} is a link that leads nowhere: correct or delete it"):
        open_source(source)


@pytest.mark.parametrize(
    ("folders", "one"),
    [
        (["a/images", "b/images"], "a/images and b/images"),
        (["001/images", "002/images"], "001/images and 002/images"),
        (["cat/2019", "dog/2019", "cat/2020", "dog/2020"], "cat/2019 and dog/2019"),
        (["part-1/cat", "part-2/cat", "part-1/dog", "part-2/dog"], ""),
        (["data/cat", "data/dog"], ""),
        (["cat", "dog"], ""),
    ],
)
def test_classes_of_a_tar_are_its_innermost_folders_unless_others_may_be(folders: list[str], one: str, tmp_path: Path) -> None:
    """Cats and dogs of 2019 are no class; parts that differ in numbers only hold the same ones. Each has its own tar."""
    for number, folder in enumerate(folders):
        (tmp_path / f"{number}.tar").write_bytes(tar({f"{folder}/{number}.png": picture(1)}))
    refused = pytest.raises(UserError, match=f"its class, and {one} would be one: write") if one else nullcontext()
    with refused:
        source = open_source(data({"kind": "tar", "url": str(tmp_path), "label": "folder"}))
        assert source.label_names == ["cat", "dog"]


def test_two_labels_of_a_sample_of_a_tar_are_refused(tmp_path: Path) -> None:
    for second, refused in ((b"0", nullcontext()), (b"1", pytest.raises(UserError, match=r"1.cls and 1.CLS are two labels"))):
        (tmp_path / "a.tar").write_bytes(tar({"1.png": picture(1), "1.cls": b"0", "1.CLS": second}))
        with refused:
            assert list(open_source(data({"kind": "tar", "url": str(tmp_path)}, 1)).labels) == [0]


def test_a_file_that_was_given_to_tar_twice_is_one_image(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture(1))
    os.link(tmp_path / "0.png", tmp_path / "another.png")  # tar notes files with several names
    subprocess.run(["tar", "-cf", "a.tar", "0.png", "0.png"], cwd=tmp_path, check=True)
    source = open_source(data({"kind": "tar", "url": f"{tmp_path}/a.tar", "label": "tar"}, "none"))
    assert (list(source.names), source.left_out) == (["a.tar/0.png"], "")


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
