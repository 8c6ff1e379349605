"""A run that was stopped and resumed equals the undisturbed one to the bit, for each ZeRO stage and precision."""

import errno
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from dis_scale.process.errors import Held, StorageAway, StorageError, UserError
from dis_scale.recipe import Recipe, Train, reading
from dis_scale.storage import manifest
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import PointName, Run, state
from dis_scale.sweep.documents import WEIGHTS_FILE, LatentsManifest, PublishedManifest, ResumePointManifest, RunState
from dis_scale.tracking.rows import RowReader
from dis_scale.training import loop, resume
from dis_scale.training.attempt import Attempt, Start, open_training
from dis_scale.training.resume import Keep
from dis_scale.training.schedule import learning_rate
from dis_scale.weights.published import load_average, load_published
from tests.conftest import TINY
from tests.support import ranks, store_requests
from tests.support.documents import put_published, put_resume_point
from tests.support.stages import ONE_MODEL

LAST = 320
LAST_ONE = Keep(1, 0, LAST, frozenset())
BOTH = ("calm", "stopped")
DIT = f"models={ONE_MODEL}"


def weights(root: Path, model: str = "dis", images: int = LAST) -> dict[str, torch.Tensor]:
    return load_published(run_at(root, model), images)


def run_at(root: Path, model: str) -> Run:
    """Return the run that `ranks.run` trains below `root`."""
    return Run(open_folder(root) / "sweep/runs" / model)


def losses(root: Path, model: str = "dis") -> list[tuple[int, float]]:
    return [(row.images, row.value) for row in RowReader(run_at(root, model).log).new() if row.name == "loss"]


def assert_bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def verifies_what_any_rank_runs(root: Path, recipe: Recipe) -> None:
    """On one of both ranks: it has two lanes of three, or one."""
    with mock.patch("dis_scale.models.verify_kernels") as verify:
        open_training(ranks.attempt_on_a_rank(root, recipe, "dit", 1), None)
    (of_kernels,) = verify.call_args_list
    lane = recipe.train.lane_images
    assert of_kernels.args[2] == {lane, 2 * lane}


def test_all_ranks_check_the_same_kernels_also_with_unequal_shares(tmp_path: Path) -> None:
    """Otherwise a wrong kernel of the larger share only would look like devices that fail where others do not."""
    recipe = reading.load(
        TINY, ["train.lanes=3", "train.workers=2", "train.batch_images=24", "train.publish_images=[48]", "train.micro_images=16"]
    )
    ranks.make_latents(open_folder(tmp_path) / "latents", recipe)
    ranks.on_ranks(2, functools.partial(verifies_what_any_rank_runs, tmp_path, recipe))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["train.zero_stage=1"], marks=pytest.mark.faults),  # tests/faults/test_training.py has it in `make test`
        pytest.param(["train.zero_stage=2", "train.checkpointing=block", "train.power_ema=[0.05, 0.1]"], marks=pytest.mark.faults),
        ["train.zero_stage=3", "train.precision=bf16"],
    ],
    ids=["stage 1, fp32", "stage 2, checkpointing, power-function averages", "stage 3, bf16"],
)
def test_a_stopped_run_ends_as_the_undisturbed_one(tmp_path: Path, settings: list[str]) -> None:
    recipe = reading.load(TINY, settings)
    ranks.run(recipe, "dis", tmp_path / "calm", attempt=1)
    ranks.run(recipe, "dis", tmp_path / "stopped", attempt=1, stop_at=112)
    run = run_at(tmp_path / "stopped", "dis")
    assert state.published_counts(run) == [0]
    assert max(point.images_seen for point in state.point_names(run)) < 160
    ranks.run(recipe, "dis", tmp_path / "stopped", attempt=2)
    assert state.published_counts(run) == [0, 160, 320]
    assert_bit_equal(weights(tmp_path / "calm"), weights(tmp_path / "stopped"))
    if recipe.train.power_ema:
        rebuilt = [load_average(run_at(tmp_path / at, "dis"), LAST, recipe.train, 0.07) for at in BOTH]
        assert_bit_equal(*rebuilt)
        assert any(not torch.equal(rebuilt[0][name], tensor) for name, tensor in weights(tmp_path / "calm").items())
    assert losses(tmp_path / "calm") == losses(tmp_path / "stopped") != []


