"""Stopped or killed in any stage with all its children, and rerun: everything is made once. No file or title has a secret."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dis_scale.sweep import state
from dis_scale.tracking.goodput import GOODPUT
from dis_scale.tracking.rows import RowReader
from pipelines.stop import stop_sweep
from tests.support import secrets, sweeps

ONE_WORKER = ("models={dis: {kind: dis, width: 16, depth: 2, patch: 4}}", "train.workers=1")
"""Of one model; tests/e2e/test_cluster.py trains in two workers."""
SEARCH_EVERY_S = 8.0
ENDS_S = 30.0
"""Time in which all processes of a Ray have ended after it has; by Ray's own settings the drivers need 39 s."""


pytestmark = pytest.mark.timeout(2400)  # up to five sweeps one after the other


def in_prepare(root: Path) -> bool:
    return sweeps.sweep_at(root).vae.exists("manifest.json")


def in_precompute(root: Path) -> bool:
    return len(list(root.glob("latents/*/*.json"))) > 1


def in_training(root: Path) -> bool:
    run = sweeps.sweep_at(root).run("dis")
    return len(run.resume.list()) > 1 and 3200 not in state.published_counts(run)


def in_evaluation(root: Path) -> bool:
    return sweeps.sweep_at(root).folder.exists("evaluation/dis/000000003200/block-00000.npz")


def kill_in(stage: Callable[[Path], bool], root: Path, log: Path, children: bool = True) -> None:
    """SIGKILL the command in a stage, and all its children unless they are to be left to the next command."""
    assert not stage(root), f"{stage.__name__} was passed before"
    process = sweeps.start(str(root), *sweeps.SLOW, log=log)
    sweeps.wait_until(lambda: stage(root), process, log)
    sweeps.kill_all(process) if children else process.kill()


@pytest.mark.faults  # tests/e2e/test_cluster.py has it in `make test`, on a cluster
def test_a_sweep_makes_everything_without_a_secret_and_a_rerun_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in secrets.SECRETS.items():
        monkeypatch.setenv(name, value)
    root, log, search = tmp_path / "store", tmp_path / "printed.log", secrets.Search(secrets.SECRETS)
    _run_and_search(sweeps.start(str(root), *ONE_WORKER, log=log), log, search)
    assert log.read_text().index("plan of tiny") < log.read_text().index("Ray job")
    assert f"page     {root}/sweeps/tiny/report/index.html" in log.read_text()
    search.folder(tmp_path)
    search.assert_none()
    assert any("printed.log" in name for name in search.searched)
    assert len(search.secrets) == len(secrets.SECRETS) + 1, "Ray's token was not seen"
    _assert_complete_and_rerun(root, *ONE_WORKER)


@pytest.mark.faults
def test_a_ray_of_its_own_that_ends_is_followed_by_another(tmp_path: Path) -> None:
    """As it does if the machine is so busy that one of Ray's processes gives up: its dashboard answers nobody any more."""
    root, log = tmp_path / "store", tmp_path / "log"
    process = sweeps.start(str(root), *sweeps.SLOW, *ONE_WORKER, log=log)
    sweeps.wait_until(lambda: in_training(root), process, log)
    below = psutil.Process(process.pid).children(recursive=True)
    (raylet,) = (each for each in below if each.name() == "raylet")
    raylet.kill()
    assert not psutil.wait_procs(below, ENDS_S)[1], "what is left of it waits for it, each in a core of its own"
    assert process.wait(1200) == 0, log.read_text()
    assert log.read_text().count("another one is started, and the sweep continues") == 1
    _nothing_made_again(root, {})


