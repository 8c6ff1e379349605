"""A first look at a folder of images, before any recipe: number, classes, sizes, and every image that cannot be decoded.

Images are listed, read and decoded as a sweep does it. Read next: first_recipe.py, for the recipe that fits them.
"""

import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from dis_scale.data import images, layouts
from dis_scale.data.sources import READERS, Source, open_source
from dis_scale.process.errors import UndecodableImage, UserError, counted, printable
from dis_scale.process.progress import ReportDone, ReportShare, some
from dis_scale.process.threads import in_order
from dis_scale.recipe import Data
from dis_scale.storage.folder import open_folder


class Broken(NamedTuple):
    """An image that cannot be decoded, and the reason."""

    name: str
    why: str


@dataclass(frozen=True)
class Survey:
    """The images of a folder."""

    url: str
    classes: dict[str, int]
    """Decodable images of each class folder; empty if the images are unlabelled."""
    sides: Counter[int]
    """Decodable images by their shorter side in pixels."""
    broken: list[Broken]
    """Images that cannot be decoded, sorted by name."""
    beside: int
    """Images that are in no class folder, though others are: a sweep with classes does not read them."""
    left_out: str = ""
    """Other contents of the folder, in words."""
    nested: str = ""
    """The innermost folder around all images, if they are in several of its sub-folders: these may be the classes."""

    @property
    def count(self) -> int:
        """Number of decodable images."""
        return self.sides.total()

    @property
    def median_side(self) -> int:
        """Median of the shorter sides in pixels."""
        return sorted(self.sides.elements())[self.count // 2]

    def to_json(self) -> dict[str, Any]:
        """Return everything, as JSON has it."""
        sides = {"least": min(self.sides), "median": self.median_side, "most": max(self.sides)}
        return {
            "images": self.count, "classes": self.classes, "shorter_side": sides, "unused": self.beside, "left_out": self.left_out,
            "broken": [each._asdict() for each in self.broken],
        }  # fmt: skip

    def share_of(self, resolution: int) -> float:
        """Return the share of the images whose shorter side has at least `resolution` pixels."""
        return sum(number for side, number in self.sides.items() if side >= resolution) / self.count


def take_survey(url: str, listed: ReportDone, report: ReportShare) -> Survey:
    """Decode every image in a folder; `listed` gets the images listed so far, `report` those decoded and their number.

    Class folders are labels if at least two of them have images. UserError if no image can be decoded, or if a sweep would refuse
    the folder.
    """
    folder = open_folder(url)
    settings = {"source": {"kind": "folder", "url": folder.url}, "resolution": 1, "num_classes": "none"}
    source = open_source(Data.model_validate(settings), None, listed)
    numbers = Counter(_class_of(name) for name in source.names)
    beside = numbers.pop("", 0)
    labelled = len(numbers) > 1 and not layouts.has_numbered_folders(folder, [*numbers])
    chosen = [i for i, name in enumerate(source.names) if not labelled or _class_of(name)]
    sides, broken = Counter[int](), list[Broken]()
    folders = [name for name in folder.folders() if not images.hidden(name)]  # a sweep's classes, also without images
    if labelled and folder.local:  # raises what a sweep would, such as for an image that a link shows in two classes
        open_source(Data.model_validate(settings | {"num_classes": len(folders)}), None, listed)
    classes = dict.fromkeys(map(printable, folders) if labelled else (), 0)
    for done, (i, result) in enumerate(zip(chosen, _measured(source, chosen), strict=True), 1):
        name = printable(source.names[i])
        if isinstance(result, UndecodableImage):
            broken.append(Broken(name, result.why))
        else:
            sides[int(result.min())] += 1
            if labelled:
                classes[_class_of(name)] += 1
        report(done, len(chosen))
    if not sides:
        raise UserError(f"{folder}: none of its {len(chosen):,} images can be decoded; the first: {' '.join(broken[0])}")
    nested = "" if labelled else _nested(source.names)
    return Survey(folder.url, classes, sides, sorted(broken), beside if labelled else 0, source.left_out, nested)


def describe(found: Survey) -> list[str]:
    """Return what was found, a line each, without the broken images' names."""
    classes = [f"{name} {number:,}" for name, number in found.classes.items()]
    empty = [name for name, number in found.classes.items() if not number]
    lines = [
        f"images   {found.count:,} in {found.url}",
        f"classes  {f'{len(classes):,}: {some(classes)}' if classes else 'none: the images are not in two or more class folders'}",
        f"sizes    shorter side {min(found.sides):,} to {max(found.sides):,} pixels, median {found.median_side:,}",
    ]
    if empty:
        lines.append(
            f"empty    class folders without an image that can be decoded: {some(empty)}; each stays a class: delete or fill it"
        )
    if all(name.isdecimal() for name in found.classes) and sorted(found.classes, key=int) != [*found.classes]:
        lines.append("order    class folders with numbers get labels in the order of their texts, 10 before 2, as in ImageFolder")
    lines += [f"unused   {counted(found.beside, 'image')} beside the class folders"] if found.beside else []
    classes_below = f"{found.nested} has folders of images: for these as classes, give {found.url}/{found.nested}"
    lines += [f"nested   {classes_below}"] if found.nested else []
    lines += [f"left out {found.left_out}"] if found.left_out else []
    if not found.classes and ".csv" in found.left_out:
        lines.append("labels   if a CSV has their classes: data.source: {kind: csv, url: FILE.csv}, and num_classes (docs/data.md)")
    tried = found.count + len(found.broken)
    lines += [f"broken   {len(found.broken):,} of {counted(tried, 'image')} cannot be decoded"] if found.broken else []
    return lines


def _nested(names: Iterable[str]) -> str:
    """Return the innermost folder around all images in folders, if they are in at least two of its sub-folders; else empty."""
    folders = {name.rpartition("/")[0] for name in names if "/" in name}
    return "" if not folders or (around := posixpath.commonpath(folders)) in folders else around


def _class_of(name: str) -> str:
    """Return the class folder of an image, the first of its path; empty if it is in none."""
    return name.partition("/")[0] if "/" in name else ""


def _measured(source: Source, positions: list[int]) -> Iterator[np.ndarray | UndecodableImage]:
    """Yield width and height of each image, or why it cannot be decoded."""
    sizes = replace(source, decode=lambda data, name, _: np.array(images.measure(data, name, source.in_flight)))
    return in_order(positions, lambda i: sizes.decoded(range(i, i + 1), 1)[0], READERS)
