"""MLflow's pages in a real Chromium after a small sweep: runs, curves, samples, the scatter of Gflops and distance, the report."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from dis_scale.models.cost import price_model
from dis_scale.recipe import LatentShape, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import GRID, Sampled, Sweep, images_name, state
from tests.cli.test_cli import invoke
from tests.conftest import TINY
from tests.support import mlflow_pages, stages
from tests.support import mlflow_servers as servers
from tests.support.mlflow_pages import Pages

pytestmark = pytest.mark.faults
IMAGES = 320


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A finished sweep of two models, made without Ray."""
    if missing := mlflow_pages.missing():
        pytest.skip(f"needs {' and '.join(missing)}: apt-get install --no-install-recommends chromium chromium-driver")
    root = tmp_path_factory.mktemp("sweep")
    made = Sweep.below(open_folder(root / "store"), reading.load(TINY, ["evaluate.variants={}"]))
    stages.complete(made, root)
    return made


@pytest.fixture(params=["sqlite", "server"])
def pages(request: pytest.FixtureRequest, sweep: Sweep, tmp_path: Path) -> Iterator[Pages]:
    """The sweep's pages on an SQLite file, and on the server of cluster/mlflow.yaml with PostgreSQL and the bucket."""
    if request.param == "sqlite":
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        fill(sweep, uri)
        with servers.of_sqlite(uri, tmp_path) as url, mlflow_pages.browser() as driver:
            yield Pages(driver, url, sweep.recipe.name, tmp_path).enter()
        return
    if servers.PROGRAMS is None:
        pytest.skip("PostgreSQL is not installed")
    ceph, bucket = request.getfixturevalue("ceph"), request.getfixturevalue("bucket")
    for name, word in servers.LOGIN.items():
        request.getfixturevalue("monkeypatch").setenv(name, word)
    login = (servers.LOGIN["MLFLOW_TRACKING_USERNAME"], servers.LOGIN["MLFLOW_TRACKING_PASSWORD"])
    with servers.postgresql() as database, servers.deployed(database, ceph, bucket, tmp_path) as url:
        fill(sweep, url)
        with mlflow_pages.browser(login) as driver:
            yield Pages(driver, url, sweep.recipe.name, tmp_path).enter()


def fill(sweep: Sweep, uri: str) -> None:
    code, output = invoke("mlflow", "sync", str(sweep), "--uri", uri)
    assert code == 0, output


def test_a_person_sees_the_sweep(pages: Pages, sweep: Sweep) -> None:
    metric, models = sweep.recipe.evaluate.metric, list(sweep.recipe.models)
    assert pages.open_runs() == [sweep.recipe.name, *models]

    charts = pages.charts(["loss", metric])
    assert {title: chart["lines"] for title, chart in charts.items()} == {metric: 2, "loss": 2}, "one for each model"
    assert charts[metric]["points"] == 2 * 3, "one for each count of images"

    plot = pages.scatter(models, "gmacs_forward", metric)
    assert plot["points"] == 2
    costs = [price_model(sweep.recipe.models[model], LatentShape(4, 8), 10).gmacs_forward for model in models]
    distances = [state.evaluated(sweep, model)[IMAGES].values[metric] for model in models]
    drawn = sorted(zip(map(float, plot["x"]), map(float, plot["y"]), strict=True))
    assert drawn == [pytest.approx(point, abs=1e-6) for point in sorted(zip(costs, distances, strict=True))]

    pages.open_artifact("dit", "samples", f"samples-{images_name(IMAGES)}.png")
    assert pages.picture_size() == Image.open(io.BytesIO(sweep.evaluation(Sampled("dit", IMAGES)).read(GRID))).size

    pages.open_artifact(sweep.recipe.name, "report", "index.html")
    text, pictures = pages.report()
    assert all(words in text for words in (f"Gflops against {metric}", "Every point", "Samples at the last count"))
    assert len(pictures) >= 5
    assert min(width for width, _ in pictures) > 0
