"""Verification of all that results rest on, and of what none needs; on a small sweep made by hand."""

import errno
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from dis_scale.data import listing
from dis_scale.process.errors import StorageError, UserError, counted
from dis_scale.recipe import Recipe
from dis_scale.storage import lease, manifest, npy
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.storage.lease import Holder
from dis_scale.sweep import RECIPE, PointName, Sampled, Sweep, state
from dis_scale.sweep.documents import BadStepManifest, LatentsManifest, LatentsPointer, Metrics, PublishedManifest
from dis_scale.upkeep import removal, retention, verify
from dis_scale.upkeep.verify import verify_sweep
from tests.support import small_latents, store_requests
from tests.support.commands import answer, invoke
from tests.support.documents import WEIGHTS, put, put_files, put_metrics, put_prepared, put_published, put_resume_point

COUNTS = (0, 160, 320)


@pytest.fixture
def sweep(tmp_path: Path, tiny: Recipe) -> Sweep:
    """A finished sweep: every kind of file that a result rests on, and some that none needs."""
    made = Sweep.below(open_folder(tmp_path), tiny)
    made.save_recipe()
    latents = small_latents.make(made.store / "latents/used", [4, 4])
    state.use_latents(made, latents, LatentsManifest.require(latents).encoding.identity)
    put_prepared(made, block())
    for model in tiny.models:
        run = made.run(model)
        for attempt in (1, 2):
            with lease.hold(run.lease):
                put_resume_point(run.resume_point(PointName(160 * attempt, attempt)))
        put(BadStepManifest(files={}, images=80, attempt=1), run.bad_step(PointName(80, 1)), WEIGHTS)
        for count in COUNTS:
            put_published(run.published_at(count), b"published", images=count)
            evaluate(made, Sampled(model, count))
            for variant in tiny.evaluate.samplings:
                evaluate(made, Sampled(model, count, variant))
    return made


def block() -> bytes:
    return npy.sealed({"features": np.ones(4)})


def evaluate(sweep: Sweep, sampled: Sampled) -> None:
    folder, settings = sweep.evaluation(sampled), sweep.recipe.evaluate.samplings[sampled.variant]
    folder.write("block-00000.npz", block())
    put_metrics(folder, metrics=settings.metrics)


def verified(sweep: Sweep) -> list[str]:
    found = verify_sweep(sweep, lambda *_: None)
    assert found.refused == []
    return found.damaged


def test_everything_is_read_and_nothing_is_wrong(sweep: Sweep) -> None:
    reports: list[tuple[int, int]] = []
    assert verify_sweep(sweep, lambda done, total: reports.append((done, total))) == ([], [])
    assert [done for done, _ in reports] == list(range(1, reports[-1][1] + 1))


def test_each_damaged_file_is_named_once_with_a_cure(sweep: Sweep, tmp_path: Path) -> None:
    """One byte of each file that a result rests on is flipped, in turn."""
    unread = ("recipe.yaml", "latents.json", "begun.json")
    folders = ("lease", "evidence", "listings")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in unread]
    files = [path for path in files if not set(folders) & set(path.relative_to(tmp_path).parts)]
    assert len(files) > 40
    for path in files:
        if path.suffix == ".json":
            continue
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        (line,) = verified(sweep)
        assert str(path) in line
        assert "damaged: its sha256 differs" in line
        assert any(cure in line for cure in ("restore ", "delete it", "repair: dis-scale data repair", "uses the resume point"))
        path.write_bytes(good)


@pytest.mark.parametrize(
    "name", ["runs/dit/published/000000000160/manifest.json", "runs/dit/resume/000000000320-0002/manifest.json"]
)
def test_a_damaged_manifest_is_named(sweep: Sweep, name: str) -> None:
    sweep.folder.write(name, b"{")
    assert any(f"{name}: damaged: JSON" in line for line in verified(sweep))


def test_deleted_published_weights_are_named(sweep: Sweep) -> None:
    sweep.run("dit").published_at(160).delete()
    assert state.missing_published(sweep) == {"dit": [160]}
    (line,) = verified(sweep)
    assert "dit/published/000000000160: damaged: no manifest.json: the folder is incomplete or was deleted; restore them" in line


