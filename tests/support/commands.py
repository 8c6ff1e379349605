"""The command in this process: its exit code and what it printed."""

import contextlib
import io
import json
from typing import Any

import pytest

from dis_scale import cli
from dis_scale.recipe import Recipe
from pipelines import sweep as pipeline


def invoke(*arguments: str) -> tuple[int, str]:
    """Run the command in this process; return its exit code and all that it printed."""
    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            cli.main(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
    return code, output.getvalue()


def answer(*arguments: str) -> Any:
    """Run the command in this process; return what it printed for programs, on standard output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    assert not end.value.code
    return json.loads(output.getvalue())


def replace_sweep(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> list[Recipe]:
    """Let the sweep end at once, or by this error; return the list of recipes that it will have got."""
    recipes = list[Recipe]()

    def run_sweep(recipe: Recipe, *_: object, **__: object) -> None:
        recipes.append(recipe)
        if error:
            raise error

    monkeypatch.setattr(pipeline, "run_sweep", run_sweep)
    return recipes
