"""Parts of a set, such as train and test, by the names of files and folders: training on one must not use the others' images."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, islice

from dis_scale.data.listing import Entry, LeftOut
from dis_scale.process.errors import UserError, printable

SPLITS = (
    dict.fromkeys(("train", "training", "trainset", "trn"), "train")
    | dict.fromkeys(("test", "tests", "testing", "testset", "tst", "holdout"), "test")
    | dict.fromkeys(("val", "valid", "validation", "valset", "minival", "dev", "eval", "evaluation"), "validation")
    | dict.fromkeys(("unlabeled", "unlabelled"), "unlabelled")
)
"""Words in the names of files and folders that hold one part of a set, and the part."""
IMAGES = ("image", "images", "img", "imgs", "jpegimages")
MASKS = ("mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "segmentationclass", "groundtruth", "gt")
"""Names of neighbouring folders of which one has images and the other their masks: pictures of the classes by pixel."""
PART_COLUMNS = ("split", "partition")
"""Names of a CSV's column whose words are parts of a set, whatever they are: CelebA's are 0, 1 and 2."""
MOST_PARTS = 20
"""Most words of such a column."""


MOST_LACKING = 100_000
"""Most missing files that are named, since the total in a file's name may be a date."""
_NUMBERED = re.compile(r"(.*)-(\d{3,})-of-(\d{3,})(?:-[0-9a-f]{16})?(\..*)?")
"""Name of one of several files of a part, as on the Hugging Face hub; older files have a hash in the name."""
_COUNTED = re.compile(r"(.*?)(\d{1,18})(\D*)")
"""Name of a file whose last digits are its number."""


def numbered(names: Iterable[str], every: Iterable[str]) -> tuple[set[str], list[str]]:
    """Return the parts that the names of numbered files begin with, and the files of these parts that are missing in `every`.

    Numbers count from 0 or from 1. UserError if one part has two series of files: a newer version of the set beside an older one.
    """
    there, chosen, lacking = _numbers(every), _numbers(names), list[str]()
    _require_one_series(names)
    for part, total, suffix in sorted(chosen):
        numbers = there[part, total, suffix]
        first = int(int(total) in numbers)
        left = islice((n for n in range(first, first + int(total)) if n not in numbers), MOST_LACKING)
        lacking += [f"{part}-{number:0{len(total)}d}-of-{total}{suffix}" for number in left]
    return {part for part, *_ in chosen}, lacking


def _require_one_series(names: Iterable[str]) -> None:
    first = dict[tuple[str, ...], tuple[str, str]]()
    for name in sorted(names):
        if found := _NUMBERED.fullmatch(name):
            part, number, total, suffix = found.groups(default="")
            for key, value in (((part, suffix), total), ((part, suffix, number), name)):
                known, other = first.setdefault(key, (value, name))
                if known != value:
                    raise UserError(
                        f"data.source.url: {printable(other)} and {printable(name)} are of two versions of a set, whose images "
                        "would be there twice: delete the older one's files, or choose by data.source.files"
                    )


def _numbers(names: Iterable[str]) -> Mapping[tuple[str, str, str], set[int]]:
    """Return the numbers of the numbered files, by part, total and ending."""
    numbers = defaultdict[tuple[str, str, str], set[int]](set)
    for found in filter(None, map(_NUMBERED.fullmatch, names)):
        part, number, total, suffix = found.groups(default="")
        numbers[part, total, suffix].add(int(number))
    return numbers


def skipped(names: Iterable[str]) -> Iterator[str]:
    """Yield the names of missing files, whose numbers are between those of other files; none if more are missing than exist.

    For example `a-001.tar` beside `a-000.tar` and `a-002.tar`. Numbers that are positions of first images, or years, skip more.
    """
    alike = defaultdict[tuple[str, str], dict[int, int]](dict)
    for found in (_COUNTED.fullmatch(name) for name in names if not _NUMBERED.fullmatch(name)):  # those names state the total
        if found:
            before, number, after = found.groups()
            alike[before, after][int(number)] = len(number)
    for (before, after), widths in sorted(alike.items()):
        span = range(min(widths), max(widths) + 1)
        if len(span) <= 2 * len(widths):
            yield from (f"{before}{number:0{min(widths.values())}d}{after}" for number in span if number not in widths)


