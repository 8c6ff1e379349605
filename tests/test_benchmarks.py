"""The benchmarks' own parts: a job is warm before it is timed, and what was measured is kept when a run is cut off."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record, rows

ROOT = Path(__file__).parent.parent


def test_a_job_that_compiles_in_its_first_run_is_timed_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SLOW_S", 0.1)
    waits = iter([0.2])

    def job() -> None:
        time.sleep(next(waits, 0.0))

    times = rows.measure({"job": job}, rounds=3)["job"]
    assert len(times) == 3
    assert max(times) < 0.1


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path / "name.json"


def recorded(results: Path) -> dict[str, Any]:
    return {name: lines[1:] for name, lines in json.loads(results.read_text())["benchmarks"].items()}


def run_modules(monkeypatch: pytest.MonkeyPatch, **lines: list[dict[str, Any]]) -> int:
    monkeypatch.setattr(record, "rows", lambda module: iter(lines[module]))
    return record.main("name", *lines)


def test_a_later_part_keeps_the_earlier_ones(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_modules(monkeypatch, one=[{"a": 1}], two=[{"b": 2}]) == 0
    assert run_modules(monkeypatch, two=[{"b": 3}], three=[{"c": 4}]) == 0
    assert recorded(results) == {"one": [{"a": 1}], "two": [{"b": 3}], "three": [{"c": 4}]}


def test_results_of_other_versions_are_not_kept(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_modules(monkeypatch, one=[{"a": 1}])
    monkeypatch.setattr(record, "PACKAGES", ("numpy",))
    run_modules(monkeypatch, two=[{"b": 2}])
    assert recorded(results) == {"two": [{"b": 2}]}


def test_rows_are_written_as_they_come(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(module: str) -> Any:
        yield {"a": 1}
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "rows", cut_off)
    with pytest.raises(KeyboardInterrupt):
        record.main("name", "one")
    assert recorded(results) == {"one": [{"a": 1}]}


def test_a_failed_benchmark_is_recorded_and_the_next_one_runs(results: Path) -> None:
    assert record.main("name", "nothing", "rows") == 1
    assert recorded(results) == {"nothing": [{"failed": 1}], "rows": []}


def quick(module: str) -> list[dict[str, Any]]:
    """The rows of a bring-up's module in its form for a CPU; fails if the module does."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--device", "cpu", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_the_kernels_part_compares_each_backend_of_a_device() -> None:
    found = [row for row in quick("kernels") if "right" in row]
    assert {row["name"].split(",")[0] for row in found} == {"native", "chunked"}
    assert all(row["right"] and 0 <= row["error"] < row["allowed"] for row in found)
