"""Fixtures of all of them: fresh memory that shows when it is read, and an interpreter that is twice as fast."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.scans import poison

__all__ = ["poison"]


@pytest.fixture(scope="module", autouse=True)
def patched_once() -> Iterator[None]:
    """The interpreter replaces triton.language's functions again for each call of a device function, which takes half its time.

    Here it does so once for each module with kernels, and restores nothing in between.
    """
    from triton.runtime import interpreter  # here: pytest reads this file in every run

    patch, patched = interpreter._patch_lang, set[str]()

    def patch_once(function: Any) -> Any:
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch(function)
        return interpreter._LangPatchScope()

    splat = interpreter.InterpreterBuilder.create_splat

    def splat_truth(self: Any, block: Any, value: Any) -> Any:
        """Triton 3.9 makes integers of a comparison of scalars, which its loads refuse as a mask."""
        out = splat(self, block, value)
        out.data = out.data.astype(value.data.dtype)
        return out

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_splat", splat_truth)
        yield
