"""An empty MLflow that is filled from storage equals the first one: rows with their times, parameters, files, statuses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dis_scale.planning.plan import Plan, price_sweep
from dis_scale.process.errors import DisScaleError, Held, UserError
from dis_scale.recipe import LatentShape, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import GRID, Sampled, Sweep
from dis_scale.sweep.documents import Ended, Metrics, TrackingIds
from dis_scale.tracking.goodput import ATTEMPT
from dis_scale.tracking.mlflow import RunCopy, create_runs, open_client
from dis_scale.tracking.mlflow_copy import copy_earlier, copy_evaluation, copy_everything, copy_report
from dis_scale.tracking.rows import RowReader, RowWriter
from tests.conftest import TINY
from tests.support.commands import answer, invoke
from tests.support.documents import put_metrics, put_published
from tests.support.leases import run_elsewhere
from tests.support.mlflow_calls import before_each_call
from tests.support.store_requests import noted


@pytest.fixture
def plan() -> Plan:
    return price_sweep(reading.load(TINY, ["train.publish_images=[160]"]), LatentShape(4, 8))


@pytest.fixture
def sweep(tmp_path: Path, plan: Plan) -> Sweep:
    """A finished sweep: two attempts' rows, one published count, evaluated under each sampling setting, a report."""
    made = Sweep.below(open_folder(tmp_path), plan.recipe)
    made.save_recipe()
    for model in plan.recipe.models:
        for attempt in (1, 2):
            rows = RowWriter(made.run(model).log, attempt)
            rows.add(80 * attempt, {"loss": 1.0 / attempt, ATTEMPT: attempt})
            rows.settle()
        put_published(made.run(model).published_at(160), b"", images=160)
        for variant in plan.recipe.evaluate.samplings:
            folder = made.evaluation(Sampled(model, 160, variant))
            values = {"fd_digits_80": 9.0, "fd_digits_80_error": 0.5}
            put_metrics(folder, values, seconds={"sampling": 2.5, "metrics": 1.5}, time=7.25)
            folder.write(GRID, b"a picture")
    made.report.write("index.html", b"<!doctype html>")
    return made


def content(sweep: Sweep, uri: str) -> dict[str, Any]:
    """All that an MLflow holds of the sweep, by model."""
    client, ids = open_client(uri), TrackingIds.read(sweep.folder)
    copies = {}
    for name, run_id in {**ids.models, "sweep": ids.sweep}.items():
        run = client.get_run(run_id)
        metrics = {m: [(x.step, x.value, x.timestamp) for x in client.get_metric_history(run_id, m)] for m in run.data.metrics}
        folders = ["samples", "samples/wide", "report"]
        files = sorted(a.path for f in folders for a in client.list_artifacts(run_id, f) if not a.is_dir)
        copies[name] = (metrics, dict(run.data.params), files, run.info.status)
    return copies


def test_an_emptied_mlflow_is_filled_to_the_first_one(sweep: Sweep, plan: Plan, tmp_path: Path) -> None:
    first, second = (f"sqlite:///{tmp_path}/{name}.db" for name in ("first", "second"))
    create_runs(sweep, first, plan.parameters())
    for model in plan.recipe.models:
        RunCopy(sweep, model).send(RowReader(sweep.run(model).log).new())
        for variant in plan.recipe.evaluate.samplings:
            assert copy_evaluation(sweep, Sampled(model, 160, variant))
        RunCopy(sweep, model).finish("FINISHED")
    assert copy_report(sweep, "FINISHED")
    as_it_came = content(sweep, first)
    assert as_it_came["dis"][0]["fd_digits_80/wide"] == [(160, 9.0, 7250)]
    assert as_it_came["sweep"][2] == ["report/index.html"]
    assert as_it_came["dis"][0]["system/evaluation_sampling_wide"] == [(160, 2.5, 7250)]

    code, output = invoke("mlflow", "sync", sweep.folder.url, "--uri", second)
    assert (code, "8 rows of training and all evaluations are in" in output) == (0, True)
    assert content(sweep, second) == as_it_came
    assert answer("mlflow", "sync", sweep.folder.url, "--json")["rows"] == 8
    assert content(sweep, second) == as_it_came, "a second time doubles nothing"
    run_elsewhere(sweep.lease("sweep"))  # a command that would go on in the other MLflow
    code, output = invoke("mlflow", "sync", sweep.folder.url, "--uri", "htp://127.0.0.1:5000")
    assert (code, "expected a URL of http, https, sqlite" in output, "did you mean 'http'" in output) == (2, True, True)
    code, output = invoke("mlflow", "sync", sweep.folder.url, "--uri", first)
    assert (code, "in a file of this machine" in output, TrackingIds.read(sweep.folder).uri) == (Held.exit_code, True, second)
    assert answer("mlflow", "sync", sweep.folder.url, "--json")["rows"] == 8, "into its own"
    (tmp_path / "second.db").unlink()
    code, output = invoke("mlflow", "sync", sweep.folder.url)
    assert (code, "it is gone, and its jobs would open a part: wait" in output) == (Held.exit_code, True)
    assert not (tmp_path / "second.db").exists()


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """Names of the calls of MLflow's clients, as they come."""
    made = list[str]()
    with before_each_call(made.append):
        yield made