def with_hash(name: str) -> str:
    """Return a numbered file's name in the older form, with an arbitrary hash."""
    return re.sub(r"-of-\d{3,}", rf"\g<0>-{0:016x}", name)


def splits_in(names: Iterable[str]) -> set[str]:
    """Return the parts of a set that words of the names state. Words end at other characters, or by case as in `trainSet`."""
    return {SPLITS[word] for name in names for word in _words(name) if word in SPLITS}


def parts_of(names: Iterable[str]) -> set[str]:
    """Return the parts of a set that files hold, by their names; the words for two parts in one name are a part of their own.

    If there is a part other than train, files whose names state no part are one more."""
    each = ["-".join(sorted(splits_in([name]))) for name in names]
    parts = {*each} - {""}
    return parts | ({"others"} if parts - {"train"} and not all(each) else set())


def of_one_set(entries: Iterable[Entry | LeftOut], where: str) -> Iterator[Entry | LeftOut]:
    """Yield the entries; UserError if two folders around images, at any depth, are parts of a set, or if one has the other's masks.

    Two parts are in one folder, and their names differ in the word for the part and in numbers only: `seg_train` and `seg_test`,
    `train2017` and `val2017`. For a tar, folders are those in the tar.
    """
    seen, first_of, pictures = {""}, dict[tuple[str, ...], str](), dict[tuple[str, bool], str]()
    for entry in entries:
        folder = entry.name.removeprefix(f"{entry.file}/").rpartition("/")[0] if isinstance(entry, Entry) else ""
        if folder not in seen:  # a CSV may name them in any order
            seen.add(folder)
            for path in accumulate(folder.split("/"), "{}/{}".format):
                _require_same_part(first_of, path, where)
                _require_no_masks(pictures, path, where)
        yield entry


class PartColumns:
    """The words in those columns of a CSV that may name parts of a set."""

    def __init__(self, columns: Iterable[str]) -> None:
        self._lines: dict[str, dict[str, int]] = {column: {} for column in columns}

    def add(self, row: Mapping[str, str | None], line: int) -> None:
        """Keep the first line of each word; forget a column with many."""
        for column, lines in list(self._lines.items()):
            lines.setdefault((row[column] or "").strip().lower(), line)
            if len(lines) > MOST_PARTS:
                del self._lines[column]

    def require_one(self, where: str) -> None:
        """Raise UserError if a column has the words of two parts, or if one of the `PART_COLUMNS` has any two words."""
        for column, lines in self._lines.items():
            first_of = {SPLITS[word]: (line, word) for word, line in lines.items() if word in SPLITS}
            two = list(lines) if column.strip().lower() in PART_COLUMNS else [word for _, word in first_of.values()]
            if len(two) > 1:
                first, second = two[:2]
                raise UserError(
                    f"{where}: {printable(first)!r} in column {column!r} of line {lines[first]}, {printable(second)!r} in line "
                    f"{lines[second]}: parts of a set; write a CSV of one of them, or without the column to use all"
                )


def _require_same_part(first_of: dict[tuple[str, ...], str], path: str, where: str) -> None:
    """Raise UserError if the folder is of another part than the first folder with a similar name, which may be this one."""
    around, _, name = path.rpartition("/")
    if not (part := splits_in([name])):
        return
    alike = (around, *("" if word in SPLITS else word for word in _words(name)))
    first = first_of.setdefault(alike, path)
    if splits_in([first.rpartition("/")[2]]) != part:
        raise UserError(
            f"data.source.url: {printable(first)} and {printable(path)} in {where} are parts of a set: give the folder of one of "
            "them, or write the tars or the CSV with one; to use all, rename the folders"
        )


def _require_no_masks(pictures: dict[tuple[str, bool], str], path: str, where: str) -> None:
    """Raise UserError if, by their names, one of this folder and a neighbour has images and the other their masks."""
    around, _, name = path.rpartition("/")
    if (word := name.lower()) in (*IMAGES, *MASKS):
        pictures[around, word in IMAGES] = path
        if other := pictures.get((around, word in MASKS)):
            first, second = sorted([path, other])
            raise UserError(
                f"data.source.url: {printable(first)} and {printable(second)} in {where} are called as images and their masks: "
                "give the folder of the images, or rename the folders to use both"
            )


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]
