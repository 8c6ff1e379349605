"""Tars as people have them: cut off, sparse, compressed, written on a Mac, with images or labels twice."""

import bz2
import gzip
import io
import lzma
import os
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from dis_scale.data.sources import open_source
from dis_scale.process.errors import StorageError, UserError
from dis_scale.storage.folder import open_folder
from tests.support.labelled_images import LARGE, data, in_shards, parquet, picture, sweep_on, tar
from tests.support.stages import make_latents


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
    sweep = sweep_on(tmp_path, source, "precompute.shard_images=16", classes=2)
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
