"""Imports of heavy libraries without the parts that we do not use: `hidden`."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """Make `import module` fail, unless it is imported already, so that an optional dependency costs no start-up time."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
