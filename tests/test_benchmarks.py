"""The benchmarks' own parts: a job is warm before it is timed, and what was measured is kept when a run is cut off."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import dit_counts, kernels, record, rows, throughput, trace
from benchmarks.bringup import Options
from pipelines.environment import EXPANDABLE_SEGMENTS
from tests.support.scans import h200

__all__ = ["h200"]

ROOT = Path(__file__).parent.parent


def test_a_job_that_compiles_in_its_first_run_is_timed_without_it() -> None:
    waits = iter([0.2])

    def job() -> None:
        time.sleep(next(waits, 0.0))

    times = rows.measure({"job": job}, rounds=3, slow_s=0.1)["job"]
    assert len(times) == 3
    assert max(times) < 0.1


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "name.json"


def recorded(results: Path) -> dict[str, Any]:
    return {name: lines[1:] for name, lines in json.loads(results.read_text())["benchmarks"].items()}


def run_modules(results: Path, **lines: list[dict[str, Any]]) -> int:
    return record.main("name", *lines, folder=results.parent, run=lambda module, _: iter(lines[module]))


def test_a_later_part_keeps_the_earlier_ones(results: Path) -> None:
    assert run_modules(results, one=[{"a": 1}], two=[{"b": 2}]) == 0
    assert run_modules(results, two=[{"b": 3}], three=[{"c": 4}]) == 0
    assert recorded(results) == {"one": [{"a": 1}], "two": [{"b": 3}], "three": [{"c": 4}]}


def test_results_of_other_versions_are_not_overwritten(results: Path) -> None:
    run_modules(results, one=[{"a": 1}])
    results.write_text(json.dumps(json.loads(results.read_text()) | {"versions": {"torch": "2.0"}}))
    with pytest.raises(SystemExit, match=r"name.json has rows of another machine or other versions \(versions\)"):
        run_modules(results, two=[{"b": 2}])
    assert recorded(results) == {"one": [{"a": 1}]}, "which nothing could make again"


def test_rows_are_written_as_they_come(results: Path) -> None:
    def cut_off(module: str, _: list[str]) -> Any:
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record.main("name", "one", "two", folder=results.parent, run=cut_off)
    not_measured = {"not measured": "cut off, or not begun"}
    assert json.loads(results.read_text())["benchmarks"]["two"] == [not_measured]
    assert recorded(results)["one"] == [{"a": 1}, not_measured]


@pytest.mark.parametrize(
    ("module", "again", "kept"),
    [("settings", "1", True), ("settings", "2", False), ("settings", "1+", False), ("trace", "1", False)],
)
def test_a_second_run_at_a_commit_measures_what_the_first_had_no_time_for(
    results: Path, module: str, again: str, kept: bool
) -> None:
    """A GPU is there for minutes: the rows that it measured last came last in every run."""
    lines: list[dict[str, Any]] = [{"name": "a", "s": 1}, {"name": "b", "not measured": "no time left"}]

    def run(_: str, measured: list[str]) -> Any:
        return (row for row in lines if row["name"] not in measured)

    for at in (again, again) if again.endswith("+") else ("1", again):
        record.main("name", module, folder=results.parent, run=run, at=at)
        lines = [{"name": "a", "s": 2}, {"name": "b", "s": 2}]
    assert [row["s"] for row in recorded(results)[module]] == ([1, 2] if kept else [2, 2])


def test_results_do_not_make_a_commit_another_one(tmp_path: Path) -> None:
    """The first part of a bring-up writes its rows into a file of the repository."""
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    program, rows_of = folder / "program.py", folder / "results/gpu.json"
    for path in (program, rows_of):
        path.write_text("1")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "a")):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    clean = record.commit(folder)
    rows_of.write_text("2")
    assert record.commit(folder) == clean
    program.write_text("2")
    assert record.commit(folder) == f"{clean}+"


def test_jobs_that_have_a_row_are_left_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(record.MEASURED, '["a"]')
    throughput.run_all([("a", print), ("b", print)], budget_s=-1)
    assert json.loads(capsys.readouterr().out) == {"name": "b", "not measured": "no time left after -1 s"}


def test_a_failed_benchmark_is_recorded_and_the_next_one_runs(results: Path) -> None:
    assert record.main("name", "nothing", "rows", folder=results.parent) == 1
    (why,) = recorded(results).pop("nothing")
    assert (why["failed"], why["last_line"].split()[-1]) == (1, "benchmarks.nothing")
    assert recorded(results)["rows"] == []


BARE = "import sys\nfor name in {missing}: sys.modules[name] = None\nimport benchmarks.record, benchmarks.{module}"


@pytest.mark.parametrize("module", ["scan_gpu", "kernels"])
def test_the_first_rows_of_a_gpu_need_pytorch_and_triton_only(module: str) -> None:
    """An image of PyTorch has no other package."""
    missing = ["pydantic", "fsspec", "psutil", "deepspeed", "diffusers", "webdataset", "ray", "mlflow"]
    program = BARE.format(missing=missing, module=module)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


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


def test_the_kernels_part_covers_each_number_of_lanes(h200: None) -> None:
    """On an H200, both in float32 and in bfloat16; the self-test of training's sizes at 512 pixels, too."""
    cuda = torch.device("cuda")
    compared = list(kernels.comparisons("triton", Options(cuda, quick=False)))
    for dtype in (torch.float32, torch.bfloat16):
        cases = [case for case, each in compared if each == dtype and case.L == 258]
        selected = set().union(*(kernels.lanes_of(cuda, case) for case in cases))
        assert selected == {("forward", 1), ("forward", 4), ("backward", 1), ("backward", 2), ("backward", 4)}
        assert len(cases) == 3
    sizes = {(case.images, case.L, case.E) for case, dtype in compared if dtype == torch.bfloat16}
    assert {(32, 258, 2048), (8, 1026, 2048), (2, 4098, 2048)} <= sizes


