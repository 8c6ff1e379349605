"""The driver when something that it needs is missing or fails; a complete sweep is in tests/e2e."""

import io
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.exceptions import RpcError
from rich.console import Console

from dis_scale import report
from dis_scale.planning import isoflop
from dis_scale.planning.plan import price_sweep
from dis_scale.process.errors import DisScaleError, Held, Preempted, StorageAway, UserError
from dis_scale.recipe import LatentShape, Recipe, Storage, reading
from dis_scale.storage import lease
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.storage.lease import Holder
from dis_scale.sweep import PointName, Sampled, Sweep, state
from dis_scale.sweep.documents import TrackingIds
from pipelines import needs
from pipelines import page as pages
from pipelines import sweep as pipeline
from pipelines.stop import stop_sweep
from pipelines.waiting import Wait
from tests.conftest import TINY
from tests.support import store_requests
from tests.support.commands import invoke
from tests.support.documents import put_evaluated, put_latents, put_metrics, put_published, put_resume_point
from tests.support.drivers import cluster, driver_of, logged
from tests.support.studies import study
from tests.support.waiting import wait_until


def test_a_second_sweep_joins_on_the_same_ray_and_is_refused_on_another(tiny: Recipe, tmp_path: Path) -> None:
    driver, other = driver_of(tiny, tmp_path), psutil.Process().parent()
    assert other
    with lease.hold(open_folder(tmp_path) / "another", "here") as ours:
        holder = Holder.read(ours.folder, "0001").changed(pid=other.pid, started=lease.began(other.pid))
    holder.write(driver.sweep.lease("sweep"), "0001")
    with pipeline.one_at_a_time(driver, cluster("here")):
        assert f"joined   process {other.pid} on " in logged(driver)
    with (
        pytest.raises(Held, match=f"leases/sweep: held by process {other.pid} on .*: one writer at a time"),
        pages.showing_a_stop(driver, price_sweep(tiny, LatentShape(4, 8))),
        pipeline.one_at_a_time(driver, cluster("elsewhere")),
    ):
        pass
    assert not driver.sweep.report.list(), "the page is that of the command that runs"
    assert driver.sweep.folder.list("leases/sweep") == ["0001"]


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_driver_whose_lease_has_a_successor_stops_and_leaves_jobs_that_the_other_has_joined(
    where: str, tiny: Recipe, tmp_path: Path
) -> None:
    """It was suspended, and another process took it for dead."""
    driver, leases = driver_of(tiny, tmp_path), driver_of(tiny, tmp_path).sweep.lease("sweep")
    driver.requests_polled_every_s = 0.05
    with pipeline.one_at_a_time(driver, cluster("here")):
        Holder.read(leases, "0001").changed(cluster=where, pid=1).write(leases, "0002")
        wait_until(driver.stop_requested.is_set)
        assert driver.taken_over == (where == "here")
    assert "taken    another process has taken over this sweep: this one stops" in logged(driver)


def test_a_late_answer_to_a_command_on_a_ray_that_ended_does_not_stop_the_one_on_the_next(tiny: Recipe, tmp_path: Path) -> None:
    driver, leases = driver_of(tiny, tmp_path), driver_of(tiny, tmp_path).sweep.lease("sweep")
    with lease.hold(leases, "here") as before:
        pass
    with pipeline.one_at_a_time(driver, cluster("another")):
        pipeline._obey_request(before, driver, cluster("here"))
        assert not driver.stop_requested.is_set()


def test_a_missing_start_is_refused_before_anything_begins(tmp_path: Path) -> None:
    recipe = reading.load(TINY, [f"models.dit.start={{kind: file, path: nowhere.pt, sha256: '{'0' * 64}'}}"])
    driver, plan = driver_of(recipe, tmp_path), price_sweep(recipe, LatentShape(4, 8))
    with pytest.raises(UserError, match=r"models.dit.start.path: no file nowhere.pt"):
        pipeline.run_stages(driver, plan, driver.sweep.store)
    assert (driver.jobs, driver.sweep.folder.list()) == ([], [])
    put_resume_point(driver.sweep.run("dit").resume_point(PointName(16, 1)))
    pipeline.require_starts(driver.sweep, plan)  # a training that has begun needs its start no more


