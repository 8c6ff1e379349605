"""The rows of a CSV of images: their paths and classes, and the rows that a person or a program has written wrongly."""

import csv
import io
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Iterator, Sequence

from dis_scale.data.images import SUFFIXES
from dis_scale.data.listing import Entry, LeftOut, number_or_name
from dis_scale.data.parts import PartColumns
from dis_scale.process.errors import UserError, nearest, printable
from dis_scale.process.progress import some
from dis_scale.storage.folder import Folder

EMPTY = "lines without a value"
TAKEN_IN = "lines in a quoted value of the line before: if they are images, a quote is missing"
LINE_CHARACTERS = 2**20
"""Most characters of a CSV's line: paths have up to 4,096, and a field of Python's csv up to 131,072."""
_LINE_END = re.compile(r"\r\n?|\n")


def entries(root: Folder, name: str, path: str, label: str | None) -> Iterator[Entry | LeftOut]:
    """Yield the images in column `path`, with their classes from column `label` if given. Also yield the lines within a quoted
    value, as left out: after an unclosed quote, these may be images."""
    where = printable(f"{root}/{name}")
    try:
        with io.TextIOWrapper(root.open(name), encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(_lines(file, where), strict=True, skipinitialspace=True)
            _require_columns(columns := rows.fieldnames or [], path, label, where)
            parts = PartColumns(set(columns) - {path, label})
            for row in rows:
                at = f"{where}: line {rows.line_num}"
                kind = 0 if label is None else number_or_name(row[label] or "")
                if not any(row.values()):
                    yield LeftOut(f"line {rows.line_num}", EMPTY)
                    continue
                if not row[path] or None in row or kind == "":
                    absent = ", and this label is a word for none" if kind == "" and (row[label or path] or "").strip() else ""
                    raise UserError(
                        f"{at}: expected a path and a label, in quotes if it has a comma{absent}, got {list(row.values())!s:.200}"
                    )
                parts.add(row, rows.line_num)
                taken_in = [line for value in filter(None, row.values()) for line in _LINE_END.split(value)[1:]]
                if taken_in:
                    _require_quotes(row[path] + (row[label] if label else ""), taken_in, at)
                yield Entry(row[path], kind, location=(rows.line_num, 0))
                yield from (LeftOut(f"line {rows.line_num - i}", TAKEN_IN) for i in range(len(taken_in)))
            parts.require_one(where)
    except FileNotFoundError as error:
        raise UserError(f"data.source.url: no file {where}") from error
    except csv.Error as error:
        raise UserError(f"{where}: line {rows.reader.line_num} is no line of a CSV: {error}") from error
    except UnicodeDecodeError as error:
        wide = error.object[:2] in (BOM_UTF16_LE, BOM_UTF16_BE)
        raise UserError(
            f"{where}: not a CSV in UTF-8, as iconv -f {'UTF-16' if wide else 'WINDOWS-1252'} -t UTF-8 or a text editor writes it: "
            f"{error}"
        ) from error


def _require_columns(columns: Sequence[str], path: str, label: str | None, where: str) -> None:
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise UserError(f"{where}: its header names {', '.join(map(repr, twice))} twice")
    for key, column in (("path", path), ("label", label)):
        if column is not None and column not in columns:
            has = some([*columns] or ["nothing"])
            near = nearest(column, columns) or ", and no comma" * (len(columns) == 1)
            raise UserError(f"data.source.{key}: no column {column!r}{near} in {where}; it has {has}")


def _require_quotes(of_image: str, taken_in: list[str], at: str) -> None:
    """Raise UserError if a path or a label has several lines, or if a value's lines after its first have an image's name."""
    if _LINE_END.search(of_image):
        raise UserError(f"{at}: a path or a label of {len(taken_in) + 1} lines: is a quote missing?")
    for field in (field.strip() for line in taken_in for field in line.split(",")):
        if field.strip('" ').lower().endswith(SUFFIXES):
            raise UserError(f"{at}: {field!r:.99} within a value of {len(taken_in) + 1} lines: is a quote missing?")


def _lines(file: io.TextIOWrapper, where: str) -> Iterator[str]:
    """Yield the lines; UserError for one that is too long to be a path and a label, before it fills the memory."""
    while line := file.readline(LINE_CHARACTERS + 1):
        if len(line) > LINE_CHARACTERS:
            raise UserError(f"{where}: not a CSV of images: a line has over {LINE_CHARACTERS:,} characters")
        yield line
