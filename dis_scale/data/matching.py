"""Files that `data.source.files` matches: tars, Parquet files and packed latents of one folder, and the folder's other contents."""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from dis_scale.data.images import hidden
from dis_scale.data.listing import HIDDEN, LeftOut
from dis_scale.data.parts import numbered, parts_of, skipped, with_hash
from dis_scale.process.errors import UserError, printable
from dis_scale.process.progress import some
from dis_scale.recipe import Files
from dis_scale.storage.folder import Folder

_AGAIN = re.compile(r"(?: \(\d+\)| - Copy)(?=\.[^.]+$)")
"""Suffix that a browser or a desktop adds to the name of a second copy of a file."""
UNMATCHED = "files that data.source.files does not match"
SKIPPED = "files that the numbers of the others skip: were all downloaded?"


def files_of(url: Folder, files: Files, suffix: str, *, are_classes: bool = False) -> tuple[Folder, list[str]]:
    """Return the folder and the sorted names of its files that match a pattern and are not hidden.

    A URL that ends in `suffix` and is no folder names one file. UserError if no file matches, if a numbered series is incomplete,
    or if a file is a broken link or the same as another one. UserError also if the files of one pattern belong to several parts of
    a set, such as train and test, unless each file is a class.
    """
    patterns = [files] if isinstance(files, str) else files
    if url.name.endswith(suffix) and not (url.local and url.local.is_dir()):
        parent, name = Folder(url.url.rsplit("/", 1)[0]), url.name
        try:  # fsspec's `exists` is false if a web server does not answer
            parent.read_up_to(name, 1)
            return parent, [name]
        except FileNotFoundError as error:
            if not url.list():
                raise UserError(f"data.source.url: no file {url}") from error
    every = url.list()
    shown = [name for name in every if not hidden(name)]  # not a Mac's ._a.tar
    names = [name for name in shown if any(fnmatch(name, pattern) for pattern in patterns)]
    names = sorted({*names} - {*url.folders()}) if names else []  # Spark writes a folder `x.parquet`
    if not names and url.local and url.local.is_file():
        raise UserError(
            f"data.source.url: {url} is a file whose name does not end in {suffix}: give a folder of such files, or one; what is "
            "compressed as a whole is to be unpacked first"
        )
    if not names:
        there = f"there are {some(every)}" if every else "it is empty or does not exist"
        raise UserError(f"data.source.url: no files {files!r} in {url}; expected {url}/<name>{suffix}, {there}")
    if unmatched := [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in names)]:
        raise UserError(f"data.source.files: {some(unmatched)} matches no file in {url}: correct it or leave it out")
    _require_distinct(url, names)
    prefixes, lacking = numbered(names, every)
    alike = [(name, with_hash(name)) for name in lacking]
    if lacking := [name for name, old in alike if any(fnmatch(name, p) or fnmatch(old, p) for p in patterns)]:  # some may be chosen
        raise UserError(
            f"data.source.url: {url} lacks {len(lacking)} of the files that the names of the others count: {some(lacking)}: "
            "download them, or rename the others"
        )
    for pattern in () if are_classes else patterns:
        _require_one_part([name for name in names if fnmatch(name, pattern)], pattern, prefixes, suffix, url)
    return url, names


def _require_distinct(url: Folder, names: list[str]) -> None:
    """Raise UserError if a file is a second download of another, a broken link, or by a link the same file as another."""
    first_of, every, folder = dict[Path, str](), {*names}, url.local
    for name in names:
        if (first := _AGAIN.sub("", name)) != name and first in every:
            both = f"{printable(first)} and {printable(name)} in {url}"
            raise UserError(f"data.source.url: {both} are called as two downloads of one file: delete one, or rename it")
        if folder is None:
            continue
        if not (folder / name).exists():
            raise UserError(f"data.source.url: {printable(f'{folder}/{name}')} is a link that leads nowhere: correct or delete it")
        if (first := first_of.setdefault((folder / name).resolve(), name)) != name:
            both = f"{printable(first)} and {printable(name)} in {printable(str(folder))}"
            raise UserError(f"data.source.url: {both} are one file, by a link: delete it")


def _require_one_part(names: list[str], pattern: str, prefixes: set[str], suffix: str, url: Folder) -> None:
    """Raise UserError if a pattern's files are of several parts of a set: by words in names, or for all files by `prefixes`."""
    parts = prefixes if len(prefixes) > 1 and pattern == f"*{suffix}" else parts_of(names)
    if len(parts) > 1:
        raise UserError(
            f"data.source.files: {pattern!r} matches files of {' and '.join(sorted(parts))} in {url}: say which to train on, for "
            f"example '*train*{suffix}', or a pattern for each: ['*train*{suffix}', ...]"
        )


def beside(root: Folder, names: Sequence[str]) -> Iterator[LeftOut]:
    """Yield the other contents of a folder of which `names` are read: files, sub-folders, and gaps in the numbers of its files.

    Sub-folders are not listed: they may hold millions of files.
    """
    every, folders, suffix = set(root.list(incomplete=True)), set(root.folders()), PurePosixPath(names[0]).suffix
    alike = (name for name in every - folders if name.endswith(suffix) and not hidden(name))
    yield from (LeftOut(name, SKIPPED) for name in skipped(alike))
    for name in sorted((every | folders) - set(names)):
        kind = "sub-folders" if name in folders else UNMATCHED
        yield LeftOut(name, HIDDEN if hidden(name) else kind)
