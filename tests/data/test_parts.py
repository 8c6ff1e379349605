"""Parts of a set, such as train and test, are not listed together without a word; other folders are what they are."""

from pathlib import Path

import pytest

from dis_scale.data import survey
from dis_scale.data.parts import MOST_LACKING, numbered
from dis_scale.data.sources import open_source
from dis_scale.process.errors import UserError
from tests.support.labelled_images import data, parquet, png, tar


def of_kind(kind: str, root: Path, names: list[str]) -> dict[str, str]:
    """Write images of these names as a folder, a tar or a CSV; return the source's settings."""
    for name in names if kind != "tar" else ():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(1))
    if kind == "tar":
        (root / "all.tar").write_bytes(tar({name: png(1) for name in names}))
        return {"kind": "tar", "url": str(root), "label": "folder"}
    (root / "l.csv").write_text("\n".join(["path,label", *(f"{name},{name.split('/')[-2]}" for name in names)]))
    return {"kind": kind, "url": f"{root}/l.csv" if kind == "csv" else str(root)}


@pytest.mark.parametrize("kind", ["folder", "tar", "csv"])
@pytest.mark.parametrize("classes", [2, "none"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Training", "Testing"),
        ("seg_train", "seg_test"),
        ("trainA", "testA"),
        ("TrainSet", "TestSet"),
        ("trainset", "testset"),
        ("train2017", "val2017"),
        ("train", "test"),
        ("ILSVRC/Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/val"),
        ("bottle/train/good", "bottle/test/good"),
    ],
)
def test_parts_of_a_set_at_any_depth_are_not_listed_together(
    kind: str, classes: int | str, first: str, second: str, tmp_path: Path
) -> None:
    names = [f"{part}/{c}/0.png" for part in (first, second) for c in ("n01", "n02")]
    source = of_kind(kind, tmp_path, ["docs/n01/0.png", *names])
    parts = [part.removesuffix("/good") for part in (first, second)]
    one, other = sorted(parts) if kind == "folder" else parts  # the order of listing
    with pytest.raises(UserError, match=rf"{one} and {other} in {tmp_path}.* are parts of a set: give the folder of one"):
        open_source(data(source, classes))
    if kind == "folder":
        with pytest.raises(UserError, match=rf"^data.source.url: {one} and {other} in .* are parts of a set"):
            survey.take_survey(str(tmp_path), lambda _: None, lambda *_: None)


@pytest.mark.parametrize("kind", ["folder", "tar", "csv"])
@pytest.mark.parametrize("around", ["home/dev/train", "test/train", "train_station", "a/train test"])
def test_a_part_in_another_is_no_second_one(kind: str, around: str, tmp_path: Path) -> None:
    source = of_kind(kind, tmp_path, [f"{around}/{c}/{c}.png" for c in "ab"] + ["test_tube/c/c.png"])
    assert len(open_source(data(source, "none"))) == 3


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_parts_of_a_set_are_not_trained_on_together(kind: str, tmp_path: Path) -> None:
    for part in ("train", "test"):
        content = tar({"1.png": png(1), "1.cls": b"0"}) if kind == "tar" else parquet([(png(1), 0)])
        (tmp_path / f"{part}-00000-of-00001.{kind}").write_bytes(content)
    source = {"kind": kind, "url": str(tmp_path)}
    with pytest.raises(UserError, match=rf"files of test and train in .*: say which .* '\*train\*.{kind}'"):
        open_source(data(source))
    (tmp_path / f"extra.{kind}").write_bytes(content)
    with pytest.raises(UserError, match=r"files of test and train in .*: say which"):
        open_source(data(source))
    assert len(open_source(data(source | {"files": f"train-*.{kind}"}))) == 1


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_numbered_files_are_complete_and_of_one_part_whatever_its_word(kind: str, tmp_path: Path) -> None:
    """As the hub has them. A download that was interrupted is no smaller set."""
    content = tar({"1.png": png(1), "1.cls": b"0"}) if kind == "tar" else parquet([(png(1), 0)])
    for number in (0, 2, 3):
        (tmp_path / f"trn-{number:05d}-of-00005.{kind}").write_bytes(content)
    source = {"kind": kind, "url": str(tmp_path)}
    lacking = rf"lacks 2 of the files .*: trn-00001-of-00005.{kind}, trn-00004-of-00005.{kind}: download them"
    for more in ({}, {"files": f"trn-*.{kind}"}):
        with pytest.raises(UserError, match=lacking):
            open_source(data(source | more))
    for number in (1, 4):
        (tmp_path / f"trn-{number:05d}-of-00005.{kind}").write_bytes(content)
    assert len(open_source(data(source))) == 5
    assert len(open_source(data(source | {"files": f"trn-0000[12]-of-*.{kind}"}))) == 2
    (tmp_path / f"trn-00004-of-00005.{kind}").unlink()
    assert len(open_source(data(source | {"files": f"trn-0000[12]-of-*.{kind}"}))) == 2, "another is lacking on purpose"
    (tmp_path / f"trn-00004-of-00005.{kind}").write_bytes(content)
    (tmp_path / f"tst-00000-of-00001.{kind}").write_bytes(content)
    with pytest.raises(UserError, match=r"files of trn and tst in .*: say which"):
        open_source(data(source | {"version": "2"}))


def test_a_date_behind_of_fills_no_memory() -> None:
    name = "x-00000-of-20231231.parquet"
    _, lacking = numbered([name], [name])
    assert (lacking[0], len(lacking)) == ("x-00000001-of-20231231.parquet", MOST_LACKING)


def test_files_with_a_hash_in_their_names_are_counted(tmp_path: Path) -> None:
    """Those of the hub's older sets."""
    for number, digest in ((0, "886a7016ed44ab0d"), (2, "0f3c1a7b2d4e5f60")):
        (tmp_path / f"train-{number:05d}-of-00003-{digest}.parquet").write_bytes(parquet([(png(1), 0)]))
    with pytest.raises(UserError, match=r"lacks 1 of the files .*: train-00001-of-00003.parquet: download"):
        open_source(data({"kind": "parquet", "url": str(tmp_path)}))
