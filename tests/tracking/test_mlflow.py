"""Each row is kept once, from the first attempt that logged it; MLflow receives it once and may be away."""

import logging
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, UNAUTHENTICATED

from dis_scale.recipe import Recipe
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from dis_scale.sweep.documents import TrackingIds
from dis_scale.tracking import mlflow
from dis_scale.tracking.mlflow import RunCopy, create_runs
from dis_scale.tracking.rows import Row, RowReader, RowWriter
from tests.support.mlflow_calls import before_each_call


def response_of(status: int) -> requests.Response:
    response = requests.Response()
    response.status_code = status
    return response


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return mlflow.default_uri(open_folder(tmp_path_factory.mktemp("mlflow")))


@pytest.fixture
def sweep(tmp_path: Path, tiny: Recipe, uri: str) -> Sweep:
    made = Sweep(open_folder(tmp_path) / "sweeps/s", tiny)
    create_runs(made, uri, {"dis": {"gmacs_forward": 1.5, "seed": 0}})
    return made


def history(sweep: Sweep, uri: str, name: str) -> list[tuple[int, float]]:
    metrics = mlflow.open_client(uri).get_metric_history(TrackingIds.read(sweep.folder).models["dis"], name)
    return sorted((m.step, m.value) for m in metrics)


def test_rows_of_two_attempts_merge_and_the_first_wins(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    first, second = RowWriter(folder, 1), RowWriter(folder, 2)
    first.add(10, {"loss": 1.0})
    first.add(20, {"loss": 0.9})
    first.settle()
    second.add(20, {"loss": 0.8})
    second.add(30, {"loss": 0.7})
    second.settle()
    rows = RowReader(folder)
    assert [(r.images, r.value) for r in rows.new()] == [(10, 1.0), (20, 0.9), (30, 0.7)]
    assert rows.new() == []


def test_each_row_is_sent_once_whoever_sends_it(sweep: Sweep, uri: str) -> None:
    rows = [Row("loss", 0.5, 10, 1.0), Row("loss", 0.4, 20, 2.0)]
    RunCopy(sweep, "dis").send(rows[:1])
    RunCopy(sweep, "dis").send(rows)
    assert history(sweep, uri, "loss") == [(10, 0.5), (20, 0.4)]


def test_runs_are_created_once_and_new_models_are_added(sweep: Sweep, uri: str) -> None:
    before = TrackingIds.read(sweep.folder)
    after = create_runs(sweep, uri, {"dis": {"gmacs_forward": 1.5, "seed": 0}, "dit": {"seed": 0}})
    assert after.models["dis"] == before.models["dis"]
    assert (after.sweep, set(after.models)) == (before.sweep, {"dis", "dit"})
    run = mlflow.open_client(uri).get_run(after.models["dis"])
    assert run.data.params == {"gmacs_forward": "1.5", "seed": "0"}
    assert run.data.tags["mlflow.parentRunId"] == before.sweep


def test_what_was_deleted_in_mlflow_is_made_again_and_what_was_renamed_is_found(sweep: Sweep, uri: str) -> None:
    models: dict[str, dict[str, object]] = {"dis": {}, "dit": {}}
    first, client = create_runs(sweep, uri, models), mlflow.open_client(uri)
    client.delete_run(first.models["dit"])
    client.update_run(first.models["dis"], name="the good one")
    second = create_runs(sweep, uri, models)
    assert (second.sweep, second.models["dis"]) == (first.sweep, first.models["dis"])
    assert second.models["dit"] != first.models["dit"]
    client.rename_experiment(first.experiment, "diffusion")
    assert create_runs(sweep, uri, models) == second
    client.rename_experiment(first.experiment, f"dis-scale {sweep.folder.name}")
    client.delete_experiment(first.experiment)
    third = create_runs(sweep, uri, models)
    assert RunCopy(sweep, "dis").send([Row("loss", 0.5, 10, 1.0)])
    assert history(sweep, uri, "loss") == [(10, 0.5)]
    assert third.experiment == first.experiment


def test_an_mlflow_that_was_left_has_its_runs_again(tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `mlflow sync` to a laptop's file, which is named from its folder."""
    monkeypatch.chdir(tmp_path)
    sweep = Sweep(open_folder(tmp_path) / "sweeps/s", tiny)
    first = create_runs(sweep, "sqlite:///one.db", {"dis": {}})
    assert first.uri == f"sqlite:///{tmp_path}/one.db"
    assert create_runs(sweep, "sqlite:///two.db", {"dis": {}}).models != first.models
    assert create_runs(sweep, "sqlite:///one.db", {"dis": {}}) == first
    sweep.folder.delete()
    later = create_runs(sweep, "sqlite:///one.db", {"dis": {"learning_rate": 1}})
    assert later.models["dis"] != first.models["dis"], "another sweep in the same folder, whose rows are others"


def test_an_experiment_whose_creation_was_not_answered_in_time_is_found(
    sweep: Sweep, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client then asks again, and learns that the name is taken."""
    find = MlflowClient.get_experiment_by_name
    answers: list[Any] = [lambda *_: None, find]
    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", lambda self, name: answers.pop(0)(self, name))
    experiment = mlflow._experiment(uri, sweep.folder.name)
    assert mlflow.open_client(uri).get_run(TrackingIds.read(sweep.folder).sweep).info.experiment_id == experiment
    assert answers == []


def test_models_are_listed_in_the_recipes_order_with_colours_of_their_own(tmp_path: Path, tiny: Recipe) -> None:
    """MLflow's page lists the newest run first."""
    uri, models = f"sqlite:///{tmp_path}/mlflow.db", ["xs", "s", "m", "dit"]
    ids = create_runs(Sweep(open_folder(tmp_path) / "sweeps/s", tiny), uri, {model: {"seed": 0} for model in models})
    runs = mlflow.open_client(uri).search_runs([ids.experiment], order_by=["attributes.start_time DESC"])
    assert [run.info.run_name for run in runs] == [*models, "s"]
    assert len({run.data.tags["mlflow.runColor"] for run in runs[:-1]}) == len(models)


def test_an_emptied_mlflow_gets_its_runs_again(tmp_path: Path, tiny: Recipe) -> None:
    sweep = Sweep(open_folder(tmp_path) / "sweeps/s", tiny)
    first = create_runs(sweep, f"sqlite:///{tmp_path}/one.db", {"dis": {"seed": 0}})
    first.changed(uri=f"sqlite:///{tmp_path}/two.db").write(sweep.folder)
    create_runs(Sweep(open_folder(tmp_path) / "sweeps/t", tiny), f"sqlite:///{tmp_path}/two.db", {})
    again = create_runs(sweep, f"sqlite:///{tmp_path}/two.db", {"dis": {"seed": 0}})
    assert again.sweep != first.sweep
    run = mlflow.open_client(again.uri).get_run(again.models["dis"])
    assert run.data.params == {"seed": "0"}


def test_a_database_that_is_gone_is_not_made_by_a_copy_but_by_the_next_sync(
    tmp_path: Path, tiny: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    """Jobs that would make it at the same time would damage it."""
    sweep, database = Sweep(open_folder(tmp_path) / "sweeps/s", tiny), tmp_path / "lost.db"
    uri = f"sqlite:///{database}"
    TrackingIds(uri=uri, experiment="1", sweep="old", models={"dis": "older"}).write(sweep.folder)
    copy = RunCopy(sweep, "dis")
    copy.send([Row("loss", 0.5, 10, 1.0)])
    assert copy.away
    assert not database.exists()
    assert "lost.db is gone: dis-scale mlflow sync makes it again" in caplog.text
    assert create_runs(sweep, uri, {"dis": {}}).sweep != "old"
    copy.send([])
    assert history(sweep, uri, "loss") == [(10, 0.5)]


@pytest.mark.parametrize("opened", [True, False])
def test_a_database_that_is_deleted_while_a_copy_opens_it_is_not_made_again(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    """Its path has characters that a URI escapes."""
    sweep, database = Sweep(open_folder(tmp_path) / "sweeps/s", tiny), tmp_path / "a b%c" / "mlflow.db"
    uri, copy = f"sqlite:///{database}", RunCopy(sweep, "dis")
    if opened:
        create_runs(sweep, uri, {"dis": {}})
        copy.send([Row("loss", 0.5, 10, 1.0)])
        assert history(sweep, uri, "loss") == [(10, 0.5)]
        database.unlink()
    else:
        TrackingIds(uri=uri, experiment="1", sweep="s", models={"dis": "d"}).write(sweep.folder)
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda _: True)
        copy.send([Row("loss", 0.4, 20, 2.0)])
    assert copy.away
    assert not database.exists()


def test_files_are_stored_with_the_run(sweep: Sweep, uri: str, tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(b"picture")
    RunCopy(sweep, "dis").send_file(tmp_path / "grid.png", "samples")
    run = TrackingIds.read(sweep.folder).models["dis"]
    assert [a.path for a in mlflow.open_client(uri).list_artifacts(run, "samples")] == ["samples/grid.png"]


def test_a_sweep_that_began_without_mlflow_says_so_once(tmp_path: Path, tiny: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    """Its command has said so; there is a copy for each evaluation and each training."""
    sweep = Sweep(open_folder(tmp_path) / "sweeps/s", tiny)
    with caplog.at_level(logging.WARNING):
        copies = [RunCopy(sweep, "dis") for _ in range(3)]
        assert [copy.send([Row("loss", 0.5, 10, 1.0)]) for copy in copies] == [False] * 3
    assert all(copy.away for copy in copies)
    assert caplog.records == []
    assert [copy._waiting for copy in copies] == [[]] * 3, "`mlflow sync` takes them from storage; rows of weeks are a gigabyte"


def test_mlflow_away_is_logged_once_and_the_rows_wait(sweep: Sweep, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    def away(_: str) -> None:
        raise ConnectionError("no MLflow here")

    copy = RunCopy(sweep, "dis")
    with before_each_call(away), caplog.at_level(logging.WARNING):
        copy.send([Row("loss", 0.5, 10, 1.0)])
        copy.send([Row("loss", 0.4, 20, 2.0)])
    assert [r.message for r in caplog.records] == ["MLflow cannot be reached, rows wait in storage: no MLflow here"]
    copy.send([])
    assert history(sweep, uri, "loss") == [(10, 0.5), (20, 0.4)]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MlflowException("no", error_code=PERMISSION_DENIED), "refuses this user"),
        (MlflowException("no", error_code=UNAUTHENTICATED), "refuses this user"),
        (requests.HTTPError("403", response=response_of(403)), "refuses this user"),  # as of a file
        (requests.HTTPError("503", response=response_of(503)), "cannot be reached"),
        (MlflowException("away"), "cannot be reached"),
        (ConnectionError("away"), "cannot be reached"),
    ],
)
def test_an_mlflow_that_refuses_a_user_is_not_called_away(error: Exception, words: str) -> None:
    assert mlflow.fault(error) == words


def test_damaged_ids_are_made_again(tiny: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sweep = Sweep.below(open_folder(tmp_path), tiny)
    sweep.folder.write(TrackingIds.NAME, b"{")
    ids = mlflow.create_runs(sweep, f"sqlite:///{tmp_path}/mlflow.db", {"dit": {"seed": 0}})
    assert TrackingIds.read(sweep.folder) == ids
    assert "tracking.json: damaged: JSON" in caplog.text