def test_a_running_sweep_has_its_page_from_the_beginning(tiny: Recipe, tmp_path: Path) -> None:
    driver = driver_of(tiny, tmp_path)
    driver.sweep.report.write(report.CSV, b"of fewer models")
    with pipeline.one_at_a_time(driver, cluster("here")), pages.writing_page(driver, price_sweep(tiny, LatentShape(4, 8))):
        wait_until(lambda: driver.sweep.report.exists(report.PAGE))
    page = driver.sweep.report.read(report.PAGE).decode()
    assert not driver.sweep.report.exists(report.CSV), "it would be taken for all results"
    assert "http-equiv='refresh'" in page, "a command runs"
    assert "0 of 320 images" in page
    assert f"page     {driver.sweep.report}/{report.PAGE}" in logged(driver)


def test_a_page_that_is_being_written_does_not_follow_the_page_of_a_stop(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would say "at work" for ever."""
    driver, begun, written = driver_of(tiny, tmp_path), Event(), list[str]()

    def write(*_: object) -> None:
        begun.set()
        time.sleep(0.5)
        written.append("running")

    monkeypatch.setattr(pages, "write_page", write)
    with pytest.raises(Preempted), pages.writing_page(driver, price_sweep(tiny, LatentShape(4, 8))):
        assert begun.wait(30)
        raise Preempted("stopped")
    assert written == ["running"]


def test_nodes_are_waited_for_though_ray_loses_an_answer(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are asked for twice a second, for days in a drought."""
    driver, answers = driver_of(tiny, tmp_path), [RpcError("unavailable"), {"train": (2, {"CPU": 1.0})}, RpcError("lost"), {}]
    driver.poll_every_s = 0.01

    def lacking(*_: object) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(needs, "_lacking", lacking)
    monkeypatch.setattr(Wait, "poll", lambda *_, **__: "waiting for capacity")
    needs.await_nodes(driver, cluster("here"))
    assert answers == []
    assert logged(driver).count("waiting for capacity") == 1


def test_a_refused_command_leaves_a_page_that_has_stopped(tmp_path: Path) -> None:
    recipe = reading.load(TINY, ["device=cuda", f"storage.root={tmp_path}"])
    sweep = Sweep.below(open_folder(tmp_path), recipe)
    sweep.save_recipe()
    with pytest.raises(UserError, match="device: cuda for 2 workers"):
        pipeline.run_sweep(recipe, Console(file=io.StringIO()))
    assert "http-equiv='refresh'" not in sweep.report.read(report.PAGE).decode()


def test_a_sweep_with_complete_latents_needs_its_images_no_more(tmp_path: Path) -> None:
    """Raw tars are often unmounted after precompute."""
    source = f"data.source={{kind: tar, url: {tmp_path}/gone, label: cls}}"
    driver = driver_of(reading.load(TINY, [source]), tmp_path / "store")
    plan, store = price_sweep(driver.sweep.recipe, LatentShape(4, 8)), driver.sweep.store
    with pytest.raises(UserError, match="gone"):
        pipeline.list_images(driver, plan, store)
    put_latents(store / "latents/0")
    state.use_latents(driver.sweep, store / "latents/0", "v")
    pipeline.list_images(driver, plan, store)
    assert "source   it cannot be listed; its latents are complete, and training continues: data.source.url: no" in logged(driver)


def test_a_stop_request_reaches_a_command_that_has_no_job_yet(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs no Ray and no stored recipe: the command may still list its images or wait for nodes."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    driver = driver_of(tiny, tmp_path)
    driver.requests_polled_every_s = 0.05
    with pipeline.one_at_a_time(driver, cluster("here")):
        assert stop_sweep(str(driver.sweep), None) == [f"process {os.getpid()} on {socket.gethostname()}"]
        wait_until(driver.stop_requested.is_set)
        with pytest.raises(Preempted, match="stopped as requested"):
            pipeline.list_images(driver, price_sweep(tiny, LatentShape(4, 8)), driver.sweep.store)
    with pytest.raises(UserError, match="no sweep at"):
        stop_sweep(str(driver.sweep), None)


def test_a_sweep_that_joins_changes_no_setting_of_the_running_one(tiny: Recipe, tmp_path: Path) -> None:
    running, joining = driver_of(tiny, tmp_path), driver_of(reading.load(TINY, ["train.restarts=100"]), tmp_path)
    joining.first = False
    assert pipeline.store_recipe(running).recipe == tiny
    assert pipeline.store_recipe(joining).recipe == tiny
    assert Sweep.open(str(joining.sweep)).recipe == tiny
    assert "that of the running sweep counts" in logged(joining)
    more = driver_of(reading.load(TINY, ["models.more={kind: dit, width: 16, depth: 1, heads: 2, patch: 4}"]), tmp_path)
    with pytest.raises(UserError, match="is running with other models"):
        more.first = False
        pipeline.store_recipe(more)
    joining.first = True
    assert pipeline.store_recipe(joining).recipe.train.restarts == 100
    assert Sweep.open(str(joining.sweep)).recipe.train.restarts == 100


def test_an_unreachable_mlflow_is_logged_and_stops_nothing(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    driver, plan = driver_of(tiny, tmp_path), price_sweep(tiny, LatentShape(4, 8))
    driver.first = True
    assert not pipeline.begin_tracking(driver, plan, "http://127.0.0.1:1")
    assert "MLflow cannot be reached at http://127.0.0.1:1, results are in storage only: " in logged(driver)


def test_a_command_that_joins_makes_no_database(tiny: Recipe, tmp_path: Path) -> None:
    """One that was deleted beside running jobs would be made again, and damaged if two commands do."""
    driver, plan, database = driver_of(tiny, tmp_path), price_sweep(tiny, LatentShape(4, 8)), tmp_path / "mlflow.db"
    for driver.first in (False, True):
        assert pipeline.begin_tracking(driver, plan, f"sqlite:///{database}")
        assert database.exists() == driver.first


def test_the_address_of_the_charts_is_printed() -> None:
    """MLflow's own form, with the models' charts; seen in its version 3.17."""
    charts = "#/experiments/7/runs?orderByKey=tags.%60mlflow.runName%60&orderByAsc=true&compareRunsMode=CHART"
    assert pipeline.mlflow_lines(TrackingIds(uri="http://mlflow:5000/", experiment="7", sweep="a")) == [
        f"http://mlflow:5000/{charts}"
    ]
    command, address = pipeline.mlflow_lines(TrackingIds(uri="sqlite:///outputs/mlflow.db", experiment="7", sweep="a"))
    assert command.endswith("mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db")
    assert address == f"http://127.0.0.1:5000/{charts}"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.source={kind: folder, url: /nowhere}"], "no images in class folders below /nowhere"),
        (
            ["evaluate.extractor={kind: inception, weights: /nowhere.pth}", "evaluate.samples=2100"],
            "cannot read /nowhere.pth; get https://",
        ),
    ],
)
def test_missing_inputs_are_refused_before_the_sweep_is_stored(tmp_path: Path, settings: list[str], words: str) -> None:
    recipe = reading.load(TINY, [*settings, f"storage.root={tmp_path}"])
    with pytest.raises(UserError, match=words):
        pipeline.run_sweep(recipe, Console(file=io.StringIO()))
    assert not (tmp_path / "sweeps").exists()


def test_a_stored_recipe_of_another_identity_is_refused_with_the_difference(tiny: Recipe, tmp_path: Path) -> None:
    Sweep.below(open_folder(tmp_path), tiny).save_recipe()
    other = reading.load(TINY, ["seed=5", f"storage.root={tmp_path}"])
    with pytest.raises(UserError, match=r"was begun with another recipe; .*\n  seed: stored 0, given 5"):
        pipeline.run_sweep(other, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ("models.second={kind: dit, width: 64, depth: 2, heads: 2, patch: 2}", r"models.second.width: stored 32, given 64"),
        ("evaluate.variants={few: {steps: 4}}", r"evaluate.variants.few.steps: stored 2, given 4"),
    ],
)
def test_a_model_or_a_variant_that_comes_back_is_as_it_was(added: str, words: str, tmp_path: Path) -> None:
    """Its files were taken for those of the new one: a curve of other sizes with the old distances, and nobody said so."""
    root, few = f"storage.root={tmp_path}", "evaluate.variants={few: {steps: 2}}"
    second = "models.second={kind: dit, width: 32, depth: 2, heads: 2, patch: 2}"
    begun = reading.load(TINY, [root, second, few])
    for recipe in (begun, reading.load(TINY, [root]), reading.load(TINY, [root, "data.undecodable=skip"])):
        sweep = Sweep.below(open_folder(tmp_path), recipe)
        assert not sweep.differences()
        sweep.save_recipe()
    with pytest.raises(UserError, match=rf"was begun with another recipe; .*\n  {words}"):
        pipeline.run_sweep(reading.load(TINY, [root, added]), Console(file=io.StringIO()))
    assert not Sweep.below(open_folder(tmp_path), begun).differences()


