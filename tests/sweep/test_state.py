"""Evaluations that are left, their order, and those that must be measured again."""

import errno
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from dis_scale.process.errors import StorageError, UserError
from dis_scale.recipe import Recipe, reading
from dis_scale.storage import manifest
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import PointName, Run, Sampled, Sweep, state
from dis_scale.sweep.documents import Ended, FailedNodes, LatentsPointer, Metrics, Skipped
from dis_scale.sweep.extractors import part_count, part_positions
from dis_scale.training import resume
from dis_scale.training.resume import Keep
from dis_scale.weights.published import load_published
from tests.conftest import TINY
from tests.support import store_requests
from tests.support.documents import put_metrics, put_published, put_resume_point

NO_METRICS = b'{"format": 1, "values": {}, "metrics": null}'


@pytest.fixture
def sweep(tmp_path: Path, tiny: Recipe) -> Sweep:
    made = Sweep.below(open_folder(tmp_path), tiny)
    for model, images in [("dis", 0), ("dis", 160), ("dit", 0), ("dit", 7)]:
        put_published(made.run(model).published_at(images), b"", images=images)
    return made


def given(sweep: Sweep, *settings: str) -> Sweep:
    return replace(sweep, recipe=reading.load(TINY, list(settings)))


def test_the_main_settings_come_before_the_variants_and_counts_in_order(sweep: Sweep) -> None:
    assert state.Backlog(sweep).left() == [
        Sampled("dis", 0),
        Sampled("dit", 0),
        Sampled("dis", 160),
        Sampled("dis", 0, "wide"),
        Sampled("dit", 0, "wide"),
        Sampled("dis", 160, "wide"),
    ]


def test_the_newest_may_come_first(sweep: Sweep) -> None:
    newest = state.Backlog(given(sweep, "evaluate.order=newest_first")).left()
    assert newest[:3] == [Sampled("dis", 160), Sampled("dis", 0), Sampled("dit", 0)]


def test_what_a_model_guides_waits_for_that_model(sweep: Sweep) -> None:
    """Or for the end of training: then its evaluation says what is missing."""
    waiting = given(sweep, "evaluate.variants={wide: {guidance: {by: dit, images: 320, scale: 2}}}")
    backlog = state.Backlog(waiting)
    assert {each.variant for each in backlog.left()} == {""}
    put_published(sweep.run("dit").published_at(320), b"", images=320)
    assert {each.variant for each in backlog.left()} == {"", "wide"}
    ended = given(sweep, "evaluate.variants={wide: {guidance: {by: dis, images: 320, scale: 2}}}")
    assert {each.variant for each in state.Backlog(ended).left()} == {""}
    Ended(why="its loss was not finite").write(sweep.run("dis").folder)
    assert {each.variant for each in state.Backlog(ended).left()} == {"", "wide"}
    guide = Sampled("dis-s", 24000)
    assert [state.parse_ablation_name(state.ablation_name(*each)) for each in (("guidance", guide), ("ema_width", None))] == [
        ("guidance", guide), ("ema_width", None),
    ]  # fmt: skip


def test_a_metric_added_later_is_measured_again(sweep: Sweep) -> None:
    done = Sampled("dis", 160)
    put_metrics(sweep.evaluation(done))
    assert state.outdated(sweep) == {}
    more = given(sweep, "evaluate.metrics=[distance, precision_recall]")
    assert state.outdated(more) == {done: "the recipe has added precision_recall"}
    assert done not in state.Backlog(sweep).left(), "the old metrics stay until there are new ones"


@pytest.mark.parametrize("damaged", [b"", b'{"values": {', b"[]", b'{"values": {}}', NO_METRICS, b"\xff\xfe"])
def test_damaged_metrics_are_measured_again_and_hide_no_others(sweep: Sweep, damaged: bytes) -> None:
    for images in (0, 160):
        put_metrics(sweep.evaluation(Sampled("dis", images)), {"fd": 1.0})
    sweep.evaluation(Sampled("dis", 160)).write(Metrics.NAME, damaged)
    assert state.outdated(sweep) == {Sampled("dis", 160): "its metrics.json is damaged"}
    assert list(state.evaluated(sweep, "dis")) == [0]


def test_metrics_that_may_not_be_read_are_not_measured_again(sweep: Sweep) -> None:
    folder = sweep.evaluation(Sampled("dis", 160))
    put_metrics(folder)
    with store_requests.failing(PermissionError(errno.EACCES, "Access Denied"), "read"):
        for read in (Metrics.find, Metrics.find_intact):
            with pytest.raises(StorageError, match=r"metrics.json.*Access Denied"):
                read(folder)