def test_a_model_is_trained_with_its_own_settings_and_seed(tmp_path: Path) -> None:
    """As if they were those of the recipe."""
    model, own = "kind: dit, width: 16, depth: 1, heads: 2, patch: 4", ["train.workers=1", "data.held_out_images=0"]
    settings = {"learning_rate": 3e-3, "batch_images": 32, "publish_images": [0, 96]}
    its = f"{{{model}, seed: 1, train: {json.dumps(settings)}}}"
    ranks.run(reading.load(TINY, [f"models={{dit: {its}}}", *own]), "dit", tmp_path / "its own", attempt=1)
    own += ["seed=1", *(f"train.{name}={value}" for name, value in settings.items())]
    ranks.run(reading.load(TINY, [f"models={{dit: {{{model}}}}}", *own]), "dit", tmp_path / "the recipe's", attempt=1)
    mine, same = (ranks.inputs(tmp_path / at) for at in ("its own", "the recipe's"))
    assert list(mine) == [0, 32, 64]
    assert mine == same
    assert_bit_equal(*(weights(tmp_path / at, "dit", 96) for at in ("its own", "the recipe's")))


def test_a_cooldown_branch_ends_as_the_complete_training_with_that_schedule(tmp_path: Path) -> None:
    """The trunk continues at a constant rate. A branch that was stopped continues from its own resume point."""
    settings = [DIT, "train.workers=1", "train.keep_spaced=0", "train.resume_every_images=400"]
    trunk = reading.load(TINY, [*settings, "train.cooldowns={images: [320], share: 0.3}"])
    assert (branch := trunk.models["dit-at-320"].branch)
    assert branch.at == 224
    ranks.run(trunk, "dit", tmp_path / "trunk", attempt=1)
    assert [name.images_seen for name in state.point_names(run_at(tmp_path / "trunk", "dit"))] == [224, 320]
    ranks.run(trunk, "dit-at-320", tmp_path / "trunk", attempt=1, stop_at=32)
    own = [name.images_seen for name in state.point_names(run_at(tmp_path / "trunk", "dit-at-320"))]
    assert own == [224, 272], "one where it begins"
    ranks.run(trunk, "dit-at-320", tmp_path / "trunk", attempt=2)
    annealed_run = run_at(tmp_path / "trunk", "dit-at-320")
    assert state.published_counts(annealed_run) == [320]
    at_branch = run_at(tmp_path / "trunk", "dit").resume_point(PointName(224, 1))
    trunk_hours = ResumePointManifest.require(at_branch).progress.cost.worker_hours
    annealed_hours = PublishedManifest.require(annealed_run.published_at(320)).cost.worker_hours
    assert trunk_hours
    assert annealed_hours
    assert 0 < trunk_hours < annealed_hours, "the trunk's hours are the branch's, too"
    complete = reading.load(TINY, [*settings, "train.decay=linear", "train.decay_from=0.7"])
    ranks.run(complete, "dit", tmp_path / "complete", attempt=1)
    annealed = weights(tmp_path / "trunk", "dit-at-320")
    assert_bit_equal(annealed, weights(tmp_path / "complete", "dit"))
    assert any(not torch.equal(annealed[name], w) for name, w in weights(tmp_path / "trunk", "dit").items())


def test_a_branch_that_was_killed_in_its_first_save_begins_again(tmp_path: Path) -> None:
    run = Run(open_folder(tmp_path))
    run.resume.write("000000000224-0001/weights-00000.safetensors", b"half")
    assert resume.newest_point(run, print, begin=224) is None
    with pytest.raises(UserError, match="this run has trained before"):
        resume.newest_point(run, print)


def test_a_trunk_that_is_killed_at_its_last_resume_point_is_not_trained(tmp_path: Path) -> None:
    """Its last published count is where its last branch begins: trained without that point, it would never run again."""
    settings = [DIT, "train.workers=1", "train.publish_images=[224]", "train.resume_every_images=400"]
    recipe = reading.load(TINY, [*settings, "train.cooldowns={images: [320], share: 0.3}"])
    plan = tmp_path / "faults"
    plan.write_text("kill at write path=resume/000000000224\n")
    with pytest.raises(Exception, match="SIGKILL"):
        ranks.run(recipe, "dit", tmp_path, attempt=1, faults=plan)
    assert state.published_counts(run_at(tmp_path, "dit")) == []
    ranks.run(recipe, "dit", tmp_path, attempt=2)
    assert state.published_counts(run_at(tmp_path, "dit")) == [224]
    assert state.point_at(run_at(tmp_path, "dit"), 224) is not None


