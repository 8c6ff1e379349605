"""What people write by mistake, and what programs leave behind: refused, or named beside the images."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dis_scale.data.csv_rows import EMPTY, TAKEN_IN
from dis_scale.data.matching import UNMATCHED
from dis_scale.data.sources import open_source, require_source
from dis_scale.data.survey import describe, take_survey
from dis_scale.data.tars import LONG_END
from dis_scale.process.errors import StorageError, UserError
from dis_scale.storage.folder import Folder, open_folder
from tests.support import store_requests
from tests.support.labelled_images import data, parquet, picture, tar


def csv_of(folder: Path, *lines: str) -> dict[str, Any]:
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / "labels.csv").write_text("\n".join(lines))
    return {"kind": "csv", "url": f"{folder}/labels.csv"}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_that_a_missing_quote_takes_in_are_refused_or_named(end: str, tmp_path: Path) -> None:
    """One with an image's name is refused: its image is lost, and the label at its end would be another's."""
    lines = ["path,caption,label", '0.png,"Hello, said,0', '1.png,a dog",1', "2.png,x,0", "3.png,y,1"]
    with pytest.raises(UserError, match=r"line 3: '1.png' within a value of 2 lines: is a quote missing"):
        open_source(data(csv_of(tmp_path, end.join(lines))))
    lines[2] = 'by a dog",1'
    opened = open_source(data(csv_of(tmp_path, end.join(lines))))
    assert (opened.listing.manifest.left_out, len(opened)) == ({TAKEN_IN: (1, "line 3")}, 3)
    with pytest.raises(UserError, match="line 3: a path or a label of 2 lines: is a quote missing"):
        open_source(data(csv_of(tmp_path, "label,path", '0,"0.png', '1.png"', "0,2.png")))


def test_a_space_before_a_quote_is_no_part_of_a_class(tmp_path: Path) -> None:
    """Else 10 would be sorted before 2, as a name."""
    source = csv_of(tmp_path, "path,label", '0.png, "0"', '1.png, "1"', '2.png, "10"', '3.png, "2"')
    opened = open_source(data(source, 11))
    assert sorted(zip(opened.names, opened.labels, strict=True)) == [("0.png", 0), ("1.png", 1), ("2.png", 10), ("3.png", 2)]


def test_a_column_that_names_two_parts_of_a_set_is_refused(tmp_path: Path) -> None:
    lines = ["path,label,set,when", "0.png,0,train,test", "1.png,1, Train,no word", "2.png,0,extra,test", "3.png,1,test,test"]
    with pytest.raises(UserError, match=r"'train' in column 'set' of line 2, 'test' in line 5: parts of a set; write"):
        open_source(data(csv_of(tmp_path, *lines)))
    assert len(open_source(data(csv_of(tmp_path, *lines[:4])))) == 3
    with pytest.raises(UserError, match=r"'0' in column 'Partition' of line 2, '1' in line 3: parts of a set; write"):
        open_source(data(csv_of(tmp_path, "path,label,Partition", "0.png,0,0", "1.png,1,1")))


def test_a_csv_in_utf_16_is_named(tmp_path: Path) -> None:
    source = csv_of(tmp_path)
    (tmp_path / "labels.csv").write_bytes("path,label\n0.png,0\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"not a CSV in UTF-8, as iconv -f UTF-16 -t UTF-8 or"):
        open_source(data(source))


def test_a_csvs_mistake_in_its_quotes_is_no_wrong_encoding(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels.csv: line 3 is no line of a CSV: ',' expected after '\"'"):
        open_source(data(csv_of(tmp_path, "path,label", '0.png,"x"', '1.png,"y" ', '2.png,"x"')))


def test_lines_of_blanks_are_counted_and_words_for_none_are_explained(tmp_path: Path) -> None:
    opened = open_source(data(csv_of(tmp_path, "path,label", "0.png,0", "  ", "1.png,1", ",")))
    assert (opened.listing.manifest.left_out, len(opened)) == ({EMPTY: (2, "line 3")}, 2)
    with pytest.raises(UserError, match=r"line 3: expected a path and a label, .*, and this label is a word for none, got"):
        open_source(data(csv_of(tmp_path, "path,label", "0.png,USA", "1.png,NA")))


def test_a_negative_label_is_no_name(tmp_path: Path) -> None:
    """-1 is the usual mark for none: it was taken for a name, and the next number was to blame."""
    for lines in (["0.png,-1", "1.png,1"], ["0.png,1", "1.png,-1"]):
        with pytest.raises(UserError, match=r"label '-1': write whole numbers from 0, or names"):
            open_source(data(csv_of(tmp_path, "path,label", *lines)))


def test_a_folder_is_no_image_of_a_csv(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match=r"1 of its images are not there: sub \(line 3\)"):
        open_source(data(csv_of(tmp_path, "path,label", "0.png,0", "sub,1")))


@pytest.mark.parametrize("written", ["caf\u00e9.png", "CAFE\u0301.PNG"])
def test_a_name_that_looks_like_that_of_a_file_is_explained(written: str, tmp_path: Path) -> None:
    (tmp_path / "cafe\u0301.png").write_bytes(picture(1))
    with (
        store_requests.noted() as requests,
        pytest.raises(UserError, match=r"is not there, but 'cafe\\u0301.png' is; correct the CSV"),
    ):
        open_source(data(csv_of(tmp_path, "path,label", "0.png,0", f"{written},1", "none.png,1", "other.png,1")))
    assert [verb for verb, _ in requests].count("list") == 2, "one more for all that are missing"


def test_the_folders_of_a_csv_are_listed_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medical sets have one for each study: 188,000 requests one after the other take 94 minutes at 30 ms each."""
    lines, at_work, most = ["path,label"], list[str](), list[int]()
    for number in range(64):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "0.png").write_bytes(picture(number % 8))
        lines.append(f"{number}/0.png,{number % 2}")
    files = Folder.files

    def slow(folder: Folder) -> Iterator[str]:
        at_work.append(folder.url)
        time.sleep(0.02)
        most.append(len(at_work))
        yield from files(folder)
        at_work.remove(folder.url)

    monkeypatch.setattr(Folder, "files", slow)
    assert len(open_source(data(csv_of(tmp_path, *lines)))) == 64
    assert max(most) > 16


