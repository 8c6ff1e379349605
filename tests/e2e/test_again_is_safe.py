"""Stopped, or killed with -9 in any stage with all its children, and given again: every thing is made once."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dis_scale import checkpoint
from dis_scale.storage import Folder
from tests.e2e import sweeps


def test_stop_is_obeyed_and_the_same_command_goes_on(tmp_path: Path) -> None:
    root, log = str(tmp_path / "store"), tmp_path / "log"
    sweep = sweeps.start(root, *sweeps.SLOW, log=log)
    run = sweeps.sweep_folder(root) / "runs/dis"
    sweeps.wait_until(lambda: len((run / "resume").list()) > 1, sweep, log)
    assert sweeps.cli("stop", f"{root}/sweeps/tiny").startswith("asked to stop: tiny-")
    assert sweep.wait(60) == 75, log.read_text()
    assert "was stopped from outside; give the same command again to go on" in log.read_text()
    kept = (run / "resume").list()
    sweep = sweeps.start(root, *sweeps.SLOW, log=log)
    sweeps.wait_until(lambda: (run / "resume").list() != kept, sweep, log)
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait(60) == 75, log.read_text()
    assert "stopped as asked; give the same command again to go on" in log.read_text()
    before = sweeps.times(root)
    done = sweeps.run(root, *sweeps.SLOW)
    assert done.returncode == 0, done.stdout + done.stderr
    sweeps.assert_whole(root, *sweeps.SLOW)
    after = sweeps.times(root)
    assert {name: after[name] for name in before} == before


def in_prepare(sweep: Folder, _: Path) -> bool:
    return (sweep / "vae").exists("manifest.json")


def in_precompute(_: Folder, root: Path) -> bool:
    return len(list(root.glob("latents/*/*.json"))) > 1


def in_training(sweep: Folder, _: Path) -> bool:
    return len((sweep / "runs/dis/resume").list()) > 1 and 3200 not in checkpoint.published(sweep / "runs/dis")


def in_evaluation(sweep: Folder, _: Path) -> bool:
    return (sweep / "evaluation/dis/000000003200").exists("block-00000.npz")


def test_killed_in_every_stage_in_turn_it_still_makes_each_thing_once(tmp_path: Path) -> None:
    root, log = tmp_path / "store", tmp_path / "log"
    before: dict[str, float] = {}
    stages: list[Callable[[Folder, Path], bool]] = [in_prepare, in_precompute, in_training, in_evaluation]
    for stage in stages:
        assert not stage(sweeps.sweep_folder(str(root)), root), f"{stage.__name__} was passed before"
        process = sweeps.start(str(root), *sweeps.SLOW, log=log)
        sweeps.wait_until(lambda stage=stage: stage(sweeps.sweep_folder(str(root)), root), process, log)
        sweeps.kill_all(process)
        whole = _whole(root)
        assert {name: whole[name] for name in before} == before, f"made again after a kill in {stage.__name__}"
        before = whole
    done = sweeps.run(str(root), *sweeps.SLOW)
    assert done.returncode == 0, done.stdout + done.stderr
    sweeps.assert_whole(str(root), *sweeps.SLOW)
    after = sweeps.times(str(root))
    assert {name: after[name] for name in before} == before


def _whole(root: Path) -> dict[str, float]:
    """What exists: shards with their sidecar, folders with their manifest, metrics."""

    def exists(path: Path) -> bool:
        if path.suffix == ".tar":
            return path.with_suffix(".json").exists()
        return path.name == "metrics.json" or (path.parent / "manifest.json").exists()

    return {name: when for name, when in sweeps.times(str(root)).items() if exists(root / name)}


@pytest.mark.parametrize("override", ["train.lane=4", "train.workers=3"])
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path: Path, override: str) -> None:
    done = sweeps.run(str(tmp_path), override)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