@pytest.mark.faults
def test_killed_in_precompute_and_stopped_in_training_it_makes_everything_once(tmp_path: Path) -> None:
    root, log = tmp_path / "store", tmp_path / "log"
    kill_in(in_precompute, root, log)
    made = _nothing_made_again(root, {})

    sweep = sweeps.sweep_at(root, *sweeps.SLOW)
    process = sweeps.start(str(root), *sweeps.SLOW, log=log)
    sweeps.wait_until(lambda: in_training(root), process, log)
    assert stop_sweep(str(sweep), None)[0].startswith(f"process {process.pid} on ")
    assert process.wait(60) == 75, log.read_text()
    assert any(row.name == GOODPUT for row in RowReader(sweep.run("dis").log).new()), "it agreed on a step and saved"
    made = _nothing_made_again(root, made)

    done = sweeps.run(str(root), *sweeps.SLOW)
    assert done.returncode == 0, done.stdout + done.stderr
    _nothing_made_again(root, made)
    _assert_complete_and_rerun(root, *sweeps.SLOW)


def _assert_complete_and_rerun(root: Path, *settings: str) -> None:
    """Assert that everything exists, also in MLflow; that a rerun makes nothing, and one with another seed is refused."""
    sweeps.assert_complete(str(root), *settings)
    sweeps.assert_mlflow_has_everything(str(root), *settings)
    made = sweeps.times(str(root))
    rerun = sweeps.run(str(root), *settings)
    assert rerun.returncode == 0, rerun.stdout + rerun.stderr
    assert "nothing to do: every model is trained and evaluated" in rerun.stdout
    assert sweeps.times(str(root)) == made
    other = sweeps.run(str(root), *settings, "seed=1")
    assert other.returncode == 2
    assert "seed: stored 0, given 1" in other.stderr
    assert "Traceback" not in other.stderr


def _run_and_search(process: subprocess.Popen[bytes], printed: Path, search: secrets.Search) -> None:
    """Await the end of a sweep that succeeds; search its Ray's folder and all process titles meanwhile."""
    deadline = time.monotonic() + sweeps.TIMEOUT_S
    try:
        while process.poll() is None:
            assert time.monotonic() < deadline, printed.read_text()
            search.ray(printed.read_text())
            search.processes()
            time.sleep(SEARCH_EVERY_S)
    finally:
        if process.poll() is None:
            sweeps.kill_all(process)
    assert process.returncode == 0, printed.read_text()


@pytest.mark.faults
def test_killed_in_every_stage_in_turn_it_makes_everything_once(tmp_path: Path) -> None:
    root, log = tmp_path / "store", tmp_path / "log"
    made: dict[str, float] = {}
    for stage in (in_prepare, in_precompute, in_training, in_evaluation):
        kill_in(stage, root, log, children=stage in (in_prepare, in_precompute))
        made = _nothing_made_again(root, made)
    done = sweeps.run(str(root), *sweeps.SLOW)
    assert done.returncode == 0, done.stdout + done.stderr
    sweeps.assert_complete(str(root), *sweeps.SLOW)
    _nothing_made_again(root, made)


@pytest.mark.faults
def test_sigterm_stops_training_at_a_resume_point_and_a_rerun_continues(tmp_path: Path) -> None:
    root, log = tmp_path / "store", tmp_path / "log"
    process = sweeps.start(str(root), *sweeps.SLOW, log=log)
    sweeps.wait_until(lambda: in_training(root), process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, log.read_text()
    made = _nothing_made_again(root, {})
    run = sweeps.sweep_at(root).run("dis")
    assert state.resumable_images(run) > 0
    done = sweeps.run(str(root), *sweeps.SLOW)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _nothing_made_again(root, made)


def _nothing_made_again(root: Path, before: dict[str, float]) -> dict[str, float]:
    """Return what exists now; it contains all that existed before, unchanged."""

    def exists(path: Path) -> bool:
        if path.suffix == ".tar":
            return path.with_suffix(".json").exists()
        return path.name == "metrics.json" or (path.parent / "manifest.json").exists()

    now = {name: when for name, when in sweeps.times(str(root)).items() if exists(root / name)}
    assert {name: now[name] for name in before} == before
    return now


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = sweeps.run(str(tmp_path), "train.lane=4")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
