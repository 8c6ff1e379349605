"""Markdown of generated pages."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; a line break or a bar in a cell would end it, so both are replaced."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def code(text: object) -> str:
    """Return text as code, also if it has backticks."""
    words = str(text)
    return f"`` {words} ``" if "`" in words else f"`{words}`"


def subclasses(cls: type[T]) -> Iterator[type[T]]:
    """Yield all subclasses, at any depth."""
    for inner in cls.__subclasses__():
        yield inner
        yield from subclasses(inner)
