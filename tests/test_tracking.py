"""Rows are kept once by the first that logged them; MLflow mirrors them once each and may be away."""

import logging
from pathlib import Path
from typing import Any

import pytest

from dis_scale import tracking
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.tracking import Log, Projection, Row, Rows


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracking.default_uri(open_folder(tmp_path_factory.mktemp("mlflow")))


@pytest.fixture
def sweep(tmp_path: Path, uri: str) -> Folder:
    made = open_folder(tmp_path) / "sweeps/s"
    tracking.begin(made, uri, {"dis": {"gmacs_forward": 1.5, "seed": 0}})
    return made


def history(sweep: Folder, uri: str, name: str) -> list[tuple[int, float]]:
    ids = sweep.read_json(tracking.FILE)
    found = tracking.client(uri).get_metric_history(ids["models"]["dis"], name)
    return sorted((m.step, m.value) for m in found)


def test_rows_of_two_attempts_merge_and_the_first_wins(tmp_path: Path) -> None:
    place = open_folder(tmp_path)
    first, second = Log(place, 1), Log(place, 2)
    first.add(10, {"loss": 1.0})
    first.add(20, {"loss": 0.9})
    first.flush()
    second.add(20, {"loss": 0.8})
    second.add(30, {"loss": 0.7})
    second.flush()
    rows = Rows(place)
    assert [(r.images, r.value) for r in rows.new()] == [(10, 1.0), (20, 0.9), (30, 0.7)]
    assert rows.new() == []


def test_each_row_is_sent_once_whoever_sends_it(sweep: Folder, uri: str) -> None:
    rows = [Row("loss", 0.5, 10, 1.0), Row("loss", 0.4, 20, 2.0)]
    Projection(sweep, "dis").send(rows[:1])
    Projection(sweep, "dis").send(rows)
    assert history(sweep, uri, "loss") == [(10, 0.5), (20, 0.4)]


def test_begin_again_keeps_the_runs_and_adds_new_models(sweep: Folder, uri: str) -> None:
    before = sweep.read_json(tracking.FILE)
    after = tracking.begin(sweep, uri, {"dis": {"gmacs_forward": 1.5, "seed": 0}, "dit": {"seed": 0}})
    assert after["models"]["dis"] == before["models"]["dis"]
    assert (after["sweep"], set(after["models"])) == (before["sweep"], {"dis", "dit"})
    run = tracking.client(uri).get_run(after["models"]["dis"])
    assert run.data.params == {"gmacs_forward": "1.5", "seed": "0"}
    assert run.data.tags["mlflow.parentRunId"] == before["sweep"]


def test_files_are_kept_with_the_run(sweep: Folder, uri: str, tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(b"picture")
    Projection(sweep, "dis").send_file(tmp_path / "grid.png", "samples")
    run = sweep.read_json(tracking.FILE)["models"]["dis"]
    assert [a.path for a in tracking.client(uri).list_artifacts(run, "samples")] == ["samples/grid.png"]


def test_mlflow_away_is_said_once_and_the_rows_wait(
    sweep: Folder, uri: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: str) -> Any:
        raise ConnectionError("no MLflow here")

    projection = Projection(sweep, "dis")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(tracking, "client", away)
        projection.send([Row("loss", 0.5, 10, 1.0)])
        projection.send([Row("loss", 0.4, 20, 2.0)])
    assert [r.message for r in caplog.records] == ["MLflow cannot be reached, rows wait in storage: no MLflow here"]
    projection.send([])
    assert history(sweep, uri, "loss") == [(10, 0.5), (20, 0.4)]
