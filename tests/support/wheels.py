"""The wheel, built from a copy of this repository, and an environment with it."""

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
GATED_CONV = ROOT / "tests/support/gated_conv"
"""A package that brings a family of backbones."""
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "configs", "dis_scale", "pipelines")


def build(source: Path) -> Path:
    """Build this repository's wheel from a copy in `source`: a build leaves folders beside pyproject.toml."""
    version = importlib.metadata.version("setuptools")
    assert int(version.split(".")[0]) >= 77, f"setuptools {version}: pip install -e '.[dev]' -c constraints.txt"
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    return _build(source)


def install_gated_conv(scratch: Path) -> Path:
    """Build the example's wheel, and install it into a folder for PYTHONPATH, which is returned."""
    wheel = _build(shutil.copytree(GATED_CONV, scratch / "source"))
    _run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", scratch / "installed", wheel])
    return scratch / "installed"


def _build(source: Path) -> Path:
    _run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source, source])
    (built,) = source.glob("*.whl")
    return built


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel into a new environment, which has this one's packages but not this repository; return its python."""
    _run([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin/python"
    _run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--ignore-installed", wheel])
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not read
    return python


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
