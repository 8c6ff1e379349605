"""Run benchmarks and record their rows with machine, versions and date: `python -m benchmarks.record NAME MODULE ...`.

Their output is shown as it comes. `benchmarks/results/NAME.json` gets each module's JSON lines, and its failure, if any.
"""

import datetime
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "mamba-ssm",
    "causal-conv1d",
    "deepspeed",
    "numpy",
    "webdataset",
    "diffusers",
    "torch-fidelity",
)


def machine() -> dict[str, Any]:
    """Date, machine and versions."""
    return {
        "date": datetime.date.today().isoformat(), "processor": processor(), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
    }  # fmt: skip


def processor() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].partition(": ")[2] if models else platform.processor()


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def rows(module: str) -> list[dict[str, Any]]:
    """Run a benchmark, print its output, and return its JSON lines."""
    lines: list[dict[str, Any]] = []
    command = [sys.executable, "-m", f"benchmarks.{module}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                lines.append(json.loads(line))
    return lines if running.returncode == 0 else [*lines, {"failed": running.returncode}]


def main(name: str, *modules: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    result = machine() | {"benchmarks": {module: rows(module) for module in modules}}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
