"""Who may import whom: lower layers never higher ones, and each heavy dependency is imported behind its door alone.

Imports are read from the syntax tree, lazy ones included; code that is held in a string does not count.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("dis_scale", "pipelines") for path in (ROOT / folder).rglob("*.py"))

LAYERS = [
    "errors seeds recipe faults storage manifest progress",
    "scan diffusion data tracking lease vae ema",
    "models checkpoint engine evidence pace",
    "train trial evaluation small_nets fork",
    "plan report mirror",
    "pipelines",
    "sweep cli vary",
]
"""From the lowest up; a part may import parts of its own layer and of those above it in this table."""
DOORS = {
    "ray": "pipelines",
    "deepspeed": "dis_scale/training/engine.py",
    "webdataset": "dis_scale/data/shards.py",
    "mlflow": "dis_scale/tracking.py",
    "diffusers": "dis_scale/vae.py",
    "torch_fidelity": "dis_scale/evaluation/inception.py",
    "fsspec": "dis_scale/storage/folder.py",
    "s3fs": "dis_scale/storage/folder.py",
    "pyarrow": "dis_scale/data/parquet.py",
    "sklearn": "dis_scale/data/sources.py",
    "matplotlib": "dis_scale/report/figures.py",
    "scipy": "dis_scale/report/fits.py dis_scale/evaluation",
    "typer": "dis_scale/cli.py",
    "rich": "dis_scale/plan.py dis_scale/report dis_scale/progress.py dis_scale/cli.py dis_scale/sweep.py dis_scale/vary.py",
    "psutil": "dis_scale/storage/lease.py",
    "mamba_ssm": "dis_scale/scan",
    "causal_conv1d": "dis_scale/scan",
    "triton": "dis_scale/scan",
}
"""A dependency and the files or folder that may import it."""
ANYWHERE = {"torch", "numpy", "PIL", "pydantic", "yaml", "safetensors"}
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts.split()}


def imported(source: str) -> set[str]:
    """Dotted names that a file imports; `from a import b` gives `a.b`, whether b is a module or not."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(name: str) -> str | None:
    """The part of ours that a dotted name belongs to, None for others' packages and for `dis_scale` itself."""
    first, *rest = name.split(".")
    if first == "dis_scale":
        return rest[0] if rest and rest[0] in RANK else None
    return first if first == "pipelines" else None


def home_of(path: Path) -> str | None:
    """The part that a file belongs to."""
    return part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))


def climbs(part: str, source: str) -> list[str]:
    """The parts above its own that a file of `part` imports."""
    used = {other for name in imported(source) if (other := part_of(name))}
    return sorted(other for other in used if RANK[other] > RANK[part])


def packages(source: str) -> set[str]:
    """Others' packages that a file imports."""
    return {name.split(".")[0] for name in imported(source)} - set(sys.stdlib_module_names) - {"dis_scale", "pipelines"}


def may_import(path: str, package: str) -> bool:
    return package in ANYWHERE or any(path == door or path.startswith(f"{door}/") for door in DOORS[package].split())


def test_the_table_names_every_part() -> None:
    there = {
        path.stem for path in (ROOT / "dis_scale").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert there - {"__init__"} | {"pipelines"} == RANK.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_lower_layers_never_import_higher_ones(path: Path) -> None:
    if part := home_of(path):
        assert climbs(part, path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_dependencies_are_imported_behind_their_doors(path: Path) -> None:
    where, used = str(path.relative_to(ROOT)), packages(path.read_text())
    assert used - ANYWHERE <= DOORS.keys(), "a new dependency: give it a door, or put it under ANYWHERE"
    assert [package for package in sorted(used) if not may_import(where, package)] == []


def test_reading_a_recipe_costs_no_heavy_import() -> None:
    used = {name for path in (ROOT / "dis_scale/recipe").glob("*.py") for name in packages(path.read_text())}
    assert used == {"pydantic", "yaml"}


@pytest.mark.parametrize(
    ("part", "source", "higher"),
    [
        ("data", "from dis_scale import models", ["models"]),
        ("data", "def f():\n    from dis_scale.training.loop import train", ["training"]),
        ("report", "import pipelines.jobs", ["pipelines"]),
        ("training", "from dis_scale.data.latents import Latents", []),
        ("models", "CODE = 'from dis_scale import sweep'", []),
    ],
)
def test_a_climb_is_seen(part: str, source: str, higher: list[str]) -> None:
    assert climbs(part, source) == higher


@pytest.mark.parametrize(
    ("path", "allowed"), [("pipelines/jobs.py", True), ("dis_scale/sweep.py", False), ("pipelines_old.py", False)]
)
def test_a_door_is_a_file_or_a_folder(path: str, allowed: bool) -> None:
    assert may_import(path, "ray") == allowed