def test_masks_beside_images_are_refused(tmp_path: Path) -> None:
    for name in ("Images/a", "masks/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.png").write_bytes(picture(0))
    with pytest.raises(
        UserError, match=r"Images and masks in .* are called as images and their masks: give the folder of the images"
    ):
        open_source(data({"kind": "folder", "url": str(tmp_path)}, "none"))
    (tmp_path / "masks").rename(tmp_path / "others")
    assert len(open_source(data({"kind": "folder", "url": str(tmp_path)}, "none"))) == 2


def test_labels_that_begin_at_1_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"got 2, but .* has labels up to 2; labels count from 0: do these begin at 1"):
        open_source(data(csv_of(tmp_path, "path,label", "0.png,1", "1.png,2")))


def test_a_folder_of_a_tar_may_have_such_a_word_as_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"NA/1.png": picture(1), "DE/2.png": picture(2)}))
    source = {"kind": "tar", "url": str(tmp_path), "label": "folder"}
    assert open_source(data(source)).label_names == ["DE", "NA"]


def test_edms_numbered_folders_are_no_classes(tmp_path: Path) -> None:
    for number in range(4):
        open_folder(tmp_path).write(f"{number // 2:05d}/img{number:08d}.png", picture(number))
    source = {"kind": "folder", "url": str(tmp_path)}
    assert len(open_source(data(source)).label_names) == 2, "as any names of classes"
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(UserError, match=r"has dataset.json beside numbered folders, as EDM's tools write them: these are no"):
        open_source(data(source))
    assert len(open_source(data(source, "none"))) == 4
    assert take_survey(str(tmp_path), lambda _: None, lambda *_: None).classes == {}


@pytest.mark.parametrize("label", ["", " ", "nan", "NaN", "NA", "None"])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_missing_label_is_no_class(kind: str, label: str, tmp_path: Path) -> None:
    files = {"parquet": parquet([(picture(0), "cat"), (picture(1), label)], metadata=None)}
    files["tar"] = tar({"0.png": picture(0), "0.cls": b"cat", "1.png": picture(1), "1.cls": label.encode()})
    (tmp_path / f"a.{kind}").write_bytes(files[kind])
    with pytest.raises(UserError, match="has no label"):
        open_source(data({"kind": kind, "url": str(tmp_path)}))


