"""Stopped, or killed with -9 in any stage with all its children, and given again: every thing is made once."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dis_scale import tracking
from dis_scale.recipe import reading
from dis_scale.storage.folder import Folder
from dis_scale.sweep import stop
from dis_scale.training import checkpoint
from tests.support import sweeps


def test_stopped_twice_and_given_again_to_the_end_and_beyond(tmp_path: Path) -> None:
    root, log = str(tmp_path / "store"), tmp_path / "log"
    run = sweeps.sweep_folder(root) / "runs/dis"
    sweep = sweeps.start(root, *sweeps.SLOW, log=log)
    sweeps.wait_until(lambda: len((run / "resume").list()) > 1, sweep, log)
    assert all(job.startswith("tiny-") for job in stop(sweeps.sweep_folder(root), None))
    assert sweep.wait(60) == 75, log.read_text()
    assert "was stopped from outside; give the same command again to go on" in log.read_text()
    assert any(row.name == tracking.GOODPUT for row in tracking.Rows(run / "log").new()), (
        "it agreed on a step and saved"
    )
    other, kept = sweeps.sweep_folder(root) / "runs/dit", (sweeps.sweep_folder(root) / "runs/dit/resume").list()
    sweep = sweeps.start(root, *sweeps.SLOW, log=log)
    sweeps.wait_until(lambda: (other / "resume").list() != kept, sweep, log)
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait(60) == 75, log.read_text()
    assert "stopped as asked; give the same command again to go on" in log.read_text()
    before = sweeps.times(root)

    done = sweeps.run(root, *sweeps.SLOW)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.index("plan of tiny") < done.stdout.index("Ray job")
    assert f"page     {root}/sweeps/tiny/report/index.html" in done.stdout
    sweeps.assert_whole(root, *sweeps.SLOW)
    after = sweeps.times(root)
    assert {name: after[name] for name in before} == before
    _assert_mlflow_has_everything(root)

    begin = time.monotonic()
    again = sweeps.run(root, *sweeps.SLOW)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing to do: every model is trained and evaluated" in again.stdout
    assert time.monotonic() - begin < 30
    assert sweeps.times(root) == after
    other = sweeps.run(root, *sweeps.SLOW, "seed=1")
    assert other.returncode == 2
    assert "seed: stored 0, given 1" in other.stderr
    assert "Traceback" not in other.stderr


def _assert_mlflow_has_everything(root: str) -> None:
    ids = sweeps.sweep_folder(root).read_json(tracking.FILE)
    client = tracking.client(ids["uri"])
    recipe = reading.load(sweeps.TINY, list(sweeps.SLOW))
    assert set(ids["models"]) == set(recipe.models)
    for run_id in ids["models"].values():
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert {"gmacs_forward", "parameters", "tokens", "global_batch", "seed"} <= run.data.params.keys()
        losses = client.get_metric_history(run_id, "loss")
        assert sorted(m.step for m in losses) == list(range(160, 3201, 160)), "each row once, whatever was stopped"
        distances = client.get_metric_history(run_id, recipe.evaluate.metric)
        assert sorted(m.step for m in distances) == [0, 160, 3200]
        grids = [a.path for folder in ("samples", "samples/wide") for a in client.list_artifacts(run_id, folder)]
        assert len([path for path in grids if path.endswith(".png")]) == 6
    stored = [f"report/{name}" for name in sweeps.sweep_folder(root).list("report")]
    assert [a.path for a in client.list_artifacts(ids["sweep"], "report")] == stored


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
