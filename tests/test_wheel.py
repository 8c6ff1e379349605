"""The wheel in an environment of its own, outside of the repository: the commands and the shipped recipes are there."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dis_scale.recipe import shipped

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "configs", "dis_scale", "pipelines")
Invoke = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it from a copy: a build leaves folders beside pyproject.toml."""
    version = importlib.metadata.version("setuptools")
    assert int(version.split(".")[0]) >= 77, f"setuptools {version}: pip install -e '.[dev]' -c constraints.txt"
    source = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source, source])
    (built,) = source.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def invoke(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Invoke:
    """Run the installed command in an empty folder. The environment has this one's packages, but not this repository."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"])
    python = folder / "venv/bin/python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel])
    (own,) = folder.glob("venv/lib/python*/site-packages")
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not read
    (folder / "empty").mkdir()
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    return lambda *words: subprocess.run(
        [folder / "venv/bin/dis-scale", *words], cwd=folder / "empty", env=clean, capture_output=True, text=True
    )


def run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    kinds = (".py", ".cpp", ".inl", ".typed")
    files = [
        path for folder in ("dis_scale", "pipelines") for path in (ROOT / folder).rglob("*") if path.suffix in kinds
    ]
    expected = {str(path.relative_to(ROOT)) for path in files}
    expected |= {f"dis_scale/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_the_installed_command_lists_the_shipped_recipes(invoke: Invoke) -> None:
    done = invoke("recipe", "list")
    assert [line.split()[0] for line in done.stdout.splitlines()] == shipped.names(), done.stderr


@pytest.mark.parametrize("words", [["recipe", "show"], ["plan"]], ids=" ".join)
def test_the_installed_command_finds_a_recipe_by_its_name(invoke: Invoke, words: list[str]) -> None:
    done = invoke(*words, "digits", "--images", "1797")
    assert "266,848" in done.stdout, done.stderr


def test_an_installed_sweep_starts_with_the_digits(invoke: Invoke) -> None:
    """Up to its storage, the first thing that it tries."""
    done = invoke("sweep", "digits", "--set", "storage.root=/proc/none")
    assert (done.returncode, "error: storage /proc/none cannot be used" in done.stderr) == (2, True), done.stderr