def flip_key(folder: Folder, name: str, key: str) -> None:
    folder.write(name, folder.read(name).replace(f'"{key}"'.encode(), b'"?"'))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.vae.delete(), "/vae: damaged: no manifest.json: the folder is incomplete or was deleted; restore it from"),
        (lambda s: s.extractor("judge").delete(), "/extractors/judge: damaged: no manifest.json"),
        (lambda s: s.extractor("digits").delete(), "/extractors/digits: damaged: no manifest.json"),
        (lambda s: s.references.delete(), "/reference: damaged: the statistics under digits are missing; the next run"),
        (lambda s: (s.store / "latents/used").delete(), "latents/used: damaged: no manifest.json"),
        (lambda s: s.store.delete("latents/used/000000.tar"), "000000.tar: damaged: missing, though its manifest names it; repair"),
        (lambda s: flip_key(s.store / "latents/used", manifest.NAME, "shards"), "manifest.json: damaged: shards: Field required"),
        (lambda s: s.folder.delete(LatentsPointer.NAME), "/sweeps/tiny/latents.json: damaged: missing; the next run"),
        (lambda s: s.folder.write(LatentsPointer.NAME, b"{"), "latents.json: damaged: JSON"),
        (lambda s: flip_key(s.folder, LatentsPointer.NAME, "folder"), "latents.json: damaged: folder: Field required"),
        (lambda s: state.use_latents(s, s.store / "latents/used", "0" * 64), "latents of another VAE"),
        (lambda s: s.run("dit").published_at(320).delete(), "dit/published/000000000320: damaged: no manifest.json"),
        (
            lambda s: s.run("dit").published_at(160).delete("weights-0001.safetensors"),
            "000000000160/weights-0001.safetensors: damaged: missing, though its manifest names it; restore them",
        ),
        (lambda s: flip_key(s.run("dit").published_at(160), manifest.NAME, "files"), "damaged: files: Field required"),
        (lambda s: s.evaluation(Sampled("dit", 160)).write(Metrics.NAME, b"null"), "metrics.json: damaged: JSON"),
        (
            lambda s: flip_key(s.evaluation(Sampled("dit", 160)), Metrics.NAME, "values"),
            "metrics.json: damaged: values: Field required",
        ),
    ],
)  # fmt: skip
def test_what_was_deleted_or_lost_its_meaning_is_named_with_a_cure(
    sweep: Sweep, spoil: Callable[[Sweep], object], words: str
) -> None:
    spoil(sweep)
    (line,) = verified(sweep)
    assert words in line
    assert any(cure in line for cure in ("restore", "delete it", "repair", "makes it again"))


@pytest.mark.parametrize("name", ["000000.tar", "manifest.json", "block-00000.npz"])
def test_storage_that_refuses_access_is_not_reported_as_damage(name: str, sweep: Sweep) -> None:
    """The cures would have good files deleted or made again. What is damaged elsewhere is named."""
    published = sweep.run("dis").published_at(320)
    published.write(next(iter(PublishedManifest.require(published).files)), b"damaged")
    with store_requests.failing(PermissionError(errno.EACCES, "Permission denied"), "read", name):
        if name == "manifest.json":  # without these nothing is known
            with pytest.raises(StorageError, match=rf"cannot read .*{name}: permission denied: check the key"):
                verified(sweep)
            return
        damaged, refused = verify_sweep(sweep, lambda *_: None)
        code, output = invoke("verify", sweep.folder.url)
    assert refused
    assert all(re.fullmatch(rf"cannot read .*{name}: permission denied: check the key.*", line) for line in refused)
    (line,) = damaged
    assert "runs/dis/published/000000000320" in line
    assert (code, "damaged  " in output, "refused  cannot read" in output) == (1, True, True)
    assert f"1 file damaged or missing; {counted(len(refused), 'file')} could not be read, and may be good" in output


def test_a_sweep_that_has_only_begun_misses_nothing(tmp_path: Path, tiny: Recipe) -> None:
    sweep = Sweep.below(open_folder(tmp_path), tiny)
    sweep.save_recipe()
    assert verified(sweep) == []
    put_files(sweep.vae)
    assert verified(sweep) == []


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"{", b"models: 1"])
def test_a_damaged_recipe_is_one_line_with_its_cure(sweep: Sweep, damage: bytes) -> None:
    sweep.folder.write(RECIPE, damage)
    code, output = invoke("verify", str(sweep))
    assert code == 2
    assert output.count("\n") == 1
    assert f"{sweep}/{RECIPE}: " in output
    assert "restore it from a backup; or delete it and run the sweep with its own recipe file" in output


def test_latents_of_a_sweep_whose_folder_is_a_link_are_kept(sweep: Sweep, tmp_path: Path) -> None:
    """Also while its disk is not mounted: what the sweep uses is unknown then."""
    assert sweep.folder.local is not None
    moved = sweep.folder.local.rename(tmp_path / "disk")
    sweep.folder.local.symlink_to(moved)
    assert retention.find_unused(sweep.store) == []
    moved.rename(tmp_path / "unmounted")
    with pytest.raises(UserError, match=rf"latents and listings are kept: {sweep.folder} is no folder"):
        retention.find_unused(sweep.store)
    sweep.folder.local.parent.rename(tmp_path / "moved")
    sweep.folder.local.parent.symlink_to(tmp_path / "unmounted too")
    for _ in range(2):  # also an empty folder, on which a disk is mounted
        with pytest.raises(UserError, match=r"latents and listings are kept: .*/sweeps is a link that leads to no sweep: mount"):
            retention.find_unused(sweep.store)
        (tmp_path / "unmounted too").mkdir(exist_ok=True)


