"""What a sweep does, from its storage alone."""

import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dis_scale.api import StoredSweep
from dis_scale.cli import main
from dis_scale.process.errors import StorageAway
from dis_scale.recipe import Recipe, reading
from dis_scale.recipe.evaluate import Autoguidance
from dis_scale.recipe.reading import with_model
from dis_scale.storage import lease, manifest
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.storage.lease import Holder
from dis_scale.sweep import RECIPE, PointName, Sampled, Sweep, state
from dis_scale.sweep.documents import Ended, Metrics, Origin, StageProgress
from dis_scale.tracking.rows import RowWriter
from dis_scale.upkeep import status
from dis_scale.upkeep.status import RunStatus, Status
from tests.conftest import TINY
from tests.support import store_requests
from tests.support.clock_store import ClockFileSystem
from tests.support.commands import answer, invoke
from tests.support.documents import put_latents, put_metrics, put_prepared, put_published, put_resume_point
from tests.support.waiting import wait_until

NOW = 2e9


@pytest.fixture
def sweep(tmp_path: Path, tiny: Recipe) -> Sweep:
    made = Sweep.below(open_folder(tmp_path), tiny)
    made.save_recipe()
    return made


def test_all_sweeps_of_a_root_are_listed_by_their_whole_names(tmp_path: Path, tiny: Recipe) -> None:
    """In 80 columns, which the names are copied from."""
    names = ["tiny", "flowers-of-our-garden-in-summer-at-64-px"]
    for name in names:
        Sweep.below(open_folder(tmp_path / ("a" * 60)), tiny.model_copy(update={"name": name})).save_recipe()
    console = Console(file=io.StringIO(), width=80)
    root = open_folder(tmp_path / ("a" * 60)) / "sweeps"
    console.print(status.overview([status.collect(Sweep.open(str(root / name)), NOW) for name in names]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    folded = "".join(line.split("  ")[0].strip() for line in shown.splitlines()[5:])
    assert shown.replace("\n", "").startswith(f"below {root}/")
    assert [name for name in names if name not in folded] == []


def train(sweep: Sweep, model: str, images: int, rate: float = 10.0, attempt: int = 1) -> None:
    """What a run leaves after `images`: a row now, a resume point 100 s old."""
    run = sweep.run(model)
    writer = RowWriter(run.log, attempt)
    writer.add(images, {"loss": 1.0, "images_per_s": rate})
    writer.settle()
    put_resume_point(run.resume_point(PointName(images // 2, attempt)), images=images // 2, at=time.time() - 100)


@pytest.fixture
def held(sweep: Sweep) -> Iterator[None]:
    """A sweep command runs, and the run of `dis` has a holder."""
    with lease.hold(sweep.lease("sweep")), lease.hold(sweep.run("dis").lease):
        yield


def die(folder: Folder, last_beat: float, number: int = 1) -> None:
    """Leave a holder of another machine, whose last heartbeat was at this Unix time."""
    Holder(host="gone", pid=7, at=last_beat - 60).write(folder, f"{number:04d}")
    folder.write(f"{number:04d}.beat", f"12 {last_beat:.0f}".encode())


def of(sweep: Sweep, model: str, later_s: float = 0.0) -> tuple[Status, RunStatus]:
    found = status.collect(sweep, time.time() + later_s)
    return found, next(run for run in found.runs if run.model == model)


def test_a_sweep_that_has_not_begun(sweep: Sweep) -> None:
    found, run = of(sweep, "dis")
    assert (found.doing, found.stopped, found.backlog) == ("preparing", "no sweep command has run yet", 0)
    assert (run.doing, run.images_seen, run.attempts, run.published) == ("waiting", 0, 0, 0)
    assert found.wrong == [f"stopped: no sweep command has run yet; to continue: dis-scale resume {sweep}"]


def test_a_laptop_whose_clock_is_an_hour_ahead_calls_no_live_sweep_stopped(
    tiny: Recipe, fast_beats: None, clock_store: type[ClockFileSystem]
) -> None:
    clock_store.ahead_s = -3600.0
    sweep = Sweep.below(open_folder("clock://root"), tiny)
    sweep.save_recipe()
    with lease.hold(sweep.lease("sweep")):
        wait_until(lambda: sweep.lease("sweep").exists("0001.beat"))
        assert "no heartbeat" not in invoke("status", sweep.folder.url)[1]
        assert StoredSweep(sweep).state().stopped == ""
        with pytest.raises(KeyboardInterrupt):
            status.watch(sweep, 0.01, console := Once(file=io.StringIO(), width=200))
    assert isinstance(console.file, io.StringIO)
    assert "no heartbeat" not in console.file.getvalue()


class Once(Console):
    """Shows one page."""

    def print(self, *page: Any, **how: Any) -> None:
        super().print(*page, **how)
        raise KeyboardInterrupt


def test_a_stage_before_training_tells_how_far_it_is(sweep: Sweep) -> None:
    StageProgress(stage="prepare", done=347, total=4200, unit="steps", at=time.time() - 90).write(sweep.folder)
    found, _ = of(sweep, "dis")
    assert found.stage == "prepare 347 of 4,200 steps, 90 s ago"
    assert " ".join(found.stage.split()[:3]) in " ".join(printed(found).split())


@pytest.mark.parametrize(
    ("began_s", "progress_s", "silent"),
    [(7200, None, True), (7200, 6000, True), (7200, 60, False), (60, None, False), (60, 6000, False)],
)
@pytest.mark.parametrize("stage", ["prepare", "precompute", "evaluate"])
def test_a_stage_that_hangs_is_named(sweep: Sweep, stage: str, began_s: float, progress_s: float | None, silent: bool) -> None:
    """Its process lives, and its own watch has not helped. Evaluation that has nothing to do does not hang."""
    if stage != "prepare":
        put_prepared(sweep)
    if stage == "evaluate":
        state.use_latents(sweep, latents := sweep.store / "latents/made", put_latents(latents).encoding.identity)
    now = time.time()
    for name in ("sweep", stage):
        Holder(host="there", pid=7, at=now - began_s).write(sweep.lease(name), "0001")
        sweep.lease(name).write("0001.beat", f"9 {now:.0f}".encode())
    if progress_s:
        StageProgress(stage=stage, done=3, total=40, unit="images", at=now - progress_s).write(sweep.folder)
    if stage == "evaluate":
        assert of(sweep, "dis")[0].wrong == []
        put_published(sweep.run("dis").published_at(sweep.recipe.train_of("dis").publish_images[0]))
    line = f"{stage}: no progress for .*, and process 7 on there is alive: it waits for capacity or hangs; dis-scale logs "
    assert [bool(re.match(line, wrong)) for wrong in of(sweep, "dis")[0].wrong] == [True] * silent


def test_a_command_that_waits_for_the_nodes_of_its_encoders_is_not_silent(sweep: Sweep) -> None:
    """For hours, where capacity is scarce."""
    put_prepared(sweep)
    now = time.time()
    for name in ("sweep", "precompute"):
        Holder(host="there", pid=7, at=now - 9000).write(sweep.lease(name), "0001")
        sweep.lease(name).write("0001.beat", f"9 {now:.0f}".encode())
    StageProgress(stage="prepare", done=40, total=40, unit="images", at=now - 8000).write(sweep.folder)
    assert of(sweep, "dis")[0].wrong == []


def test_all_sweeps_below_a_root_are_listed_and_checked(sweep: Sweep, tmp_path: Path, tiny: Recipe) -> None:
    other = Sweep.below(open_folder(tmp_path), tiny.model_copy(update={"name": "other"}))
    other.save_recipe()
    with lease.hold(other.lease("sweep")):
        code, output = invoke("status", str(tmp_path), "--check")
        listed = answer("status", str(tmp_path), "--json")
    assert (code, f"{sweep}: stopped: no sweep command has run yet" in output) == (1, True)
    assert [(each["sweep"], bool(each["stopped"])) for each in listed] == [(str(other), False), (str(sweep), True)]
    assert [each["sweep"] for each in answer("status", str(tmp_path / "sweeps"), "--json")] == [str(other), str(sweep)]
    other.folder.write(RECIPE, b"name: [")
    code, output = invoke("status", str(tmp_path), "--check")
    assert (code, f"not read: {other}/recipe.yaml" in output, "and 1 more" in output) == (1, True, True)
    (readable,) = answer("status", str(tmp_path), "--json")
    assert readable["sweep"] == str(sweep), "one that cannot be read hides no other"
    other.folder.delete(RECIPE)
    other.folder.write("latents.json", b"{}")
    code, output = invoke("status", str(tmp_path), "--check")
    assert (code, f"{other}: its recipe.yaml is gone: restore it from a backup" in output) == (1, True)
    assert f"not read: {other}: its recipe.yaml is gone" in invoke("status", str(tmp_path))[1]
    code, output = invoke("status", f"{sweep}y")
    assert (code, "no sweep at" in output, "(did you mean 'tiny'?)" in output) == (2, True, True)


def test_a_check_fails_while_something_is_wrong(sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped, or with a damaged file; not while it works, nor when it is done."""
    check = ["status", sweep.folder.url, "--check"]
    with pytest.raises(SystemExit) as end:
        main(check)
    assert end.value.code == 1
    assert f"error: {sweep}: stopped: no sweep command has run yet; to continue: " in capsys.readouterr().err
    with lease.hold(sweep.lease("sweep")):
        with pytest.raises(SystemExit) as end:
            main(check)
        assert end.value.code == 0
    for model in sweep.recipe.models:
        for images in sweep.recipe.train_of(model).publish_images:
            put_published(sweep.run(model).published_at(images))
            for variant in sweep.recipe.evaluate.samplings:
                put_metrics(sweep.evaluation(Sampled(model, images, variant)))
    with pytest.raises(SystemExit) as end:
        main(check)
    assert end.value.code == 0


def test_a_run_in_training_tells_its_rate_and_what_a_failure_would_cost(sweep: Sweep, held: None) -> None:
    train(sweep, "dis", 160)
    found, run = of(sweep, "dis")
    assert found.doing == "training"
    assert (run.doing, run.images_seen, run.images, run.resume_images) == ("training", 160, 320, 80)
    assert run.left_s == pytest.approx(16)
    assert run.resume_age_s == pytest.approx(100, abs=30)
    assert "process" in run.holder
    assert "16 s" in printed(found)


def test_a_run_that_says_nothing_is_named(sweep: Sweep, held: None) -> None:
    train(sweep, "dis", 160)
    lease_, now = sweep.run("dis").lease, time.time()
    for folder in (lease_, sweep.lease("sweep")):
        folder.write("0001.beat", f"200 {now + 1000:.0f}".encode())
    found, run = of(sweep, "dis", later_s=1000)
    assert run.doing == "silent"
    assert found.wrong[0].startswith("dis: no metric row for 17 min, and process")


def test_a_run_of_slow_steps_is_not_silent(sweep: Sweep, held: None) -> None:
    """Rows come after ten steps: with one in 32 s each check of an hour would fail now and then, and page."""
    train(sweep, "dis", 160, rate=0.5)
    lease_, now = sweep.run("dis").lease, time.time()
    for folder in (lease_, sweep.lease("sweep")):
        folder.write("0001.beat", f"200 {now + 1000:.0f}".encode())
    assert [of(sweep, "dis", later_s=later_s)[1].doing for later_s in (600, 700)] == ["training", "silent"]


def test_why_the_last_attempt_ended_is_told(sweep: Sweep) -> None:
    with pytest.raises(ConnectionError), lease.hold(sweep.run("dis").lease):
        raise ConnectionError("a worker was lost")
    train(sweep, "dis", 160)
    found, run = of(sweep, "dis")
    assert (run.doing, run.attempts) == ("stopped", 1)
    assert run.ends == ["attempt 1 ended: ConnectionError: a worker was lost"]
    assert "dis: stopped at 160 images" in found.wrong
    assert "dis: attempt 1 ended: ConnectionError: a worker was lost" in printed(found)
    Ended(why="it diverged").write(sweep.run("dis").folder)
    assert of(sweep, "dis")[1].doing == "failed"
    assert "dis: ended: it diverged; the next sweep command trains it again" in of(sweep, "dis")[0].wrong


def test_a_model_that_failed_does_not_fail_the_checks_of_the_weeks_in_which_the_others_train(sweep: Sweep) -> None:
    """It has an alert of its own; a check that fails all the time would hide what comes next."""
    why = "dis: ended: it diverged; the next sweep command trains it again"
    with lease.hold(sweep.lease("sweep")):
        Ended(why="it diverged").write(sweep.run("dis").folder)
        found, _ = of(sweep, "dis")
        assert (found.wrong, found.known) == ([], [why])
        assert why in printed(found)
    assert why in of(sweep, "dis")[0].wrong, "nobody continues"


def test_a_run_whose_head_was_lost_waits_for_capacity_under_the_next_command(sweep: Sweep) -> None:
    """For days in a drought: a check that fails meanwhile would page."""
    train(sweep, "dis", 160)
    die(sweep.run("dis").lease, time.time() - 10_000)
    with lease.hold(sweep.lease("sweep")):
        found, run = of(sweep, "dis")
    assert (run.doing, found.wrong) == ("waiting", [])
    with lease.hold(sweep.lease("sweep")):
        Holder(host="gone", pid=7, at=time.time() + 60).write(sweep.run("dis").lease, "0002")
        found, run = of(sweep, "dis", later_s=10_000)
    assert run.doing == "stopped", "it died under this command"


@pytest.mark.parametrize(("excluded", "later_s", "wrong"), [(True, 6000, True), (True, 60, False), (False, 6000, False)])
def test_a_failing_gpu_on_the_only_node_is_wrong_after_a_while(sweep: Sweep, excluded: bool, later_s: float, wrong: bool) -> None:
    """A hundred attempts half an hour apart take two days, then the next model's begin."""
    train(sweep, "dis", 160)
    die(sweep.run("dis").lease, time.time() - 60)
    for _ in range(2 * excluded):
        state.record_node_failure(sweep.failed_nodes("train", "dis"), "node-7", "ECC")
    with lease.hold(command := sweep.lease("sweep")):
        command.write("0001.beat", f"200 {time.time() + later_s:.0f}".encode())
        found, _ = of(sweep, "dis", later_s)
    assert [line[:21] for line in found.wrong] == ["no step for 100 min, "] * wrong


def test_dead_processes_are_named_with_what_to_type(sweep: Sweep) -> None:
    train(sweep, "dis", 160)
    for folder in (sweep.lease("sweep"), sweep.run("dis").lease):
        die(folder, time.time() - 720)
    found, run = of(sweep, "dis")
    assert (run.doing, found.doing) == ("stopped", "training")
    assert found.wrong[:2] == [
        f"stopped: no heartbeat for 12 min from process 7 on gone; to continue: dis-scale resume {sweep}",
        "dis: stopped at 160 images; no heartbeat for 12 min from process 7 on gone",
    ]
    assert "stopped (training)" in printed(found)


def test_an_evaluation_without_its_processes_is_stopped(sweep: Sweep) -> None:
    for model in sweep.recipe.models:
        put_published(sweep.run(model).published_at(320), images=320)
    for name in ("sweep", "evaluate"):
        die(sweep.lease(name), time.time() - 720)
    found, _ = of(sweep, "dis")
    assert (found.doing, found.stopped) == ("evaluating", "no heartbeat for 12 min from process 7 on gone")
    with lease.hold(sweep.lease("evaluate")):
        found, _ = of(sweep, "dis")
    assert found.stopped == ""
    cure = f"dis-scale resume {sweep} joins them, or ends those of a killed command"
    assert found.wrong[0] == f"no sweep command runs, and its jobs do: {cure}"
    assert "run by" not in printed(found), "one thing is shown"


def test_a_process_that_was_killed_on_this_machine_is_not_waited_for(sweep: Sweep) -> None:
    with lease.hold(sweep.lease("sweep")):
        holder = Holder.read(sweep.lease("sweep"), "0001")
        holder.changed(started=1.0).write(sweep.lease("sweep"), "0001")
        assert of(sweep, "dis")[0].stopped.startswith("no heartbeat for 0 s from process")
        with lease.hold(sweep.lease("evaluate")):
            found, _ = of(sweep, "dis")
        cure = f"the command was killed; dis-scale resume {sweep} continues"
        assert found.wrong[0] == f"no sweep command runs, and its jobs do: {cure}"


def test_a_model_that_waits_for_its_turn_is_not_stopped(sweep: Sweep, held: None) -> None:
    with lease.hold(sweep.run("dit").lease):
        pass
    assert of(sweep, "dit")[1].doing == "waiting"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"7"])
def test_damaged_files_are_named_and_the_rest_is_shown(sweep: Sweep, content: bytes) -> None:
    """Each file that may be damaged, one after the other, with the rest of the sweep in order."""
    train(sweep, "dis", 160)
    train(sweep, "dit", 160)
    put_published(sweep.run("dis").published_at(160), images=160)
    evaluation = sweep.evaluation(Sampled("dis", 160))
    put_metrics(evaluation)
    with lease.hold(sweep.run("dis").lease), lease.hold(sweep.lease("sweep")):
        pass
    run = sweep.run("dis")
    files = [
        (evaluation, Metrics.NAME, "evaluation of dis at 160 images"),
        (run.lease, "0001", str(run.lease)),
        (sweep.lease("sweep"), "0001", str(sweep.lease("sweep"))),
        (run.resume_point(PointName(80, 1)), manifest.NAME, "dis: resume point 000000000080-0001"),
    ]
    if content not in (b"", b"{}"):  # an empty file is one without rows, and of an older version of a lease
        files += [(run.log, "0001-000000.jsonl", str(run.log)), (run.lease, "0001.end", str(run.lease))]
    for folder, name, words in files:
        before = folder.read(name)
        folder.write(name, content)
        found, other = of(sweep, "dit")
        assert re.match(rf"{words}.*(cannot be read: |: damaged: )", found.wrong[-1])
        assert other.images_seen == 160
        json.dumps(asdict(found))
        folder.write(name, before)


def test_storage_that_is_away_does_not_end_the_watch(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[BaseException | None] = [None, StorageAway("storage is away"), None, KeyboardInterrupt()]
    collect = status.collect

    def answer(*arguments: Any) -> Status:
        error = answers.pop(0)
        if isinstance(error, StorageAway):  # meanwhile a run is forked
            replace(sweep, recipe=with_model(sweep.recipe, "forked", sweep.recipe.models["dit"])).save_recipe()
        if error:
            raise error
        return collect(*arguments)

    monkeypatch.setattr(status, "collect", answer)
    console = Console(file=(out := io.StringIO()), width=200, record=True)
    with pytest.raises(KeyboardInterrupt):
        status.watch(sweep, 0.01, console)
    assert answers == []
    text = console.export_text()
    assert text.count("dis") > 2, "each is printed without a terminal"
    assert "\x1b" not in out.getvalue()
    assert text.index("dis") < text.index("storage is away; asked again in") < min(text.rindex("dis"), text.index("forked"))


def test_the_backlog_of_evaluation_and_the_last_distance_are_told(sweep: Sweep) -> None:
    for images in (0, 160, 320):
        put_published(sweep.run("dis").published_at(images), images=images)
    values = {sweep.recipe.evaluate.metric: 12.5}
    put_metrics(sweep.evaluation(Sampled("dis", 160)), values)
    for node in ("node-7", "node-8", "node-7"):
        state.record_node_failure(sweep.failed_nodes("train", "dit"), node, "ECC")
    found, run = of(sweep, "dis")
    assert run.backlog == len(state.Backlog(sweep, ("dis",)).left())
    assert (run.doing, run.published, run.evaluated, run.metric) == ("trained", 3, 1, 12.5)
    assert found.backlog == len(state.Backlog(sweep).left()) > 0
    assert found.known == ["node-7: excluded after failures of its devices; see ops/runbooks/bad-gpu-or-node.md"]
    assert "node-7" not in "".join(found.wrong), "a sweep that continues without it needs nobody at night"
    assert json.loads(json.dumps(asdict(found)))["runs"][0]["metric"] == 12.5


def test_copies_and_what_waits_for_its_guide_are_not_evaluated(sweep: Sweep) -> None:
    """They were taken for evaluated, and their metrics, which nothing makes, for damaged."""
    put_published(sweep.run("dis").published_at(160))
    Origin(model="dit", images=160, resume_point="000000000160-0001").write(sweep.run("dis").folder)
    (run,) = (run for run in status.collect(sweep, NOW).runs if run.model == "dis")
    assert (run.published, run.evaluated, run.backlog) == (0, 0, 0)
    guided = sweep.recipe.evaluate.model_copy(update={"guidance": Autoguidance(by="dit", images=320, scale=2.0), "variants": {}})
    guides = replace(sweep, recipe=sweep.recipe.model_copy(update={"evaluate": guided}))
    sweep.run("dis").folder.delete(Origin.NAME)
    found = status.collect(guides, NOW)
    (run,) = (run for run in found.runs if run.model == "dis")
    assert (run.published, run.evaluated, run.metric) == (1, 0, None)
    assert not any("cannot be read" in line for line in found.wrong)


def test_a_thousand_checkpoints_are_told_in_seconds_at_30_ms_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: requests one after the other, at 16 at a time."""
    counts = list(range(0, 16_000, 16))
    sweep = Sweep.below(open_folder(tmp_path), reading.load(TINY, [f"train.publish_images={counts}", "evaluate.variants={}"]))
    sweep.save_recipe()
    for model in sweep.recipe.models:
        for images in counts:
            (tmp_path / f"sweeps/tiny/runs/{model}/published/{images:012d}").mkdir(parents=True)
            (tmp_path / f"sweeps/tiny/evaluation/{model}/{images:012d}").mkdir(parents=True)
            (tmp_path / f"sweeps/tiny/runs/{model}/published/{images:012d}/manifest.json").touch()
            (tmp_path / f"sweeps/tiny/evaluation/{model}/{images:012d}/metrics.json").write_text('{"values": {}}')
    with store_requests.noted() as requests:
        assert all(run.evaluated == 1000 for run in status.collect(sweep, NOW).runs)
    assert len(requests) / 32 * 0.03 < 15, "two models, and their requests overlap"


def printed(found: Status) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(status.table(found))
    return capture.get()


def test_all_columns_fit_a_terminal_of_80(sweep: Sweep) -> None:
    console, (found, run) = Console(width=80), of(sweep, "dis")
    large = replace(
        run, model="dis-s-seed-2", doing="training", images_seen=51_234_567, images=102_400_000, images_per_s=1234.5,
        left_s=4e4, resume_age_s=990, evaluated=12, published=16, metric=12.345,
    )  # fmt: skip
    with console.capture() as capture:
        console.print(status.table(replace(found, runs=[large])))
    assert "…" not in capture.get()
    assert "51.2 M (50%)" in capture.get()


def test_a_sweep_that_publishes_its_first_weights_alone_is_complete_at_no_images(sweep: Sweep) -> None:
    console, (found, run) = Console(width=80), of(sweep, "dis")
    with console.capture() as capture:
        console.print(status.table(replace(found, runs=[replace(run, images=0)])))
        console.print(status.overview([replace(found, runs=[replace(run, images=0)])]))
    assert "0 (100%)" in capture.get()


def test_an_error_that_looks_like_markup_is_shown_as_it_is(sweep: Sweep) -> None:
    why = "[/pytorch/third_party/gloo/pair.cc:534] Connection closed by peer"
    Ended(why=why).write(sweep.run("dis").folder)
    assert why in " ".join(printed(of(sweep, "dis")[0]).split())
    Ended(why="an answer of a server\x1b[2J").write(sweep.run("dis").folder)
    assert r"an answer of a server\x1b[2J" in printed(of(sweep, "dis")[0])
