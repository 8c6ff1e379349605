"""World sizes: the largest of the recipe that has capacity. Ranks: ordered by node and GPU. The copy of rows in MLflow."""

from pathlib import Path

import pytest

from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import TRACKING, Sweep
from dis_scale.tracking.mlflow import RunCopy
from dis_scale.tracking.rows import RowReader, RowWriter
from pipelines import metrics, train
from pipelines.train import Place, largest_fitting, rank_order
from pipelines.waiting import capacity
from tests.conftest import TINY


def test_an_attempt_uses_as_many_workers_as_fit() -> None:
    sizes = reading.load(TINY, ["train.lanes=8", "train.workers=2..6"]).train.world_sizes
    assert sizes == [6, 5, 4, 3, 2]
    bundle = {"CPU": 1, "train": 1.0}
    fitting = [largest_fitting(sizes, capacity(bundle, [{"CPU": cpus, "train": 8}])) for cpus in (9, 5, 3, 1)]
    assert fitting == [6, 5, 3, 0]
    assert capacity(bundle, [{"CPU": 8.0}]) == 0


def test_one_workers_resources_are_on_one_node() -> None:
    bundle = {"CPU": 2, "train": 1.0}
    assert capacity(bundle, [{"CPU": 3, "train": 2}, {"CPU": 1, "train": 1}, {"CPU": 4, "train": 1}]) == 2


def test_ranks_are_in_the_order_of_nodes_and_gpus() -> None:
    places = [
        Place("10.0.0.2", "b", ["0"], 1, ""), Place("10.0.0.1", "c", ["1"], 2, ""), Place("10.0.0.1", "c", ["0"], 9, ""),
        Place("10.0.0.1", "a", ["3"], 4, ""),
    ]  # fmt: skip
    assert rank_order(places) == [3, 2, 1, 0]
    assert [places[::-1][n] for n in rank_order(places[::-1])] == [places[n] for n in rank_order(places)]


@pytest.mark.parametrize(("tracked", "away"), [(False, 0.0), (True, 1.0)])
def test_mlflow_is_away_only_for_a_sweep_that_has_runs_there(
    tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch, tracked: bool, away: float
) -> None:
    sweep, shown = Sweep(open_folder(tmp_path) / "sweeps/s", tiny), dict[str, float]()
    if tracked:
        ids = {"uri": f"sqlite:///{tmp_path}/gone.db", "experiment": "1", "sweep": "s", "models": {"dis": "d"}}
        sweep.folder.write_json(TRACKING, ids)
    rows = RowWriter(sweep.run("dis").log, 1)
    rows.add(16, {"loss": 1.0})
    rows.settle()
    monkeypatch.setattr(metrics, "gauge", shown.__setitem__)
    with train._copying(RunCopy(sweep, "dis"), RowReader(sweep.run("dis").log)):
        pass
    assert shown["mlflow_away"] == away
