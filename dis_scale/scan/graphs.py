"""Functions that torch.compile must not trace: it breaks the graph there and calls them as they are."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
MOST_COMPILED = 256
"""Kinds of input that a function is compiled for."""
_excluded: list[Callable[..., object]] = []


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Exclude a function from torch.compile once `prepare_to_compile` is called.

    Not `torch.compiler.disable`: as a decorator it imports the compiler, two seconds in every process that compiles nothing.
    """
    _excluded.append(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return getattr(function, "outside", function)(*args, **kwargs)

    return call


def prepare_to_compile() -> None:
    """Exclude the marked functions from torch.compile; called before the first block is compiled.

    torch.compile compiles each piece between these functions for at most 8 kinds of input. A model with several kinds of block
    needs more: some blocks would stay uncompiled, and the order of the passes would decide which.
    """
    torch._dynamo.config.recompile_limit = MOST_COMPILED
    for function in _excluded:
        if hasattr(function, "outside"):
            continue  # another wrapper would make compiled blocks compile again
        function.outside = torch.compiler.disable(function)  # type: ignore[attr-defined]