def test_a_study_is_written_out_before_it_is_compared_with_the_stored_one(tmp_path: Path) -> None:
    begun, root = isoflop.written_out(study(), LatentShape(4, 8)), f"storage.root={tmp_path}"
    Sweep.below(open_folder(tmp_path), begun).save_recipe()
    with pytest.raises(UserError, match=r"isoflop.share: stored 0.25, given 0.2\n.*models.dis-at-\d+.branch.at: stored"):
        pipeline.run_sweep(study(root, "isoflop.share=0.2"), Console(file=io.StringIO()))


AWAY = ConnectionError("connection refused")


@pytest.mark.parametrize("resumed", [False, True])
def test_storage_that_is_away_at_the_start_is_waited_for(tmp_path: Path, no_pauses: None, resumed: bool) -> None:
    settings = ["data.source={kind: folder, url: /nowhere}", f"storage.root={tmp_path}"]
    recipe = reading.load(TINY, settings)
    Sweep.below(open_folder(tmp_path), recipe).save_recipe()
    arguments = ["resume", f"{tmp_path}/sweeps/tiny"] if resumed else ["sweep", str(TINY), "--set", settings[0]]
    with store_requests.failing(AWAY, times=10):
        code, output = invoke(*arguments, *([] if resumed else ["--set", settings[1]]))
    assert "waiting  storage does not answer" in output
    assert (code, "no images in class folders below /nowhere" in output) == (2, True), "it came to the next check"