def test_an_attempt_sends_what_mlflow_lacks_and_nothing_again(sweep: Sweep, plan: Plan, tmp_path: Path, calls: list[str]) -> None:
    create_runs(sweep, f"sqlite:///{tmp_path}/mlflow.db", plan.parameters())
    main = sweep.evaluation(Sampled("dis", 160))
    for images in range(320, 1601, 160):
        folder = sweep.evaluation(Sampled("dis", images))
        Metrics.read(main).write(folder)
        folder.write(GRID, b"a picture")
    del calls[:]
    copy_earlier(sweep)
    assert calls.count("log_artifact") == calls.count("log_batch") == 10 + 3, "dis, and each of the others once"
    del calls[:]
    copy_earlier(sweep)
    assert calls == ["get_metric_history"] * 4, "one for each model and sampling setting"
    late = sweep.evaluation(Sampled("dit", 320))
    Metrics.read(main).write(late)
    late.write(GRID, b"a picture")
    copy_earlier(sweep)
    assert calls.count("log_artifact") == calls.count("log_batch") == 1


def test_an_evaluation_without_a_grid_or_with_damaged_metrics_ends_no_copy(
    sweep: Sweep, plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    create_runs(sweep, uri, plan.parameters())
    sweep.evaluation(Sampled("dis", 160)).delete(GRID)
    sweep.evaluation(Sampled("dis", 160, "wide")).write(Metrics.NAME, b"null")
    copy_earlier(sweep)
    metrics, _, files, _ = content(sweep, uri)["dis"]
    assert metrics["fd_digits_80"] == [(160, 9.0, 7250)]
    assert "fd_digits_80/wide" not in metrics
    assert files == ["samples/wide/samples-000000000160.png"]
    assert "samples.png is missing: MLflow gets the numbers only" in caplog.text
    assert "metrics.json: damaged: " in caplog.text
    assert "MLflow does not get this evaluation" in caplog.text


def test_a_sync_says_what_was_not_taken_though_later_requests_were(sweep: Sweep, plan: Plan, tmp_path: Path) -> None:
    uri, refused = f"sqlite:///{tmp_path}/mlflow.db", list[str]()

    def refuse(call: str) -> None:
        if call in refused:
            refused.remove(call)
            raise ConnectionError("503")

    create_runs(sweep, uri, plan.parameters())
    for request in ("log_batch", "log_artifact", "set_terminated"):
        refused.append(request)
        with before_each_call(refuse), pytest.raises(DisScaleError, match="did not take everything: run the same command again"):
            copy_everything(sweep, plan.parameters(), uri)
        assert refused == []
    copy_everything(sweep, plan.parameters(), uri)


def test_files_that_are_refused_keep_back_no_number(
    sweep: Sweep, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    create_runs(sweep, uri, plan.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(RunCopy, "send_file", lambda *_: False)
        assert not copy_evaluation(sweep, Sampled("dis", 160))
    assert content(sweep, uri)["dis"][0]["fd_digits_80"] == [(160, 9.0, 7250)]
    copy_earlier(sweep)
    assert "samples/samples-000000000160.png" in content(sweep, uri)["dis"][2]


def test_an_mlflow_that_is_away_is_not_asked_for_each_file_of_a_report(sweep: Sweep, plan: Plan, tmp_path: Path) -> None:
    """One that hangs takes half a minute each time, and its sweep's machines are held meanwhile."""
    create_runs(sweep, f"sqlite:///{tmp_path}/mlflow.db", plan.parameters())
    (tmp_path / "mlflow.db").unlink()
    with noted() as requests:
        assert not copy_report(sweep, "FINISHED")
    assert not [path for _, path in requests if path.endswith("index.html")]


def test_a_model_that_failed_is_marked(sweep: Sweep, plan: Plan, tmp_path: Path) -> None:
    Ended(why="a worker was lost").write(sweep.run("dit").folder)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    copy_everything(sweep, plan.parameters(), uri)
    assert {name: copied[3] for name, copied in content(sweep, uri).items()}["dit"] == "FAILED"


def test_an_mlflow_that_is_away_is_an_error(sweep: Sweep, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(DisScaleError, match=r"MLflow cannot be reached at http://127\.0\.0\.1:9"):
        copy_everything(sweep, plan.parameters(), "http://127.0.0.1:9")


def test_a_uri_with_credentials_is_neither_stored_nor_shown(sweep: Sweep, plan: Plan) -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as raised:
        copy_everything(sweep, plan.parameters(), "http://me:pa55word@127.0.0.1:9")
    assert "pa55" not in str(raised.value)
    assert not TrackingIds.exists(sweep.folder)


def test_a_sweep_that_was_never_tracked_needs_a_uri(sweep: Sweep) -> None:
    code, output = invoke("mlflow", "sync", sweep.folder.url)
    assert (code, "was never tracked: name an MLflow" in output) == (2, True)
