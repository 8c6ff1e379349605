"""The jobs of a running sweep: which failures are whose, and what a stop, a lost storage or a late failure changes."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus

from dis_scale.process.context import Context
from dis_scale.process.errors import DisScaleError, Held, Preempted, StorageAway, UserError
from dis_scale.recipe import reading
from dis_scale.storage.folder import Folder
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import Ended, StageProgress
from pipelines.cluster import Cluster
from pipelines.driver import (
    FOLLOWED_IN_S,
    MOST_EVALUATIONS,
    MOST_FOLLOWED,
    Drained,
    Driver,
    Failures,
    go_on,
    may_follow,
    run_stage,
    silence_of,
    stopping_jobs,
    train_and_evaluate,
)
from pipelines.lines import Log
from pipelines.silence import NotStarted, RayEnded, Unanswered
from pipelines.sweep import on_rays, seen_alive
from tests.conftest import TINY
from tests.support.documents import put_metrics, put_published
from tests.support.drivers import cluster, driver_of, logged


@dataclass
class FakeJob:
    """A job without Ray: its statuses one after the other, the last for ever, and the error that it ends with."""

    statuses: list[JobStatus]
    failure: DisScaleError = field(default_factory=lambda: DisScaleError("no failure"))
    id: str = "job"
    ours: bool = True
    killed: bool = False

    @property
    def status(self) -> JobStatus:
        return self.statuses[0]

    def ended(self) -> bool:
        """Ask for the status, which then is the next one."""
        if len(self.statuses) > 1:
            self.statuses.pop(0)
        return bool(self.status != JobStatus.RUNNING)

    def lines(self) -> list[str]:
        return []

    def reason(self) -> str:
        return str(self.failure)

    def error(self, words: str) -> DisScaleError:
        return type(self.failure)(words)


@dataclass
class Printing(FakeJob):
    """A job without Ray that prints lines at its first poll."""

    printed: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        lines, self.printed = self.printed, []
        return lines


def failed(why: str) -> FakeJob:
    return FakeJob([JobStatus.FAILED], DisScaleError(why))


def run(driver: Driver, fakes: dict[tuple[str, ...], FakeJob]) -> Failures:
    """Run these jobs, by stage and arguments, in place of those on Ray."""
    driver.poll_every_s, driver.submit = 0.0, lambda _, __, *words: fakes[words]  # type: ignore[assignment]
    return train_and_evaluate(driver, cluster("here"))


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    """A sweep whose models are `evaluate`, like the stage, and `dit`."""
    model = "{kind: dit, width: 16, depth: 1, heads: 2, patch: 4}"
    made = driver_of(reading.load(TINY, [f"models={{evaluate: {model}, dit: {model}}}"]), tmp_path)
    made.evaluate_again_s = 0.0
    return made


def test_the_progress_of_a_stage_is_stored(driver: Driver) -> None:
    """For `dis-scale status` on any machine; that of training is in its rows."""
    written = list[str]()
    for stage in ("prepare", "ablate"):
        Log(Context(sweep="tiny", stage=stage), written.append).progress(3, 40, "steps")
        job = Printing([JobStatus.SUCCEEDED], printed=written[-1:])
        driver.poll_every_s, driver.submit = 0.0, lambda *_, job=job: job
        run_stage(driver, cluster("here"), stage)
    known = StageProgress.read(driver.sweep.folder)
    assert (known.stage, known.done, known.total, known.unit) == ("prepare", 3, 40, "steps")


SUCCEEDED = FakeJob([JobStatus.SUCCEEDED])


def test_a_stop_is_obeyed_while_models_wait_for_nodes_and_evaluation_is_over(driver: Driver) -> None:
    """All nodes for training are away, and the evaluation has ended. One model's job waits: autoscalers see it."""
    no_room, submitted = replace(cluster("here"), at_once=lambda: 0), list[str]()
    jobs = {"evaluate": SUCCEEDED, "train": FakeJob([JobStatus.RUNNING])}

    def submit(_: Cluster, __: Sweep, *words: str) -> FakeJob:
        submitted.append(words[0])
        return jobs[words[0]]

    driver.poll_every_s, driver.submit = 0.0, submit  # type: ignore[assignment]
    threading.Timer(0.5, driver.stop_requested.set).start()
    with pytest.raises(Preempted, match="stopped as requested"):
        train_and_evaluate(driver, no_room)
    assert sorted(submitted) == ["evaluate", "train"]