@pytest.mark.parametrize(("zeros", "named"), [(0, False), (100_000, True)])
def test_a_tar_that_may_not_have_been_downloaded_to_its_end_is_named(zeros: int, named: bool, tmp_path: Path) -> None:
    """A program that reserves a file's size first leaves zeros there; tar itself rounds up to 10 KiB."""
    (tmp_path / "a.tar").write_bytes(tar({"cat/0.png": picture(0), "dog/1.png": picture(1)}) + bytes(zeros))
    left_out = open_source(data({"kind": "tar", "url": str(tmp_path), "label": "folder"})).listing.manifest.left_out
    assert left_out == ({LONG_END: (1, "a.tar/its end")} if named else {})


def test_files_of_no_named_part_are_not_read_beside_a_test_set(tmp_path: Path) -> None:
    for name in ("part-0.tar", "test.tar"):
        (tmp_path / name).write_bytes(tar({"cat/0.png": picture(0), "dog/1.png": picture(1)}))
    source = {"kind": "tar", "url": str(tmp_path), "label": "folder"}
    with pytest.raises(UserError, match=r"'\*.tar' matches files of others and test in .*: say which to train on"):
        open_source(data(source))
    assert len(open_source(data(source | {"files": "part-*.tar"}))) == 2
    for pattern in ("*", "*t*.tar"):  # which say nothing of a part
        with pytest.raises(
            UserError, match=r"matches files of others and test in .* or a pattern for each: \['\*train\*.tar', ...\]"
        ):
            open_source(data(source | {"files": pattern}))
    assert len(open_source(data(source | {"files": ("test.tar", "part-*")}))) == 4, "on purpose"
    assert open_source(data(source | {"label": "tar"})).label_names == ["part-0", "test"], "names of classes"
    (tmp_path / "test.tar").rename(tmp_path / "train.tar")
    assert len(open_source(data(source))) == 4
    for name in ("part-0", "train"):
        (tmp_path / f"{name}.tar").rename(tmp_path / f"{name}-val.tar")
    with pytest.raises(UserError, match="matches files of train-validation and validation in"):
        open_source(data(source))
    (tmp_path / "part-0-val.tar").rename(tmp_path / "train-2-val.tar")
    assert len(open_source(data(source))) == 4, "all are of one part"


@pytest.mark.parametrize("outside", [False, True])
def test_an_image_that_a_link_shows_twice_is_one_image(outside: bool, tmp_path: Path) -> None:
    """Sets are made of links to one folder of images; an image in two classes is a mistake."""
    root = tmp_path / "set"
    target = tmp_path / "elsewhere/0" if outside else root / "a/0.png"
    open_folder(target.parent).write(target.name, picture(0))
    open_folder(root).write("b/1.png", picture(1))
    open_folder(root).write("2.png", picture(2))
    for name, to in {"a/x.png": target, "a/y.png": target, "b/z.png": root / "2.png"}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(to)
    source, twice = {"kind": "folder", "url": str(root)}, "images that a link shows a second time"
    opened = open_source(data(source))
    assert sorted(zip(opened.names, opened.labels, strict=True)) == [
        *([("a/x.png", 0), ("a/y.png", 0)] if outside else [("a/0.png", 0)]), ("b/1.png", 1), ("b/z.png", 1)
    ]  # fmt: skip
    assert opened.listing.manifest.left_out.get(twice, (0, ""))[0] == 2 * (not outside)
    (root / "b/x.png").symlink_to(target)
    if outside:  # where DVC, git-annex and the Hugging Face hub's cache keep equal files once
        assert len(open_source(data(source))) == 5
        return
    with pytest.raises(UserError, match=r"a/0.png and b/x.png in .* show the same, by the link b/x.png, which would"):
        open_source(data(source))
    assert len(open_source(data(source, "none"))) == 3


def test_a_list_of_files_that_has_one_by_a_link_too_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a-2.tar").write_bytes(tar({"cat/1.png": picture(1)}))
    (tmp_path / "a.tar").symlink_to("a-2.tar")
    with pytest.raises(UserError, match=r"a-2.tar and a.tar in .* are one file, by a link: delete it"):
        open_source(data({"kind": "tar", "url": str(tmp_path), "label": "folder"}))


