"""Tables of numbers, with text in the columns that are named."""

from collections.abc import Collection
from functools import partial
from typing import Any

from rich import box
from rich.table import Table


def table(*columns: str, left: Collection[str] = ("model",), no_wrap: bool = False, **style: Any) -> Table:
    """Return an empty table in rich's `style`. Its columns are aligned to the right, as numbers are, except those in `left`."""
    out = Table(**style)
    for column in columns:
        out.add_column(column, justify="left" if column in left else "right", no_wrap=no_wrap)
    return out


narrow_table = partial(table, no_wrap=True, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
"""A table for a terminal of 80 columns: no rules between its columns, no cell of several lines."""