def test_a_command_that_joined_ends_by_the_stop_of_the_one_that_runs(driver: Driver) -> None:
    """And trains no model that has failed there."""
    Ended(why="it diverged").write(driver.sweep.run("evaluate").folder)
    driver.first = False
    stopped = FakeJob([JobStatus.STOPPED], Preempted("stopped"), ours=False)
    with pytest.raises(Preempted, match="dit was stopped from outside"):
        run(driver, {("train", "dit"): stopped, ("evaluate",): FakeJob([JobStatus.RUNNING])})
    assert "another job continues" not in logged(driver)
    done = FakeJob([JobStatus.SUCCEEDED])
    assert run(driver, {("train", "dit"): done, ("evaluate",): done}).models == {"evaluate": "it diverged"}
    assert Ended.exists(driver.sweep.run("evaluate").folder)


def test_a_job_of_an_earlier_command_is_followed_by_one_that_knows_the_recipe(driver: Driver) -> None:
    """It began before a model, a metric or a later count was added, and would leave these out without a word."""
    submitted = list[tuple[str, ...]]()

    def submit(_: Cluster, __: Sweep, *words: str) -> FakeJob:
        submitted.append(words)
        if words[0] == "train" and submitted.count(words) == 1 + (words[1] == "evaluate"):
            put_published(driver.sweep.run(words[1]).published_at(320))
        return FakeJob([JobStatus.SUCCEEDED], ours=submitted.count(words) > 1 or words == ("train", "dit"))

    driver.poll_every_s, driver.submit = 0.0, submit  # type: ignore[assignment]
    run_stage(driver, cluster("here"), "prepare")
    assert train_and_evaluate(driver, cluster("here")).words() == ""
    assert Counter(submitted) == {("prepare",): 2, ("evaluate",): 2, ("train", "evaluate"): 2, ("train", "dit"): 1}


def test_a_job_that_is_killed_again_and_again_is_followed_after_pauses(driver: Driver) -> None:
    """A head that is short of memory for some minutes would use up all of a day's tries in two."""
    begun_s, driver.poll_every_s = list[float](), 0.01

    def submit(*_: object) -> FakeJob:
        begun_s.append(time.monotonic())
        return FakeJob([JobStatus.FAILED if len(begun_s) < 5 else JobStatus.SUCCEEDED], killed=True)

    driver.submit = submit  # type: ignore[assignment]
    run_stage(driver, cluster("here"), "prepare")
    pauses_s = [later - before for before, later in pairwise(begun_s)]
    assert pauses_s[1] > 0.04
    assert pauses_s[3] > 0.16


def test_no_job_is_stopped_on_a_ray_that_has_ended(driver: Driver) -> None:
    driver.jobs = [FakeJob([JobStatus.RUNNING])]  # type: ignore[list-item]  # it cannot be asked
    with pytest.raises(RayEnded), stopping_jobs(driver):
        raise RayEnded("the Ray that this command started has ended")