def test_names_that_differ_in_case_are_two_images(tmp_path: Path) -> None:
    """Ids of 62 letters do."""
    (tmp_path / "a.tar").write_bytes(tar({"c/aB3.jpg": picture(1), "c/Ab3.png": picture(2), "d/1.PNG": picture(3)}))
    assert len(open_source(data({"kind": "tar", "url": str(tmp_path), "label": "folder"})).names) == 3


def test_a_mask_anywhere_in_a_tar_of_folders_is_refused(tmp_path: Path) -> None:
    """tar writes a folder's files as its file system lists them."""
    names = ("c/0.jpg", "c/1.jpg", "c/0.png", "c/1.png")
    (tmp_path / "a.tar").write_bytes(tar({name: picture(1) for name in names}))
    for source, classes in (({"label": "folder"}, 10), ({}, "none")):
        with pytest.raises(UserError, match=r"c/0.jpg and c/0.png are two images of one sample"):
            open_source(data({"kind": "tar", "url": str(tmp_path), **source}, classes))


def test_a_mask_in_a_tar_that_is_streamed_is_refused(tmp_path: Path, large_tars: None) -> None:
    source = {"kind": "tar", "url": str(tmp_path), "label": "folder"}
    for names, refused in ((("c/0.jpg", "c/0.2.jpg", "c/0.JPG", "c/._0.png"), False), (("c/0.jpg", "c/1.jpg", "c/0.PNG"), True)):
        (tmp_path / "a.tar").write_bytes(tar({name: picture(1) for name in names}))
        if refused:
            with pytest.raises(UserError, match=r"a\.tar: images of it differ in their endings only, as 1\.jpg and its"):
                open_source(data(source, 1))
            assert len(open_source(data(source | {"image": "jpg"}, 1))) == 2
        else:
            assert len(open_source(data(source, 1))) == 3


def test_a_second_download_of_a_tar_is_refused(tmp_path: Path) -> None:
    """Each of its images would be trained on twice."""
    for name in ("a-0.tar", "a-0 (1).tar", "a-1 (1).tar"):
        (tmp_path / name).write_bytes(tar({"cat/1.png": picture(1), "dog/1.png": picture(2)}))
    source = {"kind": "tar", "url": str(tmp_path), "label": "folder"}
    with pytest.raises(UserError, match=r"a-0\.tar and a-0 \(1\)\.tar in .* are called as two downloads of one file: delete one"):
        open_source(data(source))
    (tmp_path / "a-0 (1).tar").unlink()
    assert len(open_source(data(source))) == 4


def test_each_pattern_of_files_matches_one(tmp_path: Path) -> None:
    """A misspelt one would drop its part of the set."""
    (tmp_path / "train-0.tar").write_bytes(tar({"cat/1.png": picture(1)}))
    source = {"kind": "tar", "url": str(tmp_path), "label": "folder", "files": ("train-*.tar", "extar-*.tar")}
    with pytest.raises(UserError, match=r"data\.source\.files: extar-\*\.tar matches no file in "):
        open_source(data(source))


@pytest.mark.parametrize("name", ["images.tar.gz", "X.TAR"])
def test_a_file_that_is_not_called_as_a_tar_is_named_as_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=rf"{name} is a file whose name does not end in \.tar: give a folder of such files, or one"):
        open_source(data({"kind": "tar", "url": f"{tmp_path}/{name}"}))


def test_a_folder_given_for_a_csv_is_named(tmp_path: Path) -> None:
    csv_of(tmp_path, "path,label", "0.png,0")
    with pytest.raises(UserError, match=r"is a folder: give the CSV in it; it has 0\.png, .*labels\.csv"):
        open_source(data({"kind": "csv", "url": str(tmp_path)}))