@pytest.mark.parametrize("command", ["sweep", "resume"])
def test_storage_that_stays_away_is_not_a_mistake(tmp_path: Path, no_pauses: None, command: str) -> None:
    where = ["resume", f"{tmp_path}/sweeps/tiny"]
    sweep = ["sweep", str(TINY), "--set", f"storage.root={tmp_path}"]
    with store_requests.failing(AWAY) as failed:
        code, output = invoke(*(sweep if command == "sweep" else where))
    assert code == StorageAway.exit_code
    assert "error: cannot list" in output
    assert len(failed) == 5 + 9, "the tries of a command, then those of a stage"


def test_storage_that_goes_away_in_the_probe_is_not_a_mistake(tmp_path: Path, no_pauses: None) -> None:
    with store_requests.failing(AWAY), pytest.raises(StorageAway, match="cannot create"):
        open_folder(tmp_path).require_usable()


def test_deleted_weights_that_were_never_evaluated_are_a_failure(tiny: Recipe, tmp_path: Path) -> None:
    sweep = driver_of(tiny, tmp_path).sweep
    for count in (0, 320):
        put_published(sweep.run("dit").published_at(count))
    assert state.lost_evaluations(sweep) == [Sampled("dit", 160)]
    put_metrics(sweep.evaluation(Sampled("dit", 160)))
    assert state.lost_evaluations(sweep) == [], "evaluated before they were deleted"


def test_deleted_weights_are_named_at_the_next_start(tiny: Recipe, tmp_path: Path) -> None:
    """Also of a sweep in which nothing is left to do."""
    sweep = driver_of(tiny.model_copy(update={"storage": Storage(root=str(tmp_path))}), tmp_path).sweep
    console = Console(file=io.StringIO(), width=200, record=True)
    sweep.save_recipe()
    for count in (0, 320):
        put_published(sweep.run("dit").published_at(count))
    put_evaluated(sweep)
    sweep.report.write(report.CSV, b"")
    pipeline.run_sweep(sweep.recipe, console)
    shown = console.export_text()
    assert "missing  dit at 160 images: its published weights were deleted, and only training makes them" in shown
    assert "nothing to do" in shown


