"""The words are true: the README's commands, map and recipe, the prices of recipes, and no place of ours in any file."""

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import typer.main

from dis_scale.cli import app
from dis_scale.models.cost import price_model
from dis_scale.recipe import LatentShape, Recipe, Source, TrainedVae, VaeSettings, reading

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DATA = (ROOT / "docs" / "data.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
PRICED = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "digits")
"""Recipes whose first lines hold a table of their price; the digits' is what the plan prints."""
SD_FACTOR = 8
"""Pixels a latent position of Stable Diffusion's autoencoder, whose latents have 4 channels."""

TREE = subprocess.run(
    ["git", "-c", "safe.directory=*", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.splitlines()
FILES = [ROOT / name for name in TREE if (ROOT / name).is_file()]
PLACES = re.compile(rb"(?<![\w.$}])/(?:home|root|work|Users|mnt)/\w")
"""Absolute paths of somebody's machine; a user's own are written as /data or /shared."""


def blocks(text: str) -> list[str]:
    """The README's code, fenced and indented."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"(?:^    .*\n)+", rest, re.MULTILINE)


def commands() -> Iterator[list[str]]:
    """The commands that are ours, without the path of the environment's programs and what a Ray job wraps around them."""
    for line in "\n".join(block for page in PAGES for block in blocks(page)).splitlines():
        if found := re.match(r" *(?:\.venv/bin/|ray job submit .* -- )?((?:make|python|dis-scale) .*)", line):
            yield shlex.split(found[1], comments=True)


SNIPPETS = {name: text for text in blocks(README) for name in re.findall(r"\A# (\S+\.yaml)\n", text)}
"""Recipes in the README by the file name in their first line."""


def load(path: str, overrides: list[str]) -> Recipe:
    if path in SNIPPETS:
        return reading.parse(SNIPPETS[path], path, overrides)
    return reading.load(ROOT / path, overrides)


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def require_known(command: str, arguments: list[str]) -> None:
    """The command's options exist, and its recipe loads with its overrides."""
    known = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    options = {name for parameter in known.params for name in parameter.opts}
    assert {word for word in arguments if word.startswith("--")} <= options
    overrides = [value for flag, value in pairwise(arguments) if flag == "--set"]
    load(arguments[0], overrides)


def require_shape(words: list[str]) -> None:
    """The command and its options exist, and it takes so many arguments."""
    known = typer.main.get_command(app)
    while hasattr(known, "commands"):
        known = known.commands[words[0]]
        words = words[1:]
    flags = {name: option.is_flag for option in known.params for name in option.opts if name.startswith("--")}  # type: ignore[attr-defined]
    given = [word for word in words if word.startswith("--")]
    assert set(given) <= flags.keys()
    values = sum(not flags[flag] for flag in given)
    assert len(words) - len(given) - values == sum(p.param_type_name == "argument" for p in known.params)


def sources() -> list[str]:
    """Each `source: {...}` of the README's and docs' code, whole recipes apart."""
    return [line for text in blocks(README) + blocks(DATA) for line in re.findall(r"^source: {.*}", text, re.MULTILINE)]


@pytest.mark.parametrize("line", sources())
def test_every_source_shown_is_one(line: str) -> None:
    reading.load(ROOT / "configs" / "imagenet256.yaml", [f"data.{line.replace(': ', '=', 1)}"])


def test_the_data_page_names_every_kind_of_source_and_vae() -> None:
    kinds = {get_args(kind.model_fields["kind"].annotation)[0] for kind in (*get_args(Source), *get_args(VaeSettings))}
    assert {kind for kind in kinds if f"| `{kind}` |" not in DATA} == set()


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands_name_what_is_there(words: list[str]) -> None:
    match words:
        case ["make", target, *variables]:
            assert target in targets()
            assert all(re.match(r"(PYTHON|KILLS|SEED|DRILLS)=", variable) for variable in variables)
        case ["python", "-m", "dis_scale.sweep", *arguments]:
            assert importlib.util.find_spec("dis_scale.sweep")
            require_known("sweep", arguments)
        case ["python", "-m", module, *modules] if module.startswith("benchmarks."):
            named = [f"benchmarks.{name}" for name in modules[1:]] if module == "benchmarks.record" else []
            assert all(importlib.util.find_spec(name) for name in [module, *named])
        case ["dis-scale", *arguments] if "SWEEP" in arguments:
            require_shape(arguments)
        case ["dis-scale", command, *arguments]:
            require_known(command, arguments)
        case _:
            pytest.fail(f"the README has a command that no test knows: {' '.join(words)}")


def test_the_two_commands_are_there_and_ci_runs_the_second() -> None:
    assert {("make", "demo"), ("make", "test")} <= {tuple(words) for words in commands()}
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert {"demo", "test", "lint", "venv"} <= targets()


def test_the_map_is_the_repository() -> None:
    (text,) = [block for block in blocks(README) if block.startswith("dis_scale/")]
    outer = {line.split()[0] for line in text.splitlines() if not line.startswith(" ")}
    inner = {line.split()[0] for line in text.splitlines() if line.startswith(" ")}
    assert outer == {shown(name) for name in TREE if not name.startswith(".")}
    mine = {shown(name.removeprefix("dis_scale/")) for name in TREE if name.startswith("dis_scale/")}
    assert inner == mine - {"__init__.py"}


def shown(name: str) -> str:
    """A file's first folder, with its slash, or the file."""
    first, slash, _ = name.partition("/")
    return first + slash


RUNBOOKS = {path.stem: path.read_text() for path in (ROOT / "ops" / "runbooks").glob("*.md")}


def test_each_runbook_has_its_drill() -> None:
    from ops.drills.__main__ import DRILLS

    assert DRILLS.keys() == RUNBOOKS.keys()
    assert [name for name, text in RUNBOOKS.items() if f"Drill: `python -m ops.drills {name}`\n" not in text] == []
    assert (ROOT / "ops" / "drills" / "drill.yaml").exists()
    assert "drills" in targets()


def told(text: str) -> list[str]:
    """The commands of ours in a runbook's code."""
    return [
        line.strip()
        for block in blocks(text)
        for line in block.splitlines()
        if re.match(r" *(python|dis-scale) ", line)
    ]


@pytest.mark.parametrize("name", RUNBOOKS)
def test_a_runbooks_commands_and_links_are_there(name: str) -> None:
    commands = [shlex.split(line, comments=True) for line in told(RUNBOOKS[name])]
    assert commands or name == "stuck-job"
    for words in commands:
        require_shape(words[1:] if words[0] == "dis-scale" else ["sweep", *words[3:]])
    links = re.findall(r"\]\(([^)]+)\)", RUNBOOKS[name])
    assert [link for link in links if not (ROOT / "ops" / "runbooks" / link).exists()] == []


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    pictures = (ROOT / "docs" / "images").exists()
    assert links
    assert [link for link in links if not (ROOT / link).exists() and (pictures or "images/" not in link)] == []


def test_the_recipe_for_own_images_is_one() -> None:
    assert SNIPPETS
    for name in SNIPPETS:
        assert f"{load(name, []).name}.yaml" == name


@pytest.mark.parametrize("path", PRICED, ids=lambda p: p.stem)
def test_a_recipe_says_its_own_price(path: Path) -> None:
    recipe, text = reading.load(path), path.read_text()
    factor = 2 ** (len(recipe.vae.widths) - 1) if isinstance(recipe.vae, TrainedVae) else SD_FACTOR
    shape = LatentShape(4, recipe.data.resolution // factor)
    passes = 1 if recipe.evaluate.guidance == 1 else 2
    for name, model in recipe.models.items():
        found = price_model(model, shape, recipe.data.num_classes)
        trained = 2 * found.gmacs_training * recipe.train.images / 1e9
        drawn = 2 * found.gmacs_forward * passes * recipe.evaluate.steps * recipe.evaluate.samples / 1e9
        row = f"# {name} {found.parameters:,} {found.gmacs_forward:.4g} {trained:.3g} {drawn:.3g}"
        assert row in [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_names_a_place_on_somebodys_machine(path: Path) -> None:
    assert PLACES.findall(path.read_bytes()) == []