def test_resume_points_stay_spaced_so_that_a_run_can_be_rolled_back() -> None:
    every = [PointName(images, 1) for images in range(0, 1001, 50)]
    keep = Keep(last=2, spaced=3, images=1000, branches=frozenset({350}))
    assert sorted(name.images_seen for name in keep.of(every)) == [250, 350, 500, 750, 950, 1000]
    kept: list[PointName] = []
    for name in every:  # as they are saved
        kept = sorted(keep.of([*kept, name]))
    assert [name.images_seen for name in kept] == [250, 350, 500, 750, 950, 1000]


def test_of_one_count_the_newest_attempts_resume_point_stays() -> None:
    """The older one may be damaged: that is why there is another."""
    every = [PointName(5000, 3), PointName(5000, 4), PointName(6000, 4), PointName(7000, 4)]
    keep = Keep(last=2, spaced=1, images=10_000, branches=frozenset())
    assert keep.of(every) == {PointName(5000, 4), PointName(6000, 4), PointName(7000, 4)}
    assert keep.of(every[:2]) == {PointName(5000, 4)}


def test_a_lost_attempt_deletes_nothing_of_its_successor(tmp_path: Path) -> None:
    """Its manifest came late; the other has begun an earlier count meanwhile."""
    run = Run(open_folder(tmp_path))
    put_resume_point(run.resume_point(PointName(240, 3)), {"a": b""}, images=240)
    run.resume_point(PointName(160, 4)).write("weights-00000.safetensors", b"begun")
    saver = resume.Saver(run, attempt=3, rank=0, world=1, require_held=lambda: None, keep=LAST_ONE, log=print)
    saver._prune(240)
    assert run.resume.list() == ["000000000160-0004", "000000000240-0003"]

    def lost() -> None:
        raise Held("taken over")

    saver.require_held = lost
    with pytest.raises(Held):
        saver._prune(240)


def test_a_run_does_not_continue_on_other_latents(tmp_path: Path) -> None:
    """They were deleted and made again in another order; with the first ones back, the run continues."""
    recipe = reading.load(TINY, [DIT, "train.workers=1"])
    ranks.run(recipe, "dit", tmp_path, attempt=1, stop_at=100)
    latents = open_folder(tmp_path) / "latents"
    first = LatentsManifest.require(latents)
    first.changed(made_from=first.made_from.model_copy(update={"order": "other"})).write(latents)
    with pytest.raises(ProcessRaisedException, match=r"trained on latents \w+, .*/latents is \w+, with other images at its"):
        ranks.run(recipe, "dit", tmp_path, attempt=2)
    first.write(latents)
    ranks.run(recipe, "dit", tmp_path, attempt=3)
    assert state.published_counts(run_at(tmp_path, "dit")) == [0, 160, 320]


def test_a_damaged_resume_point_is_named_and_the_one_before_it_used(tmp_path: Path) -> None:
    recipe = reading.load(TINY, [DIT])
    ranks.run(recipe, "dit", tmp_path, attempt=1)
    run, logged = run_at(tmp_path, "dit"), list[str]()
    newest = resume.newest_point(run, logged.append)
    assert newest is not None
    assert (newest.manifest.images, logged) == (LAST, [])
    for kind in ("weights", "exp_avg", "ema", "ema"):
        for parameter, (start, end) in newest.manifest.tables[f"{kind}-00000.safetensors"].items():
            newest.read(kind, parameter, start, end)
        held = {file.rpartition("-")[0] for file in newest._files}
        assert held == {kind}, "at another ZeRO stage a rank reads all files, and has those of one kind at a time"
    name = f"{newest.folder.name}/weights-00001.safetensors"
    data = bytearray(run.resume.read(name))
    data[-1] ^= 1
    run.resume.write(name, bytes(data))
    before = resume.newest_point(run, logged.append)
    assert before is not None
    assert before.manifest.images == 240
    assert len(logged) == 1
    assert f"{name}: damaged: its sha256 differs" in logged[0]


def test_skipped_steps_are_counted_over_attempts_and_the_last_resume_points_are_kept(tmp_path: Path) -> None:
    """Of two attempts, none without its manifest."""
    settings = [DIT, "train.keep_resume=2", "train.keep_spaced=0"]
    ranks.run(reading.load(TINY, [*settings, "train.publish_images=[0, 160]"]), "dit", tmp_path, attempt=1)
    point = resume.newest_point(run_at(tmp_path, "dit"), print)
    assert point is not None
    three = point.manifest.progress.model_copy(update={"skipped": 3})
    point.manifest.changed(progress=three).write(point.folder)
    ranks.run(reading.load(TINY, settings), "dit", tmp_path, attempt=2)
    rows = RowReader(run_at(tmp_path, "dit").log).new()
    assert [row.value for row in rows if row.name == "skipped"] == [0, 3]
    newest = resume.newest_point(run_at(tmp_path, "dit"), print)
    assert newest is not None
    assert (newest.manifest.images, newest.manifest.progress.skipped) == (LAST, 3)
    points = run_at(tmp_path, "dit").resume
    assert points.list() == ["000000000240-0002", "000000000320-0002"]
    assert all(ResumePointManifest.find(points / name) for name in points.list())


