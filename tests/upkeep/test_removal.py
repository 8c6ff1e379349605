"""Deletion of a complete sweep: what goes, what stays for others, and when it is refused."""

import errno
import json
from pathlib import Path

import pytest

from dis_scale import cli
from dis_scale.data import listing
from dis_scale.process.errors import Held, StorageError, UserError
from dis_scale.recipe import Recipe, SweepStart
from dis_scale.storage import lease, manifest
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import RECIPE, Run, Sweep, command_lease, state
from dis_scale.sweep.documents import LatentsManifest, TrackingIds
from dis_scale.upkeep import removal, retention
from tests.support import small_latents, store_requests
from tests.support.commands import invoke
from tests.support.documents import put_files, put_resume_point
from tests.support.leases import run_elsewhere


def make(store: Folder, recipe: Recipe, latents: str) -> Sweep:
    """Make a sweep with a run of two resume points, on latents of this name."""
    sweep = Sweep.below(store, recipe)
    sweep.save_recipe()
    folder = store / f"latents/{latents}"
    if not folder.exists(manifest.NAME):
        small_latents.make(folder, [4])
    state.use_latents(sweep, folder, LatentsManifest.require(folder).encoding.identity)
    listed = listing.folder_of(store, recipe.data.declared)
    put_files(listed, {"a.npz": b"1"})
    with lease.hold(command_lease(sweep.folder)):
        for count in ("000000000160-0001", "000000000320-0001"):
            put_resume_point(sweep.run("dit").resume / count)
    TrackingIds(uri="sqlite:////x/mlflow.db", experiment="1", sweep="a").write(sweep.folder)
    return sweep


@pytest.fixture
def sweep(store_url: str, tiny: Recipe) -> Sweep:
    return make(open_folder(store_url), tiny, "mine")


def other(sweep: Sweep, latents: str, **changes: object) -> Sweep:
    recipe = sweep.recipe.model_copy(update={"name": "other", **changes})
    return make(sweep.store, recipe, latents)


def everything(store: Folder) -> list[str]:
    return sorted(store.tree())


def test_a_tree_has_each_file_and_its_size(store_url: str) -> None:
    folder = open_folder(store_url)
    assert (folder / "none").tree() == {}
    folder.write("a", b"1")
    folder.write("b/c/d", b"123")
    assert folder.tree() == {"a": 1, "b/c/d": 3}
    assert (folder / "b").tree() == {"c/d": 3}


def test_a_sweep_goes_with_its_latents_and_listing(sweep: Sweep) -> None:
    before = everything(sweep.store)
    found = removal.find(sweep)
    assert [part.kind for part in found.parts] == ["leases", "runs", "sweep", "latents", "listings"]
    named = [f"{part.folder.url}/{name}" for part in found.parts for name in part.sizes]
    assert sorted(named) == [f"{sweep.store}/{path}" for path in before]
    assert found.notes == [("mlflow", "its runs stay in sqlite:////x/mlflow.db")]
    assert everything(sweep.store) == before, "looking deletes nothing"
    removal.delete(found)
    assert everything(sweep.store) == []


def test_what_another_sweep_uses_stays(sweep: Sweep) -> None:
    second = other(sweep, "mine")
    theirs = [path for path in everything(sweep.store) if not path.startswith("sweeps/tiny/")]
    found = removal.find(sweep)
    assert [note.kind for note in found.notes] == ["kept", "kept", "mlflow"]
    assert found.notes[1].words == f"latents {sweep.store}/latents/mine: other sweeps use it"
    removal.delete(found)
    assert everything(sweep.store) == theirs
    removal.delete(removal.find(second))
    assert everything(sweep.store) == []


def test_own_latents_go_beside_those_of_others(sweep: Sweep) -> None:
    other(sweep, "theirs")
    found = removal.find(sweep)
    assert [part.folder.name for part in found.unshared] == ["mine"]
    removal.delete(found)
    assert sweep.store.list("latents") == ["theirs"]


def test_latents_stay_if_another_sweep_may_need_them(sweep: Sweep) -> None:
    other(sweep, "theirs").folder.write(RECIPE, b"{")
    found = removal.find(sweep)
    assert found.unshared == []
    assert "latents/mine, which others may use: latents and listings are kept: " in found.notes[1].words


def test_sweeps_that_begin_with_its_weights_are_named(sweep: Sweep, tiny: Recipe) -> None:
    start = SweepStart(kind="sweep", url=sweep.folder.url, model="dit", images=320)
    second = other(sweep, "theirs", models={"dit": tiny.models["dit"].model_copy(update={"start": start})})
    needed = [note.words for note in removal.find(sweep).notes if note.kind == "needed"]
    assert needed == [f"dit at 320 images of {sweep}: dit of {second} begins with it"]


@pytest.mark.parametrize("stage", ["sweep", "prepare", "dit", "a model that the recipe lost"])
def test_a_running_sweep_is_refused(sweep: Sweep, stage: str) -> None:
    before = everything(sweep.store)
    run_elsewhere(sweep.lease(stage) if stage in ("sweep", "prepare") else Run(sweep.folder / "runs" / stage).lease)
    with pytest.raises(Held, match=f"{sweep} is running: process .* to stop it, dis-scale stop {sweep}"):
        removal.find(sweep)
    assert set(before) <= set(everything(sweep.store))