@pytest.mark.parametrize(
    ("path", "words"),
    [("0", r"'0' is not there, but '0\.png' is"), (r"c\\0.png", r"folders are parted by /, and this path has \\;")],
    ids=["Kaggle's ids", "backslashes"],
)
def test_paths_of_other_programs_are_explained(path: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        open_source(data(csv_of(tmp_path, "path,label", f"{path},0", "1.png,0")))


def test_a_start_reads_no_tar(tmp_path: Path) -> None:
    """Before its first image a whole one is read: minutes of silence for one of 8 GiB, which is read again for the listing."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").write_bytes(tar({"cat/1.png": picture(1)}))
    source, store = {"kind": "tar", "url": f"{tmp_path}/set", "label": "folder"}, open_folder(tmp_path / "store")
    with store_requests.noted() as requests:
        require_source(data(source), store)
    assert [verb for verb, path in requests if "a.tar" in path] == []
    with pytest.raises(UserError, match="no files"):
        require_source(data(source | {"files": "b*.tar"}), store)


def test_a_picture_beside_nested_classes_does_not_hide_them(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/2.png", "preview.png"):
        open_folder(tmp_path).write(name, picture(1))
    lines = describe(take_survey(str(tmp_path), lambda _: None, lambda *_: None))
    assert f"nested   train has folders of images: for these as classes, give {tmp_path}/train" in lines


def test_two_names_that_look_the_same_are_no_two_classes(tmp_path: Path) -> None:
    """macOS writes an accent as a letter of its own, and other systems as one letter with it."""
    for number, name in enumerate(("caf\u00e9", "cafe\u0301")):
        open_folder(tmp_path / "set").write(f"{name}/{number}.png", picture(number))
    lines = ("0.png,caf\u00e9", "1.png,cafe\u0301")
    for source in ({"kind": "folder", "url": f"{tmp_path}/set"}, csv_of(tmp_path, "path,label", *lines)):
        with pytest.raises(UserError, match="two classes whose names look the same"):
            open_source(data(source))


def test_numbers_of_classes_that_no_image_has_are_named(tmp_path: Path) -> None:
    source = csv_of(tmp_path, "path,label", "0.png,1", "1.png,2", "2.png,4")
    assert open_source(data(source, 5)).left_out == "2 classes without images (0)"
    assert open_source(data(source, 9)).left_out.endswith(", 4 classes without images, above the largest (5)")
    assert open_source(data(csv_of(tmp_path, "path,label", "0.png,0", "1.png,1"))).left_out == ""
    (tmp_path / "a.parquet").write_bytes(parquet([(picture(0), 1)]))
    assert open_source(data({"kind": "parquet", "url": str(tmp_path)})).left_out.endswith(", 1 class without images (cat)")


def test_a_tar_whose_folders_are_of_two_depths_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"cat/1.png": picture(1), "dog/large/2.png": picture(2)}))
    source = {"kind": "tar", "url": str(tmp_path), "label": "folder"}
    with pytest.raises(UserError, match=r"an image's folder is its class, and cat and dog/large are of two depths"):
        open_source(data(source))


def test_a_file_that_we_were_killed_while_writing_is_named_beside_a_source(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"cat/1.png": picture(1)}))
    (tmp_path / f"b.tar.part-{'0' * 32}").touch()
    source = {"kind": "tar", "url": str(tmp_path), "label": "folder"}
    assert open_source(data(source, 1)).left_out.startswith(f"1 {UNMATCHED.replace('files', 'file', 1)} (b.tar.part-000")


def test_a_survey_says_what_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "notes.txt").write_text("of the photographer")
    assert "left out 1 .txt (notes.txt)" in describe(take_survey(str(tmp_path), lambda _: None, lambda *_: None))
    (tmp_path / "labels.csv").write_text("path,label\n0.png,1\n")
    assert "labels   if a CSV has their classes" in describe(take_survey(str(tmp_path), lambda _: None, lambda *_: None))[-1]


def test_a_survey_says_that_numbers_are_sorted_as_texts(tmp_path: Path) -> None:
    for name in ("2", "10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(picture(0))
    said = describe(take_survey(str(tmp_path), lambda _: None, lambda *_: None))
    assert any(line.startswith("order    class folders with numbers get labels in the order of their texts") for line in said)


def test_a_survey_refuses_a_link_in_two_classes_as_a_sweep_does(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(picture(0))
    (tmp_path / "dog/1.png").symlink_to(tmp_path / "cat/0.png")
    with pytest.raises(UserError, match=r"by the link dog/1.png, which would be of two classes"):
        take_survey(str(tmp_path), lambda _: None, lambda *_: None)


@pytest.mark.parametrize("size", [0, 21])
def test_a_zip_that_is_cut_off_at_its_beginning_is_no_zip(size: int, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK" + bytes(size) if size else b"")
    source = {"kind": "latents", "layout": "edm2", "url": f"{tmp_path}/x.zip"}
    with pytest.raises(StorageError, match=r"x\.zip: not a complete zip"):
        open_source(data(source, mirror=False))
