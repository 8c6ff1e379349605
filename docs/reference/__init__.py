"""Pages that are generated from the code: settings, commands, errors. `python -m docs.reference` writes them."""

from collections.abc import Callable

from docs.reference import commands, errors, settings

GENERATED: dict[str, Callable[[], str]] = {"settings.md": settings.page, "commands.md": commands.page, "errors.md": errors.page}
"""Each page's file, and the function that returns its Markdown."""
