"""An empty MLflow filled from storage is the first one again: rows with their times, parameters, files, how runs ended."""

from pathlib import Path
from typing import Any

import pytest

from dis_scale import mirror, tracking
from dis_scale import plan as plans
from dis_scale.errors import DisScaleError
from dis_scale.evaluation import results
from dis_scale.evaluation.results import Drawn
from dis_scale.plan import Plan
from dis_scale.recipe import LatentShape, reading
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.tracking import Log, Projection, Rows
from tests.conftest import TINY
from tests.test_cli import invoke


@pytest.fixture
def plan() -> Plan:
    return plans.plan(reading.load(TINY, ["train.publish_images=[160]"]), LatentShape(4, 8))


@pytest.fixture
def sweep(tmp_path: Path, plan: Plan) -> Folder:
    """A finished sweep: two attempts' rows, one published count, each way to draw evaluated, a report."""
    made = open_folder(tmp_path) / "sweeps/tiny"
    made.write(reading.FILE, reading.dump(plan.recipe).encode())
    for model in plan.recipe.models:
        for attempt in (1, 2):
            log = Log(made / f"runs/{model}/log", attempt)
            log.add(80 * attempt, {"loss": 1.0 / attempt, tracking.ATTEMPT: attempt})
            log.flush()
        manifest.put(made / f"runs/{model}/published/000000000160", {"weights.safetensors": b""}, images=160)
        for variant in plan.recipe.evaluate.samplings:
            place = results.folder(made, Drawn(model, 160, variant))
            values = {"fd_digits_80": 9.0, "fd_digits_80_error": 0.5, "fd_digits_80_floor": 0.1}
            found = {"values": values, "seconds": {"sampling": 2.5}, "time": 7.25, "metrics": ["distance"]}
            place.write_json(results.METRICS, found)
            place.write(results.GRID, b"a picture")
    (made / "report").write("index.html", b"<!doctype html>")
    return made


def content(sweep: Folder, uri: str) -> dict[str, Any]:
    """All that an MLflow holds of the sweep, by model."""
    client, ids = tracking.client(uri), sweep.read_json(tracking.FILE)
    found = {}
    for name, run_id in {**ids["models"], "sweep": ids["sweep"]}.items():
        run = client.get_run(run_id)
        metrics = {
            m: [(x.step, x.value, x.timestamp) for x in client.get_metric_history(run_id, m)] for m in run.data.metrics
        }
        folders = ["samples", "samples/wide", "report"]
        files = sorted(a.path for f in folders for a in client.list_artifacts(run_id, f) if not a.is_dir)
        found[name] = (metrics, dict(run.data.params), files, run.info.status)
    return found


def test_an_emptied_mlflow_is_filled_to_the_first_one(sweep: Folder, plan: Plan, tmp_path: Path) -> None:
    first, second = (f"sqlite:///{tmp_path}/{name}.db" for name in ("first", "second"))
    tracking.begin(sweep, first, plan.parameters())
    for model in plan.recipe.models:
        Projection(sweep, model).send(Rows(sweep / f"runs/{model}/log").new())
        for variant in plan.recipe.evaluate.samplings:
            assert mirror.evaluation(sweep, Drawn(model, 160, variant))
        Projection(sweep, model).finish("FINISHED")
    assert mirror.report(sweep, "FINISHED")
    as_it_came = content(sweep, first)
    assert as_it_came["dis"][0]["fd_digits_80/wide"] == [(160, 9.0, 7250)]
    assert as_it_came["sweep"][2] == ["report/index.html"]

    code, output = invoke("mlflow", "sync", sweep.url, "--uri", second)
    assert (code, "8 rows of training and all evaluations are in" in output) == (0, True)
    assert content(sweep, second) == as_it_came
    assert invoke("mlflow", "sync", sweep.url)[0] == 0
    assert content(sweep, second) == as_it_came, "a second time doubles nothing"


def test_a_model_that_failed_is_marked(sweep: Folder, plan: Plan, tmp_path: Path) -> None:
    (sweep / "runs/dit").write_json(results.ENDED, {"why": "a worker was lost"})
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mirror.everything(sweep, plan, uri)
    assert {name: found[3] for name, found in content(sweep, uri).items()}["dit"] == "FAILED"


def test_an_mlflow_that_is_away_is_said(sweep: Folder, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(DisScaleError, match=r"MLflow cannot be reached at http://127\.0\.0\.1:9"):
        mirror.everything(sweep, plan, "http://127.0.0.1:9")


def test_a_sweep_that_was_never_tracked_needs_a_uri(sweep: Folder) -> None:
    code, output = invoke("mlflow", "sync", sweep.url)
    assert (code, "was never tracked: say where to" in output) == (2, True)
