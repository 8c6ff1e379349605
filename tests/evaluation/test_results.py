"""What is left to evaluate, in which order, and what must be measured again."""

from pathlib import Path

import pytest

from dis_scale.errors import StorageError
from dis_scale.evaluation import results
from dis_scale.evaluation.results import Drawn
from dis_scale.recipe import Recipe, reading
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.training import checkpoint
from tests.conftest import TINY


@pytest.fixture
def sweep(tmp_path: Path) -> Folder:
    made = open_folder(tmp_path) / "sweeps/tiny"
    for model, images in [("dis", 0), ("dis", 160), ("dit", 0), ("dit", 7)]:
        manifest.put(made / f"runs/{model}/published/{images:012d}", {"weights.safetensors": b""}, images=images)
    return made


def test_the_main_way_comes_before_the_variants_and_counts_in_order(sweep: Folder, tiny: Recipe) -> None:
    assert results.to_do(sweep, tiny) == [
        Drawn("dis", 0),
        Drawn("dit", 0),
        Drawn("dis", 160),
        Drawn("dis", 0, "wide"),
        Drawn("dit", 0, "wide"),
        Drawn("dis", 160, "wide"),
    ]
    newest = reading.load(TINY, ["evaluate.order=newest_first"])
    assert results.to_do(sweep, newest)[:3] == [Drawn("dis", 160), Drawn("dis", 0), Drawn("dit", 0)]


def test_a_metric_asked_for_since_is_measured_again(sweep: Folder, tiny: Recipe) -> None:
    done = Drawn("dis", 160)
    results.folder(sweep, done).write_json(results.METRICS, {"metrics": ["distance"], "values": {}})
    assert results.outdated(sweep, tiny) == []
    assert results.outdated(sweep, reading.load(TINY, ["evaluate.metrics=[distance, precision_recall]"])) == [done]
    assert done not in results.to_do(sweep, tiny), "the old figures stay until there are new ones"


def test_a_sweep_is_finished_when_each_way_is_drawn(sweep: Folder, tiny: Recipe) -> None:
    for model in tiny.models:
        for images in tiny.train.publish_images:
            results.folder(sweep, Drawn(model, images)).write_json(results.METRICS, {})
    assert not results.finished(sweep, tiny)
    for model in tiny.models:
        for images in tiny.train.publish_images:
            results.folder(sweep, Drawn(model, images, "wide")).write_json(results.METRICS, {})
    assert results.finished(sweep, tiny)


def test_what_had_to_be_skipped_is_known(sweep: Folder, tiny: Recipe) -> None:
    results.folder(sweep, Drawn("dit", 0, "wide")).write_json(results.SKIPPED, {"why": "a flipped byte"})
    assert results.skipped(sweep, tiny) == {Drawn("dit", 0, "wide"): "a flipped byte"}


def test_a_damaged_manifest_is_found_when_it_is_drawn_not_by_the_list(sweep: Folder, tiny: Recipe) -> None:
    (sweep / "runs/dis/published/000000000160").write(manifest.NAME, b'{"form')
    assert Drawn("dis", 160) in results.to_do(sweep, tiny)
    with pytest.raises(StorageError, match="damaged: not JSON"):
        checkpoint.load_published(sweep / "runs/dis", 160)
