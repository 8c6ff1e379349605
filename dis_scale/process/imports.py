"""Imports of heavy libraries without the parts that we do not use: `hidden`, `without_compiler`, `adamw`."""

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Import libraries in this block that tell PyTorch's compiler what to skip, without importing it."""
    import torch

    disable = torch.compiler.disable
    torch.compiler.disable = lambda fn=None, *_, **__: fn or (lambda each: each)
    try:
        with hidden("torch._dynamo"):
            yield
    finally:
        torch.compiler.disable = disable


@functools.cache
def adamw() -> "type[torch.optim.AdamW]":
    """Return PyTorch's AdamW without the decorators that tell its compiler what to skip.

    They import the compiler at their first call, which takes as long as importing PyTorch itself.
    """
    from torch import no_grad
    from torch.optim import AdamW

    unwrapped = {name: inspect.unwrap(getattr(AdamW, name)) for name in ("add_param_group", "zero_grad", "step")}
    return type("AdamW", (AdamW,), unwrapped | {"step": no_grad()(unwrapped["step"])})
