"""The wheel in an environment of its own, outside of the repository: the commands and the shipped recipes are there.

tests/e2e/test_cluster.py runs a complete sweep from it.
"""

import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dis_scale.recipe import shipped

ROOT = Path(__file__).parent.parent
Invoke = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def invoke(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Invoke:
    """Run the installed command in an empty folder."""
    empty = tmp_path_factory.mktemp("empty")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    return lambda *words: subprocess.run(
        [installed.with_name("dis-scale"), *words], cwd=empty, env=clean, capture_output=True, text=True
    )


def test_a_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    kinds = (".py", ".cpp", ".css", ".inl", ".js", ".typed")
    files = [path for folder in ("dis_scale", "pipelines") for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    expected = {str(path.relative_to(ROOT)) for path in files}
    expected |= {f"dis_scale/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.*")}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_the_installed_command_lists_the_shipped_recipes(invoke: Invoke) -> None:
    done = invoke("recipe", "list")
    assert [line.split()[0] for line in done.stdout.splitlines()] == shipped.names(), done.stderr


def test_an_installed_sweep_starts_with_the_digits(invoke: Invoke) -> None:
    """Up to its storage, the first thing that it tries."""
    done = invoke("sweep", "digits", "--set", "storage.root=/proc/none")
    assert (done.returncode, "error: storage /proc/none cannot be used" in done.stderr) == (2, True), done.stderr
