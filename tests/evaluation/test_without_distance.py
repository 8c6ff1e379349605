"""A sweep of too few images for a distance: samples to look at, and the held-out loss as the curve."""

from pathlib import Path

import pytest

from dis_scale.process.errors import UserError
from dis_scale.recipe import reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import GRID, Sampled, Sweep, state
from tests.conftest import TINY
from tests.support import stages

NONE = (
    "evaluate=none", "evaluate.steps=2", "evaluate.samples=10", "data.held_out_images=50", "precompute.shard_images=50",
    "models={dis: {kind: dis, width: 16, depth: 2, patch: 4}}", "train.publish_images=[160, 320]",
)  # fmt: skip


@pytest.mark.parametrize("labels", [[], ["data.num_classes=none"]], ids=["labelled", "without labels"])
def test_a_sweep_has_samples_and_the_held_out_loss(labels: list[str], tmp_path: Path) -> None:
    sweep = Sweep.below(open_folder(tmp_path / "root"), reading.load(TINY, [*NONE, *labels]))
    stages.complete(sweep, tmp_path)
    assert state.all_evaluated(sweep)
    assert state.floor_settled(sweep)
    for metrics in state.evaluated(sweep, "dis").values():
        assert {name.partition("/")[0] for name in metrics.values} == {"held_out_loss"}
    assert sweep.references.list() == []
    assert sweep.evaluation(Sampled("dis", 320)).exists(GRID)
    page = sweep.report.read("index.html").decode()
    assert "held_out_loss is the loss on 50 images that training never sees: lower is better" in page


FLOW = "diffusion={kind: flow}"


@pytest.mark.parametrize(
    ("settings", "sampler"),
    [(["evaluate=none"], "dpm_solver"), ([FLOW, "evaluate=none"], "heun"), (["evaluate=none", FLOW], "heun")],
    ids=["gaussian", "a flow", "a flow, afterwards"],
)
def test_the_short_form_takes_a_sampler_of_the_process(settings: list[str], sampler: str) -> None:
    recipe = reading.load(TINY, [*settings, "data.held_out_images=50", "precompute.shard_images=50"])
    assert (recipe.evaluate.sampler, recipe.evaluate.samples, recipe.evaluate.extractors) == (sampler, 40, ())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.held_out_images=0"], "the curve is of the held-out loss: set data.held_out_images"),
        (["evaluate.sampler=none"], "evaluate.sampler: got 'none'"),
        (["evaluate.metrics=[distance, kid]"], "extractor: none measures no distance: leave out also and metrics"),
        (["evaluate.also=[{kind: inception}]"], "extractor: none measures no distance: leave out also and metrics"),
    ],
)
def test_what_needs_a_distance_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        reading.load(TINY, [*NONE, *settings])