def test_storage_that_is_away_is_not_taken_for_damage(tmp_path: Path, no_pauses: None, inject: Callable[[str], None]) -> None:
    run, logged = run_with_points(tmp_path, {160: b"1", 320: b"2"}), list[str]()
    inject("fail at read path=000000000320 times=1000")
    with pytest.raises(StorageAway, match="000000000320"):
        resume.newest_point(run, logged.append)
    assert logged == []


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Access Denied"), OSError(errno.EINVAL, "Bad Request")])
def test_a_resume_point_that_cannot_be_read_is_not_passed_over(tmp_path: Path, error: OSError) -> None:
    run, logged = run_with_points(tmp_path, {160: b"1", 320: b"2"}), list[str]()
    weights = "000000000320-0001/weights-00000.safetensors"
    with store_requests.failing(error, path=weights), pytest.raises(StorageError, match=f"cannot read .*{weights}"):
        resume.newest_point(run, logged.append)
    assert logged == []


def test_a_resume_point_of_a_newer_version_is_not_passed_over(tmp_path: Path) -> None:
    run = run_with_points(tmp_path, {160: b"1", 320: b"2"})
    run.resume.write(f"000000000320-0001/{manifest.NAME}", b'{"format": 2}')
    with pytest.raises(StorageError, match=r"000000000320-0001/manifest.json: format 2 is not read by this version"):
        resume.newest_point(run, print)


@pytest.mark.parametrize("damage", [b"", b"null", b'{"images": 320}', b'{"format": 1}'])
def test_a_resume_point_with_a_damaged_manifest_is_passed_over(tmp_path: Path, damage: bytes) -> None:
    one = safetensors.torch.save({"weight": torch.ones(1)})
    run, logged = run_with_points(tmp_path, {160: one, 320: one}), list[str]()
    run.resume.write(f"000000000320-0001/{manifest.NAME}", damage)
    point = resume.newest_point(run, logged.append)
    assert (point and point.manifest.images, len(logged)) == (160, 1)


def test_a_run_whose_resume_points_are_all_damaged_does_not_start_over_unasked(tmp_path: Path) -> None:
    run = run_with_points(tmp_path, {160: b"1", 320: b"2"})
    for name in run.resume.list():
        run.resume.write(f"{name}/weights-00000.safetensors", b"damaged")
    with pytest.raises(UserError, match=r"no resume point can be used \(2 damaged\).*train.start_over=true"):
        resume.newest_point(run, print)
    assert resume.newest_point(run, print, start_over=True) is None


def test_a_run_that_has_published_does_not_start_over_unasked(tmp_path: Path) -> None:
    """Its resume points were deleted. One that was cut off in its first save starts again."""
    run = Run(open_folder(tmp_path))
    run.resume.write("000000000000-0001/weights-00000.safetensors", b"half")
    assert resume.newest_point(run, print) is None
    put_published(run.published_at(0), images=0)
    assert resume.newest_point(run, print) is None
    put_published(run.published_at(160), images=160)
    with pytest.raises(UserError, match=r"0 damaged"):
        resume.newest_point(run, print)


def test_a_run_without_a_complete_resume_point_does_not_start_over_unasked(tmp_path: Path) -> None:
    """Its manifests were lost before it had published a count after 0."""
    run = run_with_points(tmp_path, {160: b"1", 240: b"2"})
    put_published(run.published_at(0), images=0)
    for name in run.resume.list():
        run.resume.delete(f"{name}/{manifest.NAME}")
    with pytest.raises(UserError, match=r"no resume point can be used \(0 damaged\), and this run has trained before"):
        resume.newest_point(run, print)
    assert resume.newest_point(run, print, start_over=True) is None


def run_with_points(at: Path, points: dict[int, bytes]) -> Run:
    """A run with complete resume points of one file each, by images seen."""
    run = Run(open_folder(at))
    for images, data in points.items():
        put_resume_point(run.resume / f"{images:012d}-0001", {"weights-00000.safetensors": data}, images=images)
    return run


