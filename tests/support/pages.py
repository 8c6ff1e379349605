"""The code and the commands that the pages show, and whether a command exists."""

import importlib.util
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main

from dis_scale.cli import app
from dis_scale.process.errors import DisScaleError
from dis_scale.recipe import Recipe, reading
from docs.reference import GENERATED

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DATA = (ROOT / "docs" / "data.md").read_text()
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
WRITTEN = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in GENERATED)
PAGES = [README, *(path.read_text() for path in [*WRITTEN, *RESULTS])]


WITH_A_RECIPE = ("sweep", "plan")
"""Commands whose first argument is a recipe."""


def blocks(text: str) -> list[str]:
    """Return a page's code, fenced and indented."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"(?:^    .*\n)+", rest, re.MULTILINE)


SNIPPETS = {name: text for page in PAGES for text in blocks(page) for name in re.findall(r"\A# (\S+\.yaml)\n", text)}
"""Recipes in the pages, by the file name in their first line."""


def load(path: str, overrides: list[str]) -> Recipe:
    if path in SNIPPETS:
        return reading.parse(SNIPPETS[path], path, overrides)
    return reading.load(ROOT / path if (ROOT / path).exists() else path, overrides)


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def require_known(command: str, arguments: list[str]) -> None:
    """Fail unless the command's options exist and its recipe loads with its overrides."""
    known = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    options = {name for parameter in known.params for name in parameter.opts}
    assert {word for word in arguments if word.startswith("--")} <= options
    overrides = [value for flag, value in pairwise(arguments) if flag == "--set"]
    load(arguments[0], overrides)


def require_shape(words: list[str]) -> None:
    """Fail unless the command and its options exist and the number of arguments is right."""
    known = typer.main.get_command(app)
    while hasattr(known, "commands"):
        known = known.commands[words[0]]
        words = words[1:]
    flags = {name: option.is_flag for option in known.params for name in option.opts if name.startswith("--")}  # type: ignore[attr-defined]
    given = [word for word in words if word.startswith("--")]
    assert set(given) <= flags.keys()
    values = sum(not flags[flag] for flag in given)
    arguments = [p for p in known.params if p.param_type_name == "argument"]
    assert sum(p.required for p in arguments) <= len(words) - len(given) - values <= len(arguments)


def require_command(words: list[str]) -> None:
    """Fail unless the command's program, target or module exists and its arguments are right."""
    match words:
        case ["make", target, *variables]:
            assert target in targets()
            assert all(re.match(r"(PYTHON|KILLS|SEED|DRILLS)=", variable) for variable in variables)
        case ["python", "-m", "dis_scale.sweep", *arguments]:
            assert importlib.util.find_spec("dis_scale.sweep")
            require_known("sweep", arguments)
        case ["python", "-m", module, *modules] if module.startswith("benchmarks."):
            recorded = [f"benchmarks.{name}" for name in modules[1:]] if module == "benchmarks.record" else []
            assert all(importlib.util.find_spec(name) for name in [module, *recorded])
        case ["dis-scale", command, path, *arguments] if command in WITH_A_RECIPE and path != "RECIPE":
            require_known(command, [path, *arguments])
        case ["dis-scale", *arguments]:
            require_shape(arguments)
        case _:
            pytest.fail(f"a page has a command that no test knows: {' '.join(words)}")


def failures(check: Callable[[list[str]], None], commands: Iterable[list[str]]) -> list[str]:
    """Return the commands that fail a check, with the reason."""
    failed = []
    for words in commands:
        try:
            check(words)
        except (AssertionError, pytest.fail.Exception, DisScaleError, KeyError, OSError) as error:
            failed.append(f"{' '.join(words)}: {error!r}")
    return failed
