"""What the sweep does when something around it is missing; its way through the stages is in tests/e2e."""

import io
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from dis_scale import plan as plans
from dis_scale import sweep as sweeps
from dis_scale import tracking
from dis_scale.errors import Held, UserError
from dis_scale.progress import Board
from dis_scale.recipe import LatentShape, Recipe, reading
from dis_scale.storage import lease
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from pipelines.jobs import Cluster
from tests.conftest import TINY


def begin(recipe: Recipe, root: Path) -> Sweep:
    console = Console(file=io.StringIO(), width=200, record=True)
    return Sweep(recipe, open_folder(root) / "sweeps/tiny", plans.plan(recipe, LatentShape(4, 8)), Board(console))


def cluster(name: str) -> Cluster:
    return Cluster(None, {}, name, False, 1, 0, name)  # type: ignore[arg-type]


def test_a_second_sweep_joins_on_the_same_ray_and_is_refused_on_another(tiny: Recipe, tmp_path: Path) -> None:
    sweep, other = begin(tiny, tmp_path), psutil.Process().parent()
    assert other
    holder = lease._me() | {"pid": other.pid, "started": other.create_time(), "cluster": "here"}
    sweep.folder.create("leases/sweep/0001", json.dumps(holder).encode())
    with sweeps._one_at_a_time(sweep, cluster("here")):
        assert f"joined   process {other.pid}, which runs this sweep" in sweep.board.console.export_text()
    with (
        pytest.raises(Held, match=f"leases/sweep: held by process {other.pid} on .*: one writer at a time"),
        sweeps._one_at_a_time(sweep, cluster("elsewhere")),
    ):
        pass
    assert sweep.folder.list("leases/sweep") == ["0001"]


def test_mlflow_away_is_said_and_stops_nothing(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise ConnectionError("connection refused")

    monkeypatch.setattr(tracking, "begin", away)
    sweep = begin(tiny, tmp_path)
    sweeps._begin_tracking(sweep, "http://nowhere:1")
    said = sweep.board.console.export_text()
    assert "MLflow cannot be reached at http://nowhere:1, results are in storage alone: connection refused" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.source={kind: folder, url: /nowhere}"], "no images in class folders below /nowhere"),
        (
            ["evaluate.extractor={kind: inception, weights: /nowhere.pth}", "evaluate.samples=2100"],
            "cannot read /nowhere.pth; get https://",
        ),
    ],
)
def test_what_is_missing_is_found_before_the_sweep_has_an_identity(
    tmp_path: Path, settings: list[str], said: str
) -> None:
    recipe = reading.load(TINY, [*settings, f"storage.root={tmp_path}"])
    with pytest.raises(UserError, match=said):
        sweeps.run(recipe, Console(file=io.StringIO()))
    assert not (tmp_path / "sweeps").exists()


def test_a_stored_recipe_of_another_identity_is_refused_with_the_difference(tiny: Recipe, tmp_path: Path) -> None:
    place = open_folder(tmp_path) / "sweeps/tiny"
    place.write("recipe.yaml", reading.dump(tiny).encode())
    other = reading.load(TINY, ["seed=5", f"storage.root={tmp_path}"])
    with pytest.raises(UserError, match=r"was begun with another recipe; .*\n  seed: stored 0, given 5"):
        sweeps.run(other, Console(file=io.StringIO()))


def test_an_emptied_mlflow_gets_its_runs_again(tmp_path: Path) -> None:
    place = open_folder(tmp_path) / "sweeps/s"
    first = tracking.begin(place, f"sqlite:///{tmp_path}/one.db", {"dis": {"seed": 0}})
    place.write_json(tracking.FILE, first | {"uri": f"sqlite:///{tmp_path}/two.db"})
    tracking.begin(open_folder(tmp_path) / "sweeps/t", f"sqlite:///{tmp_path}/two.db", {})
    again = tracking.begin(place, f"sqlite:///{tmp_path}/two.db", {"dis": {"seed": 0}})
    assert again["sweep"] != first["sweep"]
    run = tracking.client(again["uri"]).get_run(again["models"]["dis"])
    assert run.data.params == {"seed": "0"}
