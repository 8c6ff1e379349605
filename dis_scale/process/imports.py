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
def hidden(*modules: str) -> Iterator[None]:
    """Make imports of these optional modules fail in the block, to start sooner. Modules that are imported already stay.

    This holds for all threads. Libraries that look for a module while they are imported treat it as missing from then on.
    """
    absent = [module for module in modules if module not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module in absent:
            sys.modules.pop(module, None)


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Let the block import libraries that tell PyTorch's compiler what to skip, without the compiler. Holds for all threads."""
    if "torch._dynamo" in sys.modules:
        yield
        return
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