WITHOUT = """
import sys
from pathlib import Path
for name in ("ray", "mlflow", "s3fs", "sklearn", "diffusers"):
    sys.modules[name] = None
import torch
from benchmarks import digits, smoke
from dis_scale.sweep.state import require_latents
import dis_scale.training.profile

root, cpu = Path(sys.argv[1]), torch.device("cpu")
sweep = digits.prepare(digits.recipe_of(root, steps=3, quick=True), root, cpu)
run = digits.TrainingRun(sweep, require_latents(sweep.folder), "dis", "cpu")
digits.train(run, 0)
assert smoke.published(run)
assert smoke.distance(sweep, sweep, "euler", cpu) > 0
print("loaded", [name for name in ("ray", "mlflow", "s3fs", "pipelines", "torch._dynamo") if sys.modules.get(name)])
"""
"""Everything before training, three steps, and samples, in a process where these packages are missing."""


def test_training_sampling_and_profiling_need_neither_ray_nor_mlflow_nor_s3(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "loaded []" in done.stdout
    missing = [json.loads(line)["not measured"] for line in done.stdout.splitlines() if "not measured" in line]
    assert missing == ["scikit-learn is not installed: generated images instead", "diffusers is not installed: latents are pixels"]


@pytest.mark.slow
def test_the_smoke_part_compares_a_device_with_the_cpu() -> None:
    found = [row for row in quick("smoke") if "right" in row]
    assert all(row["right"] for row in found)
    parts = {"fp32", "bf16", "after a kill", "ZeRO 2", "ZeRO 3", "euler", "ddpm"}
    assert {part for part in parts if any(part in row["name"] for row in found)} == parts


@pytest.mark.slow
def test_the_throughput_part_measures_training_sampling_and_encoding() -> None:
    found = {row["name"].split(",")[0]: row for row in quick("throughput")}
    block = "a block of DiT-S/2 against fast-DiT's"
    assert found.keys() == {"train DiT-S/8", "train DiS-S/8", "sample DiT-S/8", "encode 32 pixels", block}
    assert found.pop(block)["times_faster"] > 0
    assert found["encode 32 pixels"]["share_of_the_network_alone"] > 0
    assert all(row.get("images_per_s", row.get("images_per_s_50_steps", 0)) > 0 for row in found.values())
    assert found["train DiS-S/8"]["mfu"] > 0
    assert found["train DiS-S/8"]["states_gib"] > 0


def test_a_job_that_fails_is_a_row_that_says_so() -> None:
    """In a program of its own: jobs write where the process does that they are forked from."""
    program = (
        "import time; from benchmarks import throughput; from tests.test_benchmarks import kill_itself, raise_out_of_memory\n"
        "for name, job in {'error': raise_out_of_memory, 'killed': kill_itself, 'slow': time.sleep}.items():\n"
        "    throughput.PRELOADED, throughput.JOB_S = [], 1.0 if name == 'slow' else 60.0\n"
        "    throughput.in_a_process(name, job, 100)\n"
    )
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    reasons = {"error": "RuntimeError: CUDA out of memory", "killed": "exit code -9", "slow": "longer than 1 s"}
    assert {row["name"]: row["not measured"] for row in rows} == reasons


def raise_out_of_memory(_: int) -> None:
    raise RuntimeError("CUDA out of memory")


def kill_itself(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_every_part_of_the_bring_up_exists() -> None:
    script = (ROOT / "benchmarks/gpu.sh").read_text()
    ((variable, value),) = EXPANDABLE_SEGMENTS.items()
    assert f'export {variable}="${{{variable}:-{value}}}"' in script, "the allocator of a job's workers"
    for name in ["kernels", "scan_gpu", "settings", "trace", "step", "smoke", "throughput"]:
        assert name in script
        assert (ROOT / "benchmarks" / f"{name}.py").exists()
    unknown = subprocess.run(["sh", ROOT / "benchmarks/gpu.sh", "name", "smok"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "no part smok; usage: sh benchmarks/gpu.sh NAME scan_gpu|kernels|settings|trace|step|smoke|throughput" in unknown.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_bring_up_ends_at_once() -> None:
    command = ["sh", str(ROOT / "benchmarks/gpu.sh"), "name", "smoke"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert (done.returncode, done.stderr.strip()) == (1, "error: no GPU here that PyTorch sees")


def test_every_job_of_the_throughput_part_is_valid() -> None:
    """A combination that is refused would be known on the GPU only."""
    for job in throughput.SIZED + throughput.VARIED:
        assert throughput.recipe_of(job, "cuda").train.precision == "bf16"


def test_the_baseline_launches_no_more_than_public_code(capsys: pytest.CaptureFixture[str]) -> None:
    """DiT against fast-DiT: neither operations nor bytes of a block or of the weights' average."""
    dit_counts.main()
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 6
    for ours, public in zip(found[::2], found[1::2], strict=True):
        assert (ours["name"], ours["code"], public["code"]) == (public["name"], "ours", "fast-DiT")
        assert 0 < ours["launches"] < public["launches"]
        assert 0 < ours["gbytes"] < public["gbytes"]


def test_a_trace_has_gaps_and_kernels_by_their_time() -> None:
    """Two kernels at once leave no gap between them."""
    busy = [trace.Busy("a(int)", 0, 4), trace.Busy("void b<2>(int)", 1, 3), trace.Busy("a(long)", 9, 10)]
    assert trace.gaps_of(busy) == [0, 5]
    whole, *groups = trace.summary(busy)
    assert whole == {"name": "GPU", "span_ms": 0.01, "busy": 0.5, "launches": 3}
    assert [row["count"] for row in groups[:5]] == [0, 1, 0, 0, 0]
    assert [(row["name"], row["ms"], row["count"]) for row in groups[5:]] == [("a", 0.005, 2), ("b<2>", 0.002, 1)]