def test_another_ray_may_be_slow_to_start_but_the_first_must(driver: Driver) -> None:
    """The machine that has just lost one is often busy."""
    driver.poll_every_s = 0.0

    def run(*ends: Exception | None) -> Failures:
        remaining = list(ends)

        def once() -> Failures:
            if error := remaining.pop(0):
                raise error
            return Failures()

        return on_rays(driver, once)

    with pytest.raises(NotStarted):
        run(NotStarted("no Ray"))
    assert run(RayEnded("lost"), NotStarted("busy"), NotStarted("busy"), None) == Failures()
    with pytest.raises(Unanswered, match="busy; as 10 others within a day"):
        run(*[NotStarted("busy")] * 9)
    driver.followed_s.clear()
    driver.poll_every_s = 10.0
    driver.stop_requested.set()
    with pytest.raises(Preempted):
        run(RayEnded("lost"), NotStarted("busy"), None)


@pytest.mark.parametrize(("ours", "error"), [(True, RayEnded), (False, Unanswered)])
def test_a_ray_of_our_own_that_answers_no_more_has_ended(driver: Driver, ours: bool, error: type[Unanswered]) -> None:
    """Another one follows. Whoever started the command on a workstation would have to do it again."""

    def hang() -> None:
        raise TimeoutError("10 s")

    silence = silence_of(driver, replace(cluster("here"), ours=ours))
    silence.most_s = -1.0
    with pytest.raises(Unanswered, match="Ray's dashboard has not answered") as caught:
        silence.ask(hang)
    assert caught.type is error


def test_a_job_whose_process_was_killed_is_followed_by_another_ten_times(driver: Driver) -> None:
    """Ray's head may run out of memory: nothing of the stage is to blame."""
    every = [FakeJob([JobStatus.FAILED], DisScaleError("exit code -9"), killed=True) for _ in range(MOST_FOLLOWED)]
    jobs = iter([*every, SUCCEEDED])
    driver.poll_every_s, driver.submit = 0.0, lambda *_: next(jobs)  # type: ignore[assignment]
    run_stage(driver, cluster("here"), "precompute")
    assert (
        logged(driver).count("precompute: its process was killed, or not started (exit code -9), and another job continues") == 10
    )
    with pytest.raises(DisScaleError, match="precompute failed: exit code -9"):
        jobs = iter(every)
        run_stage(driver, cluster("here"), "precompute")
    driver.followed_s["precompute"][0] -= FOLLOWED_IN_S
    jobs = iter([every[0], SUCCEEDED])
    run_stage(driver, cluster("here"), "precompute")
    put_published(driver.sweep.run("evaluate").published_at(320))
    joined = FakeJob([JobStatus.STOPPED], Preempted("it was stopped"), ours=False)
    jobs = iter([SUCCEEDED, every[0], joined, SUCCEEDED])
    assert train_and_evaluate(driver, cluster("here")) == Failures()


def test_kills_count_since_the_last_progress(driver: Driver) -> None:
    """A head that is short of memory kills a driver every two hours, each time after new resume points."""
    assert all(may_follow(driver, "train dit", stored=160 * hour) for hour in range(100))
    assert [may_follow(driver, "train dit", stored=160 * 99) for _ in range(MOST_FOLLOWED)] == [True] * (MOST_FOLLOWED - 1) + [
        False
    ]


def test_an_evaluation_whose_hub_is_away_ends_no_training(driver: Driver) -> None:
    """A node without the weights asks it for an hour; training needs none."""
    polls = iter(range(10**6))
    trains = FakeJob([JobStatus.RUNNING] * 500 + [JobStatus.SUCCEEDED])
    away = FakeJob([JobStatus.FAILED], StorageAway("the hub does not answer"))

    def submit(_: Cluster, __: Sweep, *words: str) -> FakeJob:
        if words[0] != "evaluate":
            return trains if words[1] == "dit" else SUCCEEDED
        return away if next(polls) < 2 * MOST_FOLLOWED else SUCCEEDED

    driver.poll_every_s, driver.submit = 0.0, submit  # type: ignore[assignment]
    assert train_and_evaluate(driver, cluster("here")) == Failures()
    assert next(polls) > 2 * MOST_FOLLOWED


LOST, DAMAGED = "a worker was lost", "the VAE is damaged"


