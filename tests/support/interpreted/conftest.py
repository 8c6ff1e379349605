"""Fixtures of all of them: fresh memory that shows when it is read, and an interpreter that is twice as fast."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.support.scans import poison

__all__ = ["poison"]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each mixer that was asked is one function."""
    from dis_scale.scan import triton_mixer, triton_ssd_mixer  # here: pytest reads this file in every run

    answers = list[bool]()
    for mixer in (triton_mixer, triton_ssd_mixer):

        def noted(*given: Any, takes: Any = mixer.takes) -> bool:
            answers.append(takes(*given))
            return answers[-1]

        monkeypatch.setattr(mixer, "takes", noted)
    return answers


@pytest.fixture(scope="module", autouse=True)
def patched_once() -> Iterator[None]:
    """The interpreter replaces triton.language's functions again for each call of a device function, which takes half its time.

    Here it does so once for each module with kernels, and restores nothing in between. Nor does it look for an integer beyond 32
    bits in each sum and product, which took half of the rest: a GPU does not, and here all are of a few thousand numbers.
    """
    from triton.runtime import interpreter

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
        options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_splat", splat_truth)
        yield
