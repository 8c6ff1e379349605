"""A fork continues from its resume point, bit for bit; the original run stays as it is."""

import shutil
from pathlib import Path

import psutil
import pytest
import torch

from dis_scale.process.errors import Held, UserError
from dis_scale.recipe import reading
from dis_scale.storage import lease
from dis_scale.storage.lease import Holder
from dis_scale.sweep import RECIPE, Sweep, state
from dis_scale.sweep.documents import Origin, PublishedManifest
from dis_scale.tracking.rows import RowReader
from dis_scale.training import resume
from dis_scale.training.fork import fork_run
from dis_scale.weights import ema, published
from dis_scale.weights.published import load_average, snapshots
from tests.conftest import TINY
from tests.support import ranks


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep whose dit has been trained to its end, all its resume points kept."""
    root, recipe = tmp_path_factory.mktemp("origin"), reading.load(TINY, ["train.keep_resume=9"])
    ranks.run(recipe, "dit", root, attempt=1)
    made = ranks.sweep_of(root, recipe)
    made.save_recipe()
    return made


def test_a_fork_trains_on_to_the_bit(sweep: Sweep) -> None:
    for _ in range(2):  # a rerun does what is left
        made = fork_run(Sweep.open(sweep.folder.url), "dit", 240, "again")
    grown = Sweep.open(sweep.folder.url)
    recipe = grown.recipe
    assert list(recipe.models)[:2] == ["dis", "dit"]
    assert [model for name, model in recipe.models.items() if name == "again"] == [recipe.models["dit"]]
    assert state.published_counts(made) == [0, 160]
    assert Origin.read(made.folder).resume_point == "000000000240-0001"
    assert state.resumable_images(made) == 240
    assert sweep.folder.local
    ranks.run(recipe, "again", sweep.folder.local.parent, attempt=1)
    ends = [resume.newest_point(grown.run(name), print) for name in ("dit", "again")]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].manifest.files == ends[1].manifest.files
    assert ends[1].manifest.progress.model == "again"
    spent = [end.manifest.progress.spent for end in ends if end]
    assert spent[0] is not None
    assert spent[1] is not None
    assert spent[1].first_at > spent[0].first_at, "its goodput begins with it"
    assert spent[1].worker_s > 0
    due = {each.images_seen for each in state.Backlog(grown, ("again",)).left()}
    assert due == {320}, "what is copied is evaluated as the origin's"


def test_a_fork_leaves_damaged_weights_out_and_one_that_was_not_ended_can_be_another(
    sweep: Sweep, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert sweep.folder.local
    shutil.copytree(sweep.folder.local.parent, tmp_path / "root")
    own = Sweep.open(str(tmp_path / "root" / sweep.folder.local.name))
    published = own.run("dit").published_at(160)
    for file in PublishedManifest.require(published).files:
        published.write(file, b"no weights")
    recipe = own.folder.read(RECIPE)
    made = fork_run(own, "dit", 240, "third")
    assert state.published_counts(made) == [0]
    assert "third continues without it" in caplog.text
    assert "third" not in state.missing_published(Sweep.open(own.folder.url)), "its origin's is the one that is evaluated"
    own.folder.write(RECIPE, recipe)  # the last that is written
    fork_run(Sweep.open(own.folder.url), "dit", 80, "third")
    assert state.resumable_images(made) == 80
    with pytest.raises(UserError, match="--as third: this sweep has a run of that name"):
        fork_run(Sweep.open(own.folder.url), "dit", 240, "third")


def test_a_rerun_needs_nothing_that_is_copied(sweep: Sweep, tmp_path: Path) -> None:
    """The origin has deleted its resume point meanwhile, as it does."""
    assert sweep.folder.local
    shutil.copytree(sweep.folder.local.parent, tmp_path / "root")
    own = Sweep.open(str(tmp_path / "root" / sweep.folder.local.name))
    run, before = own.run("dit"), own.folder.read(RECIPE)
    made = fork_run(own, "dit", 240, "rerun")
    published = made.published_at(160).local
    assert published
    written = {file: file.stat().st_mtime_ns for file in published.rglob("*.*")}
    own.folder.write(RECIPE, before)  # the last that is written
    point = state.point_at(run, 240)
    assert point
    for name in run.resume_point(point).list():
        run.resume_point(point).delete(name)
    fork_run(Sweep.open(own.folder.url), "dit", 240, "rerun")
    assert "rerun" in Sweep.open(own.folder.url).recipe.models
    assert {file: file.stat().st_mtime_ns for file in published.rglob("*.*")} == written


def test_a_fork_may_change_the_training_from_there_on(sweep: Sweep) -> None:
    """A run that diverged is rolled back and continues at a lower rate."""
    made = fork_run(Sweep.open(sweep.folder.url), "dit", 240, "lower", ["learning_rate=1e-5", "clip=0.5", "batch_images=8"])
    recipe = Sweep.open(sweep.folder.url).recipe
    settings = recipe.train_of("lower")
    assert (settings.learning_rate, settings.clip, settings.batch_images) == (1e-5, 0.5, 8)
    assert recipe.train_of("dit").learning_rate == 1e-3
    assert sweep.folder.local
    ranks.run(recipe, "lower", sweep.folder.local.parent, attempt=1)
    rows = RowReader(made.log).new()
    assert {row.value for row in rows if row.name == "learning_rate"} == {1e-5}
    assert {row.value for row in rows if row.name == "skipped"} == {0}, "though it has taken steps of two sizes"
    rebuilt = load_average(made, 320, settings, 0.1)
    tracked = published._load(made.published_at(320), published.average_file(ema.power_name(0.1)))
    assert rebuilt.keys() == tracked.keys()
    assert all(torch.allclose(rebuilt[name], tracked[name], rtol=1e-4, atol=1e-6) for name in tracked)
    known = snapshots(made, 320, settings)
    assert [(each.images, each.width) for each in known][-2:] == [(320, 0.05), (320, 0.1)]
    for earlier in (each.images for each in known if each.images < 320):
        for file in made.published_at(earlier).list():
            if file.endswith(".safetensors"):
                made.published_at(earlier).delete(file)
    again = load_average(made, 320, settings, 0.1)
    assert all(torch.equal(again[name], rebuilt[name]) for name in tracked), "of all snapshots it reads the one that was tracked"
    with pytest.raises(UserError, match=r"models.new.train.learning_rat: unknown key \(did you mean 'learning_rate'"):
        fork_run(Sweep.open(sweep.folder.url), "dit", 240, "new", ["learning_rat=1"])


def test_two_forks_that_were_begun_together_are_both_in_the_recipe(sweep: Sweep) -> None:
    first, second = (Sweep.open(sweep.folder.url) for _ in range(2))
    fork_run(first, "dit", 240, "one")
    fork_run(second, "dit", 240, "two")
    assert {"one", "two"} <= Sweep.open(sweep.folder.url).recipe.models.keys()


def test_a_sweep_that_runs_is_not_changed_under_its_command(sweep: Sweep) -> None:
    before = sweep.folder.read(RECIPE)
    parent = psutil.Process().ppid()
    Holder.here().changed(pid=parent, started=lease.began(parent)).write(command := sweep.lease("sweep"), "7777")
    with pytest.raises(Held, match=f"held by process {parent} .*: one writer at a time"):
        fork_run(sweep, "dit", 240, "beside")
    command.write("7777.end", b"{}")
    assert sweep.folder.read(RECIPE) == before
    assert not (sweep.folder / "runs/beside").list()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("batch_images=32", r"--at 240: not a multiple of the new run's batch_images 32"),
        ("publish_images=[224]", r"publish_images: 224 is not after 240, where the new run begins, and dit has not published it"),
        ("publish_images=[160]", r"--at 240: the new run would end at 160 images, before it has trained: publish later ones"),
    ],
)
def test_a_fork_that_would_never_end_is_refused(sweep: Sweep, setting: str, words: str) -> None:
    before = sweep.folder.list("runs")
    with pytest.raises(UserError, match=words):
        fork_run(sweep, "dit", 240, "never", [setting])
    assert sweep.folder.list("runs") == before


@pytest.mark.parametrize(
    ("model", "images", "new", "words"),
    [
        ("dip", 80, "x", r"has no model 'dip' \(did you mean 'dit'\?\): it has dis, dit"),
        ("dit", 96, "x", r"--at 96: dit has no resume point there; it has 0, 80, 160, 240, 320"),
        ("dit", 80, "dis", r"--as dis: this sweep has a model of that name, with other settings: choose another name"),
        ("dit", 80, "X!", r"models.X!"),
    ],
)
def test_an_impossible_fork_is_refused_and_writes_nothing(sweep: Sweep, model: str, images: int, new: str, words: str) -> None:
    before = sweep.folder.list("runs")
    with pytest.raises(UserError, match=words):
        fork_run(sweep, model, images, new)
    assert sweep.folder.list("runs") == before
    (holding,) = lease.last_holdings(sweep.lease("sweep"), 1)
    assert holding.end is not None
    assert holding.end.why == "", "the sweep itself has not failed"