@pytest.mark.parametrize(
    ("failing", "failures"),
    [
        ({("evaluate",): DAMAGED, ("train", "evaluate"): LOST}, Failures({"evaluate": LOST}, DAMAGED)),
        ({("evaluate",): DAMAGED}, Failures({}, DAMAGED)),
        ({("train", "dit"): LOST}, Failures({"dit": LOST})),
    ],
    ids=["the model evaluate and evaluation", "evaluation", "one of two models"],
)
def test_each_failure_is_that_of_its_own_job(driver: Driver, failing: dict[tuple[str, ...], str], failures: Failures) -> None:
    jobs = dict.fromkeys((("evaluate",), ("train", "evaluate"), ("train", "dit")), SUCCEEDED)
    assert run(driver, jobs | {words: failed(why) for words, why in failing.items()}) == failures
    assert {name: state.ended(driver.sweep, name) for name in ("evaluate", "dit")} == {
        name: failing.get(("train", name)) for name in ("evaluate", "dit")
    }
    for name in failures.models:
        assert f"{name} failed: {LOST}; the other jobs continue" in logged(driver)


def test_a_job_that_fails_after_the_last_count_is_published_fails_no_model(driver: Driver) -> None:
    last = driver.sweep.run("dit").published_at(driver.sweep.recipe.train.images)

    def submit(_: Cluster, __: Sweep, *words: str) -> FakeJob:
        if words == ("train", "dit"):
            put_published(last)
        return failed("its node was lost") if words == ("train", "dit") else SUCCEEDED

    driver.poll_every_s, driver.submit = 0.0, submit  # type: ignore[assignment]
    assert train_and_evaluate(driver, cluster("here")) == Failures()
    assert state.ended(driver.sweep, "dit") is None
    assert "dit is trained anyway: its last count is published" in logged(driver)


