"""Imports of heavy libraries without the parts that we do not use: `hidden`."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """Make `import module` fail in this block, unless it is imported already: an optional dependency then costs no start-up time.

    Holds for all threads. Libraries that look for the module while they are imported treat it as missing from then on.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop(module, None)