def test_a_change_that_needs_no_job_is_taken_when_nothing_is_to_do(tiny: Recipe, tmp_path: Path) -> None:
    """A model that was removed leaves the stored recipe and the report."""
    recipe = tiny.model_copy(update={"storage": Storage(root=str(tmp_path))})
    sweep = driver_of(recipe, tmp_path).sweep
    sweep.save_recipe()
    put_evaluated(sweep)
    sweep.report.write(report.CSV, b"")
    pipeline.run_sweep(recipe.model_copy(update={"models": {"dit": tiny.models["dit"]}}), Console(file=io.StringIO()))
    assert list(Sweep.open(sweep.folder.url).recipe.models) == ["dit"]
    assert {row.partition(b",")[0] for row in sweep.report.read(report.CSV).splitlines()[1:]} == {b"dit"}


def test_all_images_held_out_are_refused_before_anything_is_spent(tmp_path: Path) -> None:
    driver = driver_of(reading.load(TINY, ["data.held_out_images=1797"]), tmp_path)
    plan = price_sweep(driver.sweep.recipe, LatentShape(4, 8))
    with pytest.raises(UserError, match=r"data.held_out_images: 1,797 of 1,797 images would leave none to train on"):
        pipeline.list_images(driver, plan, open_folder(tmp_path))


def test_a_cooldown_whose_trunk_has_decayed_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    """One that begins before the decay is sound, and a training that has begun is not asked."""
    decaying = ["train.decay=linear", "train.decay_from=0.5"]  # of 320 images
    sound = driver_of(reading.load(TINY, [*decaying, "train.cooldowns={images: [160]}"]), tmp_path)
    plan = price_sweep(sound.sweep.recipe, LatentShape(4, 8))
    pipeline.require_starts(sound.sweep, plan)
    late = driver_of(reading.load(TINY, [*decaying, "train.cooldowns={images: [320]}"]), tmp_path)
    words = r"models.dis-at-320.branch: at 256 images the rate of dis has decayed to 40%, and this one would begin at 100%"
    with pytest.raises(UserError, match=words):
        pipeline.require_starts(late.sweep, plan)


@pytest.mark.parametrize("error", [Preempted("stopped"), UserError("a mistake")])
def test_a_stop_keeps_its_reason_though_storage_is_away(tiny: Recipe, error: DisScaleError) -> None:
    """Its code decides whether KubeRay and Slurm begin again."""

    def away(_: str) -> bool:
        raise StorageAway("no answer")

    driver: Any = SimpleNamespace(first=True, stop_shown=False, sweep=SimpleNamespace(folder=SimpleNamespace(exists=away)))
    with pytest.raises(type(error)), pages.showing_a_stop(driver, price_sweep(tiny, LatentShape(4, 8))):
        raise error


@pytest.fixture
def refusing(tmp_path: Path) -> Folder:
    """A folder in a store that has allowed nothing before."""
    return open_folder(f"memory://{tmp_path.name}")


@pytest.mark.parametrize(
    ("job", "error", "asked"),
    [(True, PermissionError("no key yet"), 4), (True, OSError("no such bucket"), 1), (False, PermissionError("wrong key"), 1)],
)
def test_a_job_waits_for_its_key_and_for_no_other_mistake(
    refusing: Folder, monkeypatch: pytest.MonkeyPatch, job: bool, error: Exception, asked: int
) -> None:
    """A service that hands out keys may be away while a new head begins: that ended a sweep of weeks as a mistake."""
    monkeypatch.setattr(pipeline, "ASK_REFUSED_EVERY_S", 0.0)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    console = Console(file=io.StringIO(), width=200, record=True)
    with store_requests.failing(error, times=4) as failed:
        if asked == 4:
            pipeline.await_storage(refusing, console)
        else:
            with pytest.raises(UserError, match="storage cannot be used"):
                pipeline.await_storage(refusing, console)
    assert len(failed) == asked
    assert console.export_text().count("storage refuses the key, asked again for 10 minutes") == (asked == 4)