def test_what_storage_refuses_to_delete_ends_no_training(tmp_path: Path, inject: Callable[[str], None]) -> None:
    """As in a bucket whose policy keeps objects. It is said once."""
    said = list[str]()
    run, progress = Run(open_folder(tmp_path)), RunState(model="dit", latents="", adam_step=1, at=0.0)
    for images in (80, 160, 240):
        put_resume_point(run.resume_point(PointName(images, 1)), {"a": b""}, images=images)
    inject("full at delete times=2")
    saver = resume.Saver(run, attempt=1, rank=0, world=1, require_held=lambda: None, keep=LAST_ONE, log=said.append)
    for images in (280, 290):
        saver._write({}, images, progress)
    assert [line.partition(" /")[0] for line in said] == ["warning: resume points that are not needed stay: cannot delete"]
    saver._write({}, 300, progress)
    assert run.resume.list() == ["000000000300-0001"]


def test_pruning_spares_what_a_faster_rank_has_begun(tmp_path: Path) -> None:
    run = Run(open_folder(tmp_path))
    for images_seen, files in [(80, {"a": b""}), (160, {"a": b""}), (240, None)]:
        point = run.resume_point(PointName(images_seen, 1))
        point.write("weights-00001.safetensors", b"begun")
        if files is not None:
            put_resume_point(point, files, images=images_seen)
    resume.Saver(run, attempt=1, rank=0, world=2, require_held=lambda: None, keep=LAST_ONE, log=print)._prune(160)
    assert run.resume.list() == ["000000000160-0001", "000000000240-0001"]


def test_a_late_write_of_a_lost_attempt_tears_no_published_weights(tmp_path: Path) -> None:
    """The first attempt has lost the run while it writes, and ends after its successor; its manifest may come late, too."""
    run, answers = Run(open_folder(tmp_path)), iter([Held("taken over"), None])

    def require_held() -> None:
        if (answer := next(answers)) is not None:
            raise answer

    first = resume.Saver(run, 1, rank=0, world=1, require_held=require_held, keep=LAST_ONE, log=print)
    second = resume.Saver(run, 2, rank=0, world=1, require_held=lambda: None, keep=LAST_ONE, log=print)

    def seal(saver: resume.Saver) -> None:
        weights = {WEIGHTS_FILE: {"w": torch.full((2,), float(saver.attempt))}}
        saver._seal(run.published_at(160), weights, "", 160, RunState(model="dit", latents="", adam_step=1, at=0.0))

    seal(second)
    with pytest.raises(Held):
        seal(first)
    assert load_published(run, 160)["w"].tolist() == [2, 2]
    seal(first)
    assert load_published(run, 160)["w"].tolist() == [2, 2]


@pytest.mark.parametrize(("took_s", "warnings"), [(4.2, []), (45.5, ["45.5 s and grace_s is 30 s"])])
def test_a_save_longer_than_the_grace_is_a_warning_at_the_start(
    tmp_path: Path, tiny: Recipe, took_s: float, warnings: list[str]
) -> None:
    logged: list[str] = []
    attempt = Attempt(
        ranks.sweep_of(tmp_path, tiny), "dit", open_folder(tmp_path) / "latents", 1, torch.device("cpu"), Start(0.0),
        require_held=lambda: None, stop_by=lambda: None, report=print, log=logged.append, emit=print,
    )  # fmt: skip
    saver = resume.Saver(
        attempt.run, attempt=1, rank=0, world=1, require_held=attempt.require_held, keep=LAST_ONE, log=print, took_s=took_s
    )
    loop._compare_with_grace(attempt, saver)
    assert len(logged) == len(warnings)
    assert all(
        words in line and "rerun with --set grace_s=91 or more" in line for words, line in zip(warnings, logged, strict=True)
    )


@pytest.mark.parametrize(
    ("decay", "images", "expected"),
    [("none", 1000, 1.0), ("linear", 600, 0.8), ("linear", 1000, 0.0), ("cosine", 750, 0.5), ("cosine", 400, 1.0)],
)
def test_the_learning_rate_falls_after_the_plateau(
    decay: Literal["none", "linear", "cosine"], images: int, expected: float
) -> None:
    settings = Train(
        publish_images=(0, 1000), batch_images=10, lanes=1, resume_every_images=10, learning_rate=1.0, decay=decay, decay_from=0.5
    )
    assert learning_rate(settings, images) == pytest.approx(expected)


def test_the_learning_rate_warms_up_in_images() -> None:
    settings = Train(
        publish_images=(0, 1000), batch_images=10, lanes=1, resume_every_images=10, learning_rate=1.0, warmup_images=100
    )
    assert [learning_rate(settings, n) for n in (0, 40, 90, 500)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
