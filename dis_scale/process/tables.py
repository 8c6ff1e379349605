"""Tables for a terminal of 80 columns."""

from collections.abc import Collection

from rich import box
from rich.table import Table


def narrow_table(title: str, *columns: str, left: Collection[str] = ("model",), caption: str | None = None) -> Table:
    """Return an empty table without rules between its columns, whose cells are not wrapped; all but `left` are numbers."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table