def test_a_job_that_ends_while_storage_is_away_ends_no_other(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its model is trained is asked until storage answers, and so is the note that it is not."""
    away, exists, write = [0], Folder.exists, Folder.write

    def first(action: Callable[..., Any]) -> Callable[..., Any]:
        def lost(*arguments: Any) -> Any:
            away[0] -= 1
            if away[0] >= 0:
                raise StorageAway("503")
            return action(*arguments)

        return lost

    def submit(_: Cluster, __: Sweep, *words: str) -> FakeJob:
        if words != ("train", "dit"):
            return SUCCEEDED
        monkeypatch.setattr(Folder, "exists", first(exists))
        monkeypatch.setattr(Folder, "write", first(write))
        away[0] = 3
        job = failed(LOST)
        job.reason = lambda: away.append(away.pop() + 3) or LOST  # type: ignore[method-assign,func-returns-value]
        return job

    driver.poll_every_s, driver.submit = 0.0, submit  # type: ignore[assignment]
    assert train_and_evaluate(driver, cluster("here")) == Failures({"dit": LOST})
    assert state.ended(driver.sweep, "dit") == LOST
    assert logged(driver).count("waiting  storage does not answer, asked again for an hour: 503") == 2, "once for each question"


@pytest.mark.parametrize("stage", ["prepare", "train", "evaluate"])
def test_another_job_follows_one_that_gave_up_storage_once_that_answers(
    driver: Driver, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that cannot take its lease waits a minute; storage may be away for an hour, also for those who write."""
    asked = list[Folder]()
    lost = FakeJob([JobStatus.FAILED], StorageAway("503"))
    jobs = {"prepare": [SUCCEEDED], "train": [SUCCEEDED] * 2, "evaluate": [SUCCEEDED]}
    jobs[stage].insert(0, lost)

    def away(folder: Folder) -> None:
        """It answers, then takes no writes yet, which is a mistake at the start of a sweep only."""
        asked.append(folder)
        if len(asked) < 3:
            raise (StorageAway("503"), UserError("it cannot be used: the quota is used up"))[len(asked) - 1]

    monkeypatch.setattr(Folder, "require_usable", away)
    driver.poll_every_s, driver.submit = 0.0, lambda _, __, *words: jobs[words[0]].pop(0)  # type: ignore[assignment]
    if stage == "prepare":
        run_stage(driver, cluster("here"), "prepare")
    else:
        assert train_and_evaluate(driver, cluster("here")) == Failures()
    assert len(asked) == 3
    assert "storage or a node was away (503), and another job continues" in logged(driver)


def test_as_many_models_train_as_the_cluster_holds_by_then(driver: Driver) -> None:
    """Nodes join for days: on a cluster that began with its head, one model would train for ever."""
    held, most = cluster("here"), list[int]()
    running = {model: FakeJob([JobStatus.RUNNING] * 20 + [JobStatus.SUCCEEDED]) for model in ("evaluate", "dit")}
    begun = list[str]()

    def submit(_: Cluster, __: Sweep, *words: str) -> FakeJob:
        if words[0] == "evaluate":
            return SUCCEEDED
        begun.append(words[1])
        most.append(sum(running[model].status == JobStatus.RUNNING for model in begun))
        return running[words[1]]

    held.at_once = lambda: 1 if len(running["evaluate"].statuses) > 10 else 2
    driver.poll_every_s, driver.submit = 0.0, submit  # type: ignore[assignment]
    assert train_and_evaluate(driver, held) == Failures()
    assert most == [1, 2]


@pytest.mark.parametrize("polls", range(6))
def test_an_evaluation_that_fails_at_any_moment_is_noted(driver: Driver, polls: int) -> None:
    """After the end of training, before or after any poll of its status."""
    evaluation = FakeJob([JobStatus.RUNNING] * polls + [JobStatus.FAILED], DisScaleError("the VAE is damaged"))
    fakes = {("evaluate",): evaluation, ("train", "evaluate"): SUCCEEDED, ("train", "dit"): SUCCEEDED}
    assert run(driver, fakes).evaluation == "the VAE is damaged"


@pytest.mark.parametrize("job", [("evaluate",), ("train", "dit")], ids=" ".join)
@pytest.mark.parametrize(
    "error", [Preempted("stopped"), Held("held by process 1"), StorageAway("no answer")], ids=["stopped", "held", "storage away"]
)
def test_a_job_that_was_stopped_is_held_elsewhere_or_lost_storage_is_no_failure(
    driver: Driver, job: tuple[str, ...], error: DisScaleError
) -> None:
    fakes = {("evaluate",): SUCCEEDED, ("train", "evaluate"): SUCCEEDED, ("train", "dit"): SUCCEEDED}
    with pytest.raises(type(error)):
        run(driver, fakes | {job: FakeJob([JobStatus.FAILED], error)})
    assert state.ended(driver.sweep, "dit") is None


def test_an_evaluation_that_failed_by_an_accident_is_submitted_again(driver: Driver) -> None:
    """While models are trained and after that; a mistake only while they are: it may be a file that the only node there lacks."""
    gauges = list[tuple[str, float]]()
    driver.gauge = lambda *gauge: gauges.append(gauge)
    submitted = list[str]()
    jobs = {"evaluate": [failed("the disk is full"), failed("the disk is full"), SUCCEEDED]}

    def submit(_: Cluster, __: Sweep, *words: str) -> FakeJob:
        submitted.append(words[0])
        return jobs["evaluate"].pop(0) if words[0] == "evaluate" else FakeJob([JobStatus.RUNNING] * polls + [JobStatus.SUCCEEDED])

    driver.poll_every_s, driver.submit, polls = 0.0, submit, 20  # type: ignore[assignment]
    assert train_and_evaluate(driver, cluster("here")) == Failures()
    assert submitted.count("evaluate") == 3
    shown = [value for name, value in gauges if name == "evaluation_failed"]
    assert shown == [0, 1, 1, 0], "not between two jobs: metrics are read every 15 s"
    mistake = FakeJob([JobStatus.FAILED], UserError("no such extractor"))
    driver.failed_shown_s = 0.0
    jobs["evaluate"] = [mistake, FakeJob([JobStatus.RUNNING] * 3 + [JobStatus.SUCCEEDED])]
    assert train_and_evaluate(driver, cluster("here")) == Failures()
    assert [value for name, value in gauges if name == "evaluation_failed"] == [*shown, 0, 1, 0, 0]
    jobs["evaluate"], polls = [mistake] * 20, 0
    assert train_and_evaluate(driver, cluster("here")) == Failures(evaluation="no such extractor"), "all are trained"


def test_a_mistake_in_evaluation_on_one_machine_is_tried_again_only_after_results(driver: Driver) -> None:
    """No other machine can be away, whose file it lacks."""
    evaluations = [FakeJob([JobStatus.FAILED], UserError("no such file"))]

    def submit(_: Cluster, __: Sweep, *words: str) -> FakeJob:
        return evaluations.pop(0) if words[0] == "evaluate" else FakeJob([JobStatus.RUNNING] * 20 + [JobStatus.SUCCEEDED])

    driver.poll_every_s, driver.submit = 0.0, submit  # type: ignore[assignment]
    alone = replace(cluster("here"), ours=True)
    assert train_and_evaluate(driver, alone) == Failures(evaluation="no such file")
    put_metrics(driver.sweep.evaluation(Sampled("dit", 16)))
    evaluations += [FakeJob([JobStatus.FAILED], UserError("no such file")), SUCCEEDED]
    assert train_and_evaluate(driver, alone) == Failures()
    assert evaluations == []


def test_the_evaluation_of_trained_models_waits_for_no_pause_after_a_mistake(driver: Driver) -> None:
    """An hour, in which all GPUs would be idle."""
    evaluations = [FakeJob([JobStatus.FAILED], UserError("no such file")), SUCCEEDED]
    trains = FakeJob([JobStatus.RUNNING] * 20 + [JobStatus.SUCCEEDED])
    driver.poll_every_s, driver.evaluate_again_s = 0.0, 600.0
    driver.submit = lambda _, __, *words: evaluations.pop(0) if words[0] == "evaluate" else trains  # type: ignore[assignment]
    began_s = time.monotonic()
    assert train_and_evaluate(driver, cluster("here")) == Failures()
    assert (evaluations, time.monotonic() - began_s < 9) == ([], True)


@pytest.mark.parametrize(("results", "jobs"), [([0], 1 + MOST_EVALUATIONS), ([0, 0, 0, 4, 4, 9, 9], 5 + MOST_EVALUATIONS)])
def test_evaluation_after_training_ends_by_failures_in_a_row_without_a_result(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, results: list[int], jobs: int
) -> None:
    """It may take days, in which the disk is full three times; a crash at its begin ends within the hour.

    The first job began before the end of training.
    """
    clock, submitted, driver.evaluate_again_s = iter(range(10**6)), list[float](), 600.0
    monkeypatch.setattr("pipelines.driver.time.monotonic", lambda: float(next(clock)))
    counts = iter(results + [results[-1]] * MOST_EVALUATIONS)
    monkeypatch.setattr(state, "measured", lambda _, model: range(next(counts) if model == "dit" else 0))

    def submit(_: Cluster, __: Sweep, *words: str) -> FakeJob:
        submitted.extend([time.monotonic()] * (words[0] == "evaluate"))
        return failed("the disk is full") if words[0] == "evaluate" else SUCCEEDED

    driver.poll_every_s, driver.submit = 0.0, submit  # type: ignore[assignment]
    assert train_and_evaluate(driver, cluster("here")) == Failures(evaluation="the disk is full")
    assert len(submitted) == jobs
    assert submitted[-1] - submitted[-MOST_EVALUATIONS] > 10 + 40 + 160 + 600 + 600
    assert submitted[-1] - submitted[-MOST_EVALUATIONS] < 3600


@pytest.mark.parametrize("taken_over", [False, True])
def test_jobs_that_another_driver_of_the_same_ray_has_joined_are_not_stopped(driver: Driver, taken_over: bool) -> None:
    stopped = list[str]()
    job = FakeJob([JobStatus.RUNNING, JobStatus.SUCCEEDED])
    job.stop = lambda: not stopped.append("dit")  # type: ignore[attr-defined,func-returns-value]
    driver.jobs, driver.taken_over = [job], taken_over  # type: ignore[list-item]
    with pytest.raises(Preempted), stopping_jobs(driver):
        raise Preempted("taken over")
    assert stopped == ([] if taken_over else ["dit"])
    grace_s = driver.sweep.recipe.grace_s + 5
    assert (f"stopping the jobs save what they have, within {grace_s:.0f} s" in logged(driver)) == (not taken_over)


def test_a_drained_node_stops_the_sweep_as_a_failure_that_is_tried_again(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its jobs have saved: Ray keeps a node that is drained until these have ended."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    job = FakeJob([JobStatus.RUNNING] * 3 + [JobStatus.FAILED])
    job.stop = lambda: True  # type: ignore[attr-defined]
    driver.jobs = [job]  # type: ignore[list-item]
    with pytest.raises(Drained) as error, stopping_jobs(driver), seen_alive(driver, lambda: True):
        driver.stop_requested.pause(60)
        go_on(driver)
    assert (error.value.exit_code, job.status) == (StorageAway.exit_code, JobStatus.FAILED)
    assert "the node of this command is being drained: its jobs save, and it ends" in logged(driver)


def test_a_stop_while_the_jobs_of_a_drained_node_save_is_final(driver: Driver) -> None:
    """Otherwise another head would begin what a user has stopped."""
    driver.gauge = lambda *gauge: gauges.append(gauge)
    gauges = list[tuple[str, float]]()
    with pytest.raises(Preempted), seen_alive(driver, lambda: True):
        driver.stop_requested.pause(60)
        try:
            go_on(driver)
        finally:
            driver.drained = False  # as a request through storage does
    assert "sweep_ended_timestamp_seconds" in dict(gauges)


@pytest.mark.parametrize(("error", "ended_well"), [(Preempted("stopped"), True), (DisScaleError("a bug"), False)])
def test_a_command_that_is_stopped_shows_that_it_is_not_gone(driver: Driver, error: DisScaleError, ended_well: bool) -> None:
    gauges: dict[str, float] = {}
    driver.gauge = gauges.__setitem__
    with pytest.raises(type(error)), seen_alive(driver, lambda: False):
        while not gauges:
            time.sleep(0.01)
        raise error
    assert gauges.keys() == {"sweep_alive_timestamp_seconds", *(["sweep_ended_timestamp_seconds"] * ended_well)}


def test_a_command_whose_loop_hangs_is_not_shown_as_alive(driver: Driver) -> None:
    """Its other threads run on, and would say otherwise."""
    gauges = list[float]()
    driver.gauge = lambda _, value: gauges.append(value)
    driver.turned_at = 100.0
    with seen_alive(driver, lambda: False):
        while not gauges:
            time.sleep(0.01)
    assert set(gauges) == {100.0}
    go_on(driver)
    assert abs(driver.turned_at - time.time()) < 60


def test_failures_are_shown_in_one_line() -> None:
    failures = Failures({"dis": "a worker was lost"}, "no space left", {"evaluation of dit at 0 images": "damaged"})
    assert failures.words() == (
        "dis failed: a worker was lost; evaluate failed: no space left; evaluation of dit at 0 images failed: damaged"
    )
    assert Failures().words() == ""
    assert Failures(evaluation="").words() == "evaluate failed: ", "a failure without a reason is a failure"