def test_what_no_result_needs_is_found_and_deleted(sweep: Sweep, tmp_path: Path) -> None:
    store = sweep.store
    small_latents.make(store / "latents/unused", [4])
    used = listing.folder_of(store, sweep.recipe.data.source.model_dump(mode="json"))
    put_files(used, {"a.npz": b"1"})
    put_files(store / "listings/unused", {"a.npz": b"1"})
    for count in (160, 480):  # of an attempt that died; at the second count the next one has not published yet
        sweep.run("dit").published_at(count).write("ema-0003.safetensors", b"1")
    found = retention.find_unneeded(sweep) + retention.find_unused(store)
    kinds = {each.kind for each in found}
    assert kinds == {"samples", "leases", "failed steps", "weights of other attempts", "latents", "listings"}
    (weights,) = (each for each in found if each.kind == "weights of other attempts")
    assert (weights.folder, {*weights.sizes}) == (sweep.run("dit").published_at(160), {"ema-0003.safetensors"})
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    retention.delete(found)
    gone = before - {path for path in tmp_path.rglob("*") if path.is_file()}
    assert gone == {Path(str(each.folder)) / name for each in found for name in each.sizes}
    assert {path.name for path in gone if path.parent.name == "lease"} == {"0001.end"}
    assert (store.list("latents"), store.list("listings")) == (["used"], [used.name])
    assert retention.find_unneeded(sweep) + retention.find_unused(store) == []
    assert verified(sweep) == []
    with lease.hold(sweep.run("dit").lease) as next_one:
        assert next_one.number == 3


def test_samples_of_an_evaluation_that_is_measured_again_stay(sweep: Sweep) -> None:
    folder = sweep.evaluation(Sampled("dit", 160))
    put_metrics(folder, metrics=())
    assert folder not in [each.folder for each in retention.find_unneeded(sweep)]


def test_samples_of_an_ablation_with_damaged_metrics_stay(sweep: Sweep) -> None:
    """The metrics are made again from them."""
    folder = sweep.evaluation(Sampled("dit", 160, "vary/guidance-2"))
    folder.write("block-00000.npz", block())
    put_metrics(folder, metrics=())
    assert folder in [each.folder for each in retention.find_unneeded(sweep)]
    folder.write(Metrics.NAME, b"{")
    assert folder not in [each.folder for each in retention.find_unneeded(sweep)]


def test_dead_leases_of_other_machines_are_polled_together(
    sweep: Sweep, short_leases: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = Holder(host="elsewhere", boot="x", pid=1, started=0.0)
    for number in range(70):
        other = Sweep.below(sweep.store, sweep.recipe.model_copy(update={"name": f"other-{number}"}))
        other.save_recipe()
        LatentsPointer.read(sweep.folder).write(other.folder)
        holder.write(other.lease("sweep"), "0001")
    pauses, pause, here = list[float](), time.sleep, threading.get_ident()

    def counted(seconds: float) -> None:
        if threading.get_ident() == here:  # not the threads that other tests of this process have left, such as exporters
            pauses.append(seconds)
        pause(seconds)

    monkeypatch.setattr(time, "sleep", counted)
    assert retention.find_unused(sweep.store) == []
    assert pauses == [1]


def test_a_run_that_still_trains_keeps_its_failed_steps(sweep: Sweep) -> None:
    sweep.run("dit").published_at(320).delete()
    steps = [str(each.folder) for each in retention.find_unneeded(sweep) if each.kind == "failed steps"]
    assert steps
    assert not any("/dit/" in step for step in steps)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda other: other.folder.delete("latents.json"), "has no complete latents yet"),
        (lambda other: other.folder.write("recipe.yaml", b"{"), "cannot be read, so what it uses is unknown"),
    ],
    ids=["not encoded yet", "unreadable"],
)
def test_nothing_shared_is_unneeded_while_another_sweep_may_use_it(sweep: Sweep, spoil: object, words: str) -> None:
    other = Sweep.below(sweep.store, sweep.recipe.model_copy(update={"name": "other"}))
    other.save_recipe()
    other.folder.write("latents.json", sweep.folder.read("latents.json"))
    small_latents.make(sweep.store / "latents/unused", [4])
    assert [each.folder.name for each in retention.find_unused(sweep.store)] == ["unused"]
    spoil(other)  # type: ignore[operator]
    with pytest.raises(UserError, match=f"latents and listings are kept: .*/other {words}"):
        retention.find_unused(sweep.store)


