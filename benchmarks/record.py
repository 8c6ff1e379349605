"""Run benchmarks and record their rows with machine, versions and date: `python -m benchmarks.record NAME MODULE ...`.

Their output is shown as it comes. `benchmarks/results/NAME.json` gets each module's JSON lines as they come, with a last one that
says so until the module has ended: a run that is cut off leaves what it measured, and what it did not. A file of the same machine
and versions keeps its other modules; each module has its own date and commit. `settings` and `throughput` keep their measured rows
if they are run again at the same commit, and leave these jobs out: a second run is for what the first had no time for.
"""

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dis_scale.process.machine import processor

RESULTS = Path(__file__).parent / "results"
CONTINUED, MEASURED = ("settings", "throughput"), "DIS_SCALE_MEASURED"
"""Modules whose jobs are named by their rows, and the variable with the names of those that have one, in JSON."""
CUT_OFF = {"not measured": "cut off, or not begun"}
PACKAGES = ["torch", "triton", "mamba-ssm", "causal-conv1d", "deepspeed", "numpy", "webdataset", "diffusers", "torch-fidelity"]


def machine() -> dict[str, Any]:
    """Machine and versions."""
    return {
        "processor": processor(), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES if any(metadata.distributions(name=name))},
    }  # fmt: skip


def commit(folder: Path = RESULTS.parent) -> str | None:
    """The commit that is measured, with a + if files but results differ from it; None outside a repository."""
    described, changed = (
        subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
        for arguments in (("describe", "--always", "--exclude=*"), ("diff", "--quiet", "HEAD", "--", ":/", ":(exclude)results"))
    )
    return described.stdout.strip() + "+" * changed.returncode if described.stdout else None


def rows(module: str, measured: list[str]) -> Iterator[dict[str, Any]]:
    """Run a benchmark, print its output, and yield its JSON lines as they come; a last one if it fails, with its last words."""
    command, env = [sys.executable, "-m", f"benchmarks.{module}"], {**os.environ, MEASURED: json.dumps(measured)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as running:
        assert running.stdout is not None
        line = ""
        for line in running.stdout:
            print(line, end="", flush=True)
            with contextlib.suppress(json.JSONDecodeError):  # lines of several processes may mix
                if line.startswith("{"):
                    yield json.loads(line)
    if running.returncode:
        yield {"failed": running.returncode, "last_line": line.strip()}


def read(path: Path) -> dict[str, Any]:
    """The earlier benchmarks of this machine with these versions, if the file has any; the program ends for a file of others."""
    facts = machine()
    if not path.exists():
        return facts | {"benchmarks": {}}
    before = json.loads(path.read_text())
    if other := [name for name, value in facts.items() if before.get(name) != value]:
        sys.exit(f"{path.name} has rows of another machine or other versions ({', '.join(other)}): give another name, or delete it")
    return facts | {"benchmarks": before["benchmarks"]}


def write(path: Path, result: dict[str, Any]) -> None:
    """Replace the file at once: a run that is cut off leaves a complete file."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(path)


def begun(module: str, before: list[dict[str, Any]], at: str | None) -> list[dict[str, Any]]:
    """Return a module's date and commit, and what it has measured at this commit if it continues."""
    header = {"date": datetime.date.today().isoformat(), "commit": at}
    if module not in CONTINUED or at is None or at.endswith("+") or before[0].get("commit") != at:
        return [header]
    return [header, *(row for row in before if "name" in row and "not measured" not in row)]


Run = Callable[[str, list[str]], Iterator[dict[str, Any]]]


def main(name: str, *modules: str, folder: Path = RESULTS, run: Run = rows, at: str | None = None) -> int:
    """Return 1 if a benchmark failed, otherwise 0; the others run anyway."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    result = read(path)
    measured = result["benchmarks"]
    for module in modules:
        measured.setdefault(module, [CUT_OFF])
    for module in modules:
        lines = begun(module, measured[module], at or commit())
        measured[module] = [*lines, CUT_OFF]
        write(path, result)
        for row in run(module, [each["name"] for each in lines[1:]]):
            lines.append(row)
            measured[module] = [*lines, CUT_OFF]
            write(path, result)
        measured[module] = lines
        write(path, result)
    return int(any("failed" in row for module in modules for row in measured[module]))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
