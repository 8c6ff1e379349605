"""Labelled images to the curve, on real parts: on disk and in an object store, and again."""

import time
from pathlib import Path

from dis_scale import recipe as recipes
from dis_scale import tracking
from tests.e2e import sweeps


def test_on_disk_and_again(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    first = sweeps.run(root)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.index("plan of tiny") < first.stdout.index("Ray job")
    assert f"figure   {root}/sweeps/tiny/report/gflops_fid.png" in first.stdout
    sweeps.assert_whole(root)
    _assert_mlflow_has_everything(root)
    before = sweeps.times(root)

    begin = time.monotonic()
    again = sweeps.run(root)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing to do: every model is trained and evaluated" in again.stdout
    assert time.monotonic() - begin < 30
    assert sweeps.times(root) == before

    other = sweeps.run(root, "seed=1")
    assert other.returncode == 2
    assert "seed: stored 0, given 1" in other.stderr
    assert "Traceback" not in other.stderr


def test_in_an_object_store(bucket: str, tmp_path: Path) -> None:
    root = f"{bucket}/prefix"
    done = sweeps.run(
        root, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "train.zero_stage=3", "train.precision=bf16"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sweeps.assert_whole(root)


def _assert_mlflow_has_everything(root: str) -> None:
    ids = sweeps.sweep_folder(root).read_json(tracking.FILE)
    client = tracking.client(ids["uri"])
    recipe = recipes.load(sweeps.TINY)
    assert set(ids["models"]) == set(recipe.models)
    for run_id in ids["models"].values():
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert {"gmacs_forward", "parameters", "tokens", "global_batch", "seed"} <= run.data.params.keys()
        losses = client.get_metric_history(run_id, "loss")
        assert sorted(m.step for m in losses) == [160, 320]
        distances = client.get_metric_history(run_id, recipe.evaluate.metric)
        assert sorted(m.step for m in distances) == [0, 160, 320]
        grids = [a.path for folder in ("samples", "samples/wide") for a in client.list_artifacts(run_id, folder)]
        assert len([path for path in grids if path.endswith(".png")]) == 6
    stored = [f"report/{name}" for name in sweeps.sweep_folder(root).list("report")]
    assert [a.path for a in client.list_artifacts(ids["sweep"], "report")] == stored