def test_a_job_whose_key_does_not_come_ends_as_a_mistake(refusing: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "REFUSED_S", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with store_requests.failing(PermissionError("no key")) as failed, pytest.raises(UserError, match="permission denied"):
        pipeline.await_storage(refusing, Console(file=io.StringIO()))
    assert len(failed) == 1


def test_a_stop_ends_the_wait_for_a_key(refusing: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def refuse(_: str, __: str) -> None:
        signal.raise_signal(signal.SIGINT)
        raise PermissionError("no key yet")

    with store_requests.before_each(refuse), pytest.raises(Preempted, match="stopped as requested, before the sweep began"):
        pipeline.await_storage(refusing, Console(file=io.StringIO()))


def test_a_stop_while_storage_is_away_is_a_stop(refusing: Folder, monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> None:
    """Slurm would queue the job again, or count it as failed."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    signals = iter([signal.SIGTERM])

    def away(_: str, __: str) -> None:
        if number := next(signals, None):
            signal.raise_signal(number)
        raise AWAY

    with store_requests.before_each(away), pytest.raises(Preempted):
        pipeline.await_storage(refusing, Console(file=io.StringIO()))


def test_a_run_on_gpus_continues_on_the_cpu_only_if_asked(tiny: Recipe, tmp_path: Path) -> None:
    driver, model = driver_of(tiny, tmp_path), next(iter(tiny.models))
    needs.require_device(driver, cluster("here"))
    state.record_device(driver.sweep.run(model), "cuda")
    with pytest.raises(UserError, match=r"last trained on GPUs, and would continue on the CPU \(auto: 0 GPUs"):
        needs.require_device(driver, cluster("here"))
    asked = driver_of(reading.load(TINY, ["device=cpu"]), tmp_path)
    needs.require_device(asked, cluster("here"))
    state.record_device(driver.sweep.run(model), "cpu")
    needs.require_device(driver, cluster("here"))


@pytest.mark.parametrize(("device", "logged_fault"), [("auto", True), ("cpu", False)])
def test_gpus_that_cannot_be_used_are_named_with_the_device(tmp_path: Path, device: str, logged_fault: bool) -> None:
    driver = driver_of(reading.load(TINY, [f"device={device}"]), tmp_path)
    needs.require_device(driver, replace(cluster("here"), gpu_fault="1 NVIDIA GPUs cannot be used: too old"))
    assert ("1 NVIDIA GPUs cannot be used: too old" in logged(driver)) == logged_fault


def test_a_cluster_with_gpus_does_not_need_those_of_this_machine(tmp_path: Path) -> None:
    driver = driver_of(reading.load(TINY, ["device=auto"]), tmp_path)
    faulty = replace(cluster("far"), gpus=lambda: 8, gpu_fault="1 NVIDIA GPUs cannot be used: too old")
    needs.require_device(driver, faulty)
    assert "device   cuda (" in logged(driver)
    assert "too old" not in logged(driver)
    needs.require_device(driver, replace(faulty, gpus=lambda: 0))
    assert "too old" in logged(driver)


def test_a_gpu_that_is_too_small_is_refused_before_anything_is_spent(tiny: Recipe) -> None:
    plan, gpus = price_sweep(tiny, LatentShape(4, 8)), replace(cluster("here"), gpus=lambda: 2, gpu_bytes=lambda: 2**30)
    needs.require_fits(plan, gpus)
    needs.require_fits(plan, replace(gpus, gpus=lambda: 0, gpu_bytes=lambda: 2**20))  # on the CPU
    with pytest.raises(UserError, match=r"dis: a worker needs 0\.0 GiB for 4 images in a forward pass"):
        needs.require_fits(plan, replace(gpus, gpu_bytes=lambda: 2**20))


@pytest.mark.parametrize(("own", "shared"), [(-3, 0.2), (0, 0.2), (3, 0.2), (4, 0.0)])
def test_training_leaves_one_evaluators_share_unless_each_has_a_gpu(own: int, shared: float) -> None:
    recipe = reading.load(TINY, ["evaluate.workers=4", "evaluate.gpu_share=0.2"])
    assert recipe.evaluate.shared(own) == shared