def test_a_sweep_that_was_started_meanwhile_is_refused(sweep: Sweep) -> None:
    found = removal.find(sweep)
    run_elsewhere(sweep.lease("sweep"))
    before = everything(sweep.store)
    with pytest.raises(Held, match="which is alive: one writer at a time"):
        removal.delete(found)
    assert everything(sweep.store) == before


def test_a_stage_that_was_started_meanwhile_is_refused(sweep: Sweep) -> None:
    found = removal.find(sweep)
    run_elsewhere(sweep.run("dit").lease)
    with pytest.raises(Held, match=f"{sweep} is running: process .* holds .*/runs/dit/lease"):
        removal.delete(found)
    assert sweep.folder.exists(RECIPE)


def test_latents_that_another_sweep_uses_meanwhile_stay(sweep: Sweep) -> None:
    found = removal.find(sweep)
    other(sweep, "mine")
    with pytest.raises(UserError, match=r"a sweep uses .*/latents/mine since they were listed: run the command again"):
        removal.delete(found)
    assert sweep.store.list("latents/mine")
    removal.delete(removal.find(sweep))
    assert sweep.store.list("latents/mine")


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "of a precompute that was ended"])
def test_a_sweep_that_is_stored_during_the_last_look_keeps_its_latents(sweep: Sweep, complete: bool) -> None:
    """With a thousand sweeps the look takes minutes."""
    if not complete:
        state.require_latents(sweep.folder).delete("manifest.json")
    (latents,) = (each for each in removal.find(sweep).unshared if each.kind == "latents")
    before, looks = everything(latents.folder), list[int]()

    def look() -> None:
        looks.append(1)
        if len(looks) > 1:
            Sweep.below(sweep.store, sweep.recipe.model_copy(update={"name": "other"})).save_recipe()
            latents.require_unused()

    with pytest.raises(UserError, match="other has no complete latents yet"):
        retention.delete([latents._replace(require_unused=look)])
    assert everything(latents.folder) == before


def test_shards_are_deleted_after_what_would_complete_them(sweep: Sweep) -> None:
    """A sweep that is stored after the last look would find all shards' accounts, and write a manifest of shards that go."""
    (latents,) = (each for each in removal.find(sweep).unshared if each.kind == "latents")
    refused = OSError(errno.EINVAL, "Invalid request")
    with store_requests.failing(refused, "delete", ".tar"), pytest.raises(StorageError, match="Invalid request"):
        retention.delete([latents])
    assert [path for path in everything(latents.folder) if path.endswith(".json")] == []


def test_an_interrupted_deletion_is_continued(sweep: Sweep) -> None:
    refused = OSError(errno.EINVAL, "Invalid request")
    with store_requests.failing(refused, "delete", "/runs"), pytest.raises(StorageError, match="Invalid request"):
        removal.delete(removal.find(sweep))
    assert [path for path in everything(sweep.folder) if path.endswith("manifest.json")] == []
    removal.delete(removal.find(Sweep.open(sweep.folder.url)))
    assert everything(sweep.store) == []


def test_a_sweep_is_not_deleted_under_a_shell(tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folder itself, which cannot be deleted then, a part would be left that keeps everything that is shared."""
    sweep = make(open_folder(tmp_path), tiny, "mine")
    assert sweep.folder.local
    before = everything(sweep.store)
    for inside in (sweep.folder.local, sweep.folder.local / "runs"):
        monkeypatch.chdir(inside)
        with pytest.raises(UserError, match="this shell is in its folder: leave it"):
            removal.find(Sweep.open(sweep.folder.url))
    assert everything(sweep.store) == before
    assert Sweep.open("../../tiny").folder == sweep.folder


def test_only_the_folder_of_a_sweep_is_deleted(tmp_path: Path, tiny: Recipe) -> None:
    """Not any folder that has a recipe, such as one with a user's own files."""
    folder = open_folder(tmp_path / "mine")
    Sweep(folder, tiny).save_recipe()
    with pytest.raises(UserError, match="holds the sweep tiny, whose folder has another name: delete it by hand"):
        removal.find(Sweep.open(folder.url))


def test_the_command_lists_and_deletes(tmp_path: Path, tiny: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make(open_folder(tmp_path), tiny, "mine")
    code, output = invoke("delete", str(sweep))
    assert code == 0
    assert f"runs         {sweep}/runs: 4 files, 0.0 MB\n" in output
    assert "mlflow       its runs stay in sqlite:////x/mlflow.db\n" in output
    assert f"; to delete them: dis-scale delete {sweep} --yes\n" in output
    assert sweep.folder.exists(RECIPE)
    with pytest.raises(SystemExit):
        cli.main(["delete", str(sweep), "--yes", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["deleted"]
    assert facts["files"] == sum(part["files"] for part in facts["parts"])
    assert not (tmp_path / "sweeps" / "tiny").exists()
    assert invoke("delete", str(sweep))[0] == 2