@pytest.mark.parametrize("damage", [b"[]", b"null", b'"node"', b'{"node": null}', b'{"node": "ECC"}'])
def test_a_damaged_list_of_failed_nodes_is_named_and_excludes_none(
    sweep: Sweep, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    sweep.failed_nodes("train", "dis").write(FailedNodes.NAME, damage)
    state.record_node_failure(sweep.failed_nodes("train", "dit"), "node", "ECC")
    assert state.node_failures(sweep) == {"node": 1}
    assert "failed_nodes.json: damaged: " in caplog.text
    state.record_node_failure(sweep.failed_nodes("train", "dis"), "node", "ECC")
    assert state.node_failures(sweep) == {"node": 2}


def test_of_a_node_that_fails_for_weeks_the_last_failures_are_kept(sweep: Sweep) -> None:
    folder = sweep.failed_nodes("evaluate")
    for number in range(50):
        state.record_node_failure(folder, "node", f"ECC {number}")
    assert (kept := FailedNodes.find_intact(folder))
    assert kept.failures["node"] == tuple(f"ECC {number}" for number in range(30, 50))


def test_a_sweep_is_evaluated_when_each_sampling_is(sweep: Sweep) -> None:
    for variant in ("", "wide"):
        assert not state.all_evaluated(sweep)
        for model in sweep.recipe.models:
            for images in sweep.recipe.train.publish_images:
                put_metrics(sweep.evaluation(Sampled(model, images, variant)))
    assert state.all_evaluated(sweep)


def test_skipped_evaluations_have_their_reason(sweep: Sweep) -> None:
    Skipped(why="a flipped byte").write(sweep.evaluation(Sampled("dit", 0, "wide")))
    assert state.skipped(sweep) == {Sampled("dit", 0, "wide"): "a flipped byte"}


def test_a_damaged_manifest_fails_when_it_is_loaded_not_in_the_list(sweep: Sweep) -> None:
    sweep.run("dis").published_at(160).write(manifest.NAME, b'{"form')
    assert Sampled("dis", 160) in state.Backlog(sweep).left()
    with pytest.raises(StorageError, match=r"manifest.json: damaged: "):
        load_published(sweep.run("dis"), 160)


def test_a_stray_folder_among_resume_points_is_no_resume_point(tmp_path: Path) -> None:
    run = Run(open_folder(tmp_path))
    put_resume_point(run.resume_point(PointName(160, 2)), images=160)
    run.resume.write("notes/readme.txt", b"a person was here")
    assert state.point_names(run) == [PointName(160, 2)]
    assert state.resumable_images(run) == 160
    keep = Keep(1, 0, 10**9, frozenset())
    resume.Saver(run, attempt=2, rank=0, world=1, require_held=lambda: None, keep=keep, log=print)._prune(160)
    assert run.resume.list() == ["000000000160-0002", "notes"]


def test_a_model_may_have_the_name_of_a_stage(tmp_path: Path) -> None:
    model = "models={evaluate: {kind: dit, width: 16, depth: 1, heads: 2, patch: 4}}"
    sweep = Sweep.below(open_folder(tmp_path), reading.load(TINY, [model]))
    assert state.ended(sweep, "evaluate") is None


def test_an_unknown_model_is_refused_with_the_nearest_name(sweep: Sweep) -> None:
    with pytest.raises(UserError, match=r"sweeps/tiny has no model 'dip' \(did you mean 'dit'\?\): it has dis, dit"):
        sweep.run("dip")


def test_opening_a_sweep_reads_its_recipe_and_nothing_more(sweep: Sweep) -> None:
    sweep.save_recipe()
    with store_requests.noted() as requests:
        assert Sweep.open(sweep.folder.url) == sweep
    assert {path for _, path in requests} == {f"{sweep}/recipe.yaml"}


@pytest.mark.parametrize(
    ("images", "parts"), [(1, 1), (20_000, 1), (20_001, 2), (1_281_167, 65), (5_120_001, 256), (100_000_000, 256)]
)
def test_parts_of_the_reference_hold_each_image_once_and_are_few_for_any_set(images: int, parts: int) -> None:
    assert part_count(images) == parts
    positions = [part_positions(number, images) for number in range(parts)]
    assert (positions[0].start, positions[-1].stop) == (0, images)
    assert all(before.stop == after.start for before, after in pairwise(positions))


@pytest.mark.parametrize("damage", [b"{", b"null", b"{}"])
def test_damaged_notes_of_an_evaluation_and_a_run_are_named_and_stop_nothing(
    sweep: Sweep, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    sampled, run = Sampled("dit", 0), sweep.run("dit").folder
    sweep.evaluation(sampled).write(Skipped.NAME, damage)
    assert state.why_skipped(sweep, [sampled]) == {}
    assert f"{Skipped.NAME}: damaged: " in caplog.text
    run.write(Ended.NAME, damage)
    assert state.ended(sweep, "dit") == f"{Ended.NAME} is damaged"
    sweep.folder.write(LatentsPointer.NAME, damage)
    assert state.find_latents(sweep.folder) is None
    assert state.latents_vae(sweep) is None