def test_a_running_sweep_keeps_what_is_shared(sweep: Sweep) -> None:
    with lease.hold(sweep.lease("sweep")):
        holder, other = Holder.read(sweep.lease("sweep"), "0001"), psutil.Process().parent()
        assert other
        holder.changed(pid=other.pid, started=lease.began(other.pid)).write(sweep.lease("sweep"), "0001")
        with pytest.raises(UserError, match=f"latents and listings are kept: {sweep} is running .process {other.pid}"):
            retention.find_unused(sweep.store)


def test_latents_that_a_sweep_adopts_while_dead_leases_are_polled_stay(
    sweep: Sweep, short_leases: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preempted neighbour is polled for 20 s: long enough to begin another sweep."""
    small_latents.make(sweep.store / "latents/finished", [4])
    Holder(host="elsewhere", pid=7).write(sweep.lease("sweep"), "0001")
    other = Sweep.below(sweep.store, sweep.recipe.model_copy(update={"name": "other"}))

    def begin(_: float) -> None:
        other.save_recipe()
        LatentsPointer(folder="latents/finished", vae="v" * 64).write(other.folder)

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", begin)
        assert retention.find_unused(sweep.store) == []
    other.folder.delete()
    unused = retention.find_unused(sweep.store)
    other.save_recipe()
    with pytest.raises(UserError, match="has no complete latents yet"):
        retention.delete(unused)
    assert (sweep.store / "latents/finished").list()


def test_a_resume_point_that_is_pruned_meanwhile_is_not_damaged(sweep: Sweep) -> None:
    """Training keeps two: of those that a verification of hours has listed, few are left."""
    first, second = (sweep.run("dis").resume_point(PointName(160 * attempt, attempt)) for attempt in (1, 2))
    reports = list[tuple[int, int]]()

    def prune(done: int, total: int) -> None:
        reports.append((done, total))
        first.delete(manifest.NAME)
        first.delete()

    checks = list(verify._checks(sweep))  # which lists
    assert verify_sweep(sweep, prune) == ([], [])
    second.delete()
    assert [check for some in checks for check in some() if str(second) in str(check)] == []
    assert len(reports) == reports[0][1]


def test_what_is_behind_a_link_is_verified(sweep: Sweep, tmp_path: Path) -> None:
    """As when a disk was full, and the runs were moved to another."""
    assert sweep.folder.local
    (sweep.folder.local / "runs").rename(tmp_path / "moved")
    (sweep.folder.local / "runs").symlink_to(tmp_path / "moved")
    assert verified(sweep) == []
    published = sweep.run("dis").published_at(320)
    published.write(next(iter(PublishedManifest.require(published).files)), b"damaged")
    (line,) = verified(sweep)
    assert "runs/dis/published/000000000320" in line
    (note,) = (note for note in removal.find(sweep).notes if "link" in note.words)
    assert note.words == f"what {sweep.folder}/runs leads to: it is a link, which is deleted"
    before = sorted(tmp_path.glob("moved/**/*"))
    retention.delete(retention.find_unneeded(sweep))
    removal.delete(removal.find(sweep))
    assert not sweep.folder.list()
    assert sorted(tmp_path.glob("moved/**/*")) == before
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    files = {str(path.relative_to(tmp_path)) for path in before if path.is_file()}
    assert open_folder(tmp_path).tree(behind_links=True).keys() >= files


def test_data_gc_lists_and_deletes_latents_that_no_sweep_uses(sweep: Sweep) -> None:
    unused = small_latents.make(sweep.store / "latents/unused", [4])
    code, output = invoke("data", "gc", str(sweep.store))
    assert (code, f"latents      {unused}: " in output, "to delete them: dis-scale data gc" in output) == (0, True, True)
    assert unused.list()
    found = answer("data", "gc", str(sweep.store), "--yes", "--json")
    assert ([part["url"] for part in found["parts"]], found["deleted"]) == ([unused.url], True)
    assert found["bytes"] > 0
    assert not unused.list()
    assert answer("data", "gc", str(sweep.store), "--json")["parts"] == []
    assert verified(sweep) == []


def test_data_gc_refuses_what_is_no_storage_root(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for root, words in (
        (sweep, f"is a sweep: expected its storage root, {sweep.store}"),
        (tmp_path / "empty", "expected a storage root"),
    ):
        code, output = invoke("data", "gc", str(root), "--yes")
        assert (code, words in output) == (2, True), output


def test_upkeep_is_json_for_programs(sweep: Sweep) -> None:
    assert answer("verify", str(sweep), "--json") == {"damaged": [], "refused": []}
    found = answer("gc", str(sweep), "--json")
    assert {part["kind"] for part in found["parts"]} >= {"samples", "leases", "failed steps"}
    assert not found["deleted"]
