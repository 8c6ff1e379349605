"""The lines of a job's log, as its sweep follows them; and how a sweep's own job ends."""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from ray.job_submission import JobDetails, JobStatus

from dis_scale.process.errors import Preempted
from dis_scale.recipe import Recipe
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from pipelines import jobs
from pipelines.cluster import Cluster
from pipelines.jobs import Job
from pipelines.silence import Silence
from tests.support.waiting import wait_until


@dataclass
class Log:
    """A job's log behind Ray's client: each connection sends it from its beginning and breaks after some chunks."""

    chunks: list[str]
    breaks: list[int]
    status: JobStatus = JobStatus.RUNNING
    complete_reads: int = 0
    connections: list[int] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def get_job_info(self, name: str) -> JobDetails:
        return JobDetails(type="SUBMISSION", submission_id=name, status=self.status, entrypoint="")

    def stop_job(self, name: str) -> None:
        self.stopped.append(name)

    def get_job_logs(self, _: str) -> str:
        self.complete_reads += 1
        return "".join(self.chunks)

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        sent = self.breaks.pop(0)
        self.connections.append(sent)
        for chunk in self.chunks[:sent]:
            yield chunk
        raise RuntimeError("closed unexpectedly")


def job_of(log: Log, reconnect_every_s: float = 0.0) -> Job:
    @dataclass
    class Cluster:
        client: Any

    return Job(Cluster(log), "job", True, reconnect_every_s=reconnect_every_s)  # type: ignore[arg-type]


def read(job: Job, count: int) -> list[str]:
    lines, deadline = list[str](), time.monotonic() + 30
    while len(lines) < count:
        lines += job.lines()
        assert time.monotonic() < deadline, lines
        time.sleep(0.01)
    return lines


def test_each_line_comes_once_through_broken_connections() -> None:
    log = Log(["one\ntw", "o\nthree\n", "fo", "ur\nfive"], breaks=[0, 1, 3, 2, 4, *[4] * 1000])
    job = job_of(log)
    assert read(job, 4) == ["one", "two", "three", "four"]
    assert log.complete_reads == 0
    log.chunks.append(" and six\nseven\n")
    log.status = JobStatus.SUCCEEDED
    assert job.ended()
    assert job.lines() == ["five and six", "seven"]
    assert (job.lines(), job.reason(), job.reason()) == ([], "no message", "no message")
    assert log.complete_reads == 1
    assert job.lines() == []


def test_the_last_words_that_came_are_kept_though_the_agent_is_gone() -> None:
    """With its node, which also ended the job: no answer has the complete log any more."""

    class Gone(Log):
        def get_job_logs(self, _: str) -> str:
            raise RuntimeError("no agent")

    log = Gone(["one\n", "last words\n"], breaks=[2, *[0] * 100])
    job, times_s = job_of(log, 3600.0), itertools.count(0.0, 20.0)
    job.silence = Silence(now_s=lambda: next(times_s), pause_s=0.0)
    before = job.lines()
    wait_until(lambda: job._received == sum(map(len, log.chunks)))
    log.status = JobStatus.FAILED
    assert job.ended()
    assert before + job.lines() == ["one", "last words"]
    assert job.lines() == []


def test_a_connection_on_which_nothing_comes_is_replaced() -> None:
    """One to a node that is gone stays open: the sweep would show no progress until its end, and an alert would page."""

    class Silent(Log):
        async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
            with contextlib.suppress(RuntimeError):
                async for chunk in super().tail_job_logs(name):
                    yield chunk
            await asyncio.sleep(3600)

    job = job_of(Silent(["one\n", "two\n"], breaks=[1, *[2] * 1000]))
    job.log_silent_s = 0.2
    assert read(job, 2) == ["one", "two"]


def test_a_running_log_is_never_read_as_a_whole() -> None:
    """A week of polls on one connection."""
    log = Log([f"{i}\n" for i in range(1000)], breaks=[1000, *[0] * 100_000])
    job = job_of(log, 3600.0)
    assert read(job, 1000) == [str(i) for i in range(1000)]
    for _ in range(100):
        assert job.lines() == []
    assert (log.complete_reads, log.connections) == (0, [1000])


@pytest.mark.parametrize(
    ("code", "final", "stopped"),
    [
        (75, False, True),
        (75, True, True),
        (2, True, True),
        (69, True, False),
        (1, True, True),
        (74, True, False),
        (70, True, False),
        (2, False, False),
        (1, False, False),
    ],
)
def test_what_a_new_cluster_would_only_repeat_ends_as_stopped(
    code: int, final: bool, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()

    class Client:
        def stop_job(self, name: str) -> None:
            asked.append(name)

    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "the-sweep"}}))
    if final:
        monkeypatch.setenv(jobs.FINAL, "1")
    left = jobs.end_own_job(code, lambda _: Client(), wait_s=0.0)
    assert (asked, left) == (["the-sweep"] if stopped else [], 0 if code == 75 else code)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert jobs.end_own_job(code, lambda _: Client(), wait_s=0.0) == code
    assert len(asked) <= 1, "outside a Ray job nothing is asked"


def test_all_given_jobs_are_stopped_also_those_of_an_earlier_command() -> None:
    log = Log([], [], JobStatus.RUNNING)
    joined = Job(job_of(log).cluster, "tiny-train-1", ours=False)
    jobs.stop_jobs([joined], 0.0)
    assert log.stopped == ["tiny-train-1"]


def test_a_silent_dashboard_does_not_delay_a_stop_by_each_job_of_three_weeks() -> None:
    """Each question takes its ten seconds, here a tenth; one job in three is still running."""
    asked = list[str]()

    class Silent(Log):
        def stop_job(self, name: str) -> None:
            asked.append(name)
            time.sleep(0.1)
            raise OSError("timed out")

    every = [job_of(Silent([], [], (JobStatus.RUNNING, JobStatus.FAILED, JobStatus.SUCCEEDED)[n % 3])) for n in range(30)]
    for job in every:
        job.ended()
    began_s = time.monotonic()
    jobs.stop_jobs(every, 0.0, asked_s=0.0)
    assert (len(asked), time.monotonic() - began_s < 0.9) == (10, True)


@pytest.mark.parametrize("wait_s", [0.0, 30.0], ids=["in a Ray job, which is not waited for", "on a Ray of its own"])
def test_a_stop_whose_answer_is_lost_is_asked_for_again(wait_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise training would go on without a command, and KubeRay would start a new cluster for what a user has stopped."""
    lost = [3]

    class Losing(Log):
        def stop_job(self, name: str) -> None:
            lost[0] -= 1
            if lost[0] >= 0:
                raise ConnectionError("lost")
            self.stopped.append(name)
            self.status = JobStatus.STOPPED

    job = job_of(log := Losing([], [], JobStatus.RUNNING))
    jobs.stop_jobs([job], wait_s)
    assert log.stopped == [job.id]
    lost[0] = 3
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "the-sweep"}}))
    monkeypatch.setattr(jobs, "ASK_AGAIN_S", 0.01)
    jobs.end_own_job(75, lambda _: job.cluster.client, wait_s=0.0)
    assert log.stopped == [job.id, "the-sweep"]


NO_AGENT = "Request failed with status code 500: No available agent to submit job, please try again later.."
"""Ray's words (2.x, `job_head.py`) after it has looked for the head's agent for 10 s: this job was not taken."""


@pytest.mark.parametrize(
    ("answers", "ours"),
    [([RuntimeError(NO_AGENT), requests.ConnectionError("aborted")], True), ([RuntimeError(NO_AGENT)], False)],
    ids=["taken although its answer was lost", "taken from another process meanwhile"],
)
def test_a_job_is_submitted_again_until_the_dashboard_answers(answers: list[Exception], ours: bool) -> None:
    taken = RuntimeError("Job with submission_id tiny-train-1 already exists. Please use a different submission_id.")
    coming = iter([*answers, taken])

    class Client:
        def submit_job(self, **_: object) -> None:
            raise next(coming)

    client: Any = Client()
    cluster = Cluster(client, {}, "a Ray", ours=True, at_once=lambda: 1, gpus=lambda: 0, gpu_fault="", id="x")
    submit = partial(jobs.submit_new, cluster, "tiny-train-1", ["true"], {})
    assert Silence(pause_s=0.0).insist(submit, lambda: None).ours == ours


def test_a_stop_is_obeyed_while_no_agent_takes_a_job() -> None:
    class Client:
        def submit_job(self, **_: object) -> None:
            raise RuntimeError(NO_AGENT)

    client: Any = Client()
    cluster = Cluster(client, {}, "a Ray", ours=True, at_once=lambda: 1, gpus=lambda: 0, gpu_fault="", id="x")

    def go_on() -> None:
        raise Preempted("stop")

    with pytest.raises(Preempted):
        Silence(pause_s=0.0).insist(partial(jobs.submit_new, cluster, "tiny-train-1", ["true"], {}), go_on)


def test_a_job_that_is_about_to_begin_is_asked_to_stop_again() -> None:
    """Ray answers that it has stopped nothing, and would begin it a moment later."""
    statuses = [JobStatus.PENDING, JobStatus.PENDING, JobStatus.RUNNING]

    class Beginning:
        def stop_job(self, _: str) -> bool:
            return bool(statuses[0] == JobStatus.RUNNING)

        def get_job_info(self, _: str) -> SimpleNamespace:
            return SimpleNamespace(status=statuses.pop(0))

    client = Beginning()
    assert [jobs.stops(client, "job") for _ in range(3)] == [False, False, True]
    ended = SimpleNamespace(stop_job=lambda _: False, get_job_info=lambda _: SimpleNamespace(status=JobStatus.SUCCEEDED))
    assert jobs.stops(ended, "job")


def test_any_spelling_of_a_sweeps_folder_finds_its_jobs(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "alias").symlink_to(tmp_path / "real/sweeps/tiny")
    monkeypatch.chdir(tmp_path)
    asked = list[str]()

    class Client:
        def __init__(self, _: str | None) -> None: ...

        def list_jobs(self) -> list[Any]:
            sweep = Sweep.below(open_folder(tmp_path / "real"), tiny)
            return [
                JobDetails(type="SUBMISSION", submission_id=f"{jobs.prefix_of(sweep)}-train-dis-1", status="RUNNING", entrypoint="")
            ]

        def stop_job(self, name: str) -> None:
            asked.append(name)

    assert len(jobs.stop_all(Sweep(open_folder(tmp_path / "alias"), tiny), "http://127.0.0.1:1", Client)) == 1
    for root in ("real", "real/", "./real//", f"{tmp_path}/link", "link/", f"file://{tmp_path}/link"):
        assert len(jobs.stop_all(Sweep.below(open_folder(root), tiny), "http://127.0.0.1:1", Client)) == 1
    assert len(asked) == 7


@pytest.mark.parametrize(
    ("code", "kind", "killed"),
    [(-9, None, True), (137, None, True), (1, None, False), (70, None, True), (75, None, True),
     (None, "JOB_SUPERVISOR_ACTOR_DIED", True), (None, "JOB_SUPERVISOR_ACTOR_START_TIMEOUT", True),
     (None, "RUNTIME_ENV_SETUP_FAILURE", True),
     (None, "JOB_ENTRYPOINT_COMMAND_START_ERROR", True), (None, "JOB_ENTRYPOINT_COMMAND_ERROR", False)],
)  # fmt: skip
def test_a_job_that_was_killed_is_told_from_one_that_failed(code: int | None, kind: str | None, killed: bool) -> None:
    info = JobDetails(type="SUBMISSION", submission_id="j", status="FAILED", entrypoint="", driver_exit_code=code, error_type=kind)
    assert Job(Any, "j", ours=True, _info=info).killed is killed  # type: ignore[arg-type]


def test_a_job_that_a_request_has_stopped_was_not_killed() -> None:
    """Ray says so. With the same exit code in a job that failed, a signal not of Ray's stopped its process: it is run again."""
    info = JobDetails(type="SUBMISSION", submission_id="j", status="STOPPED", entrypoint="", driver_exit_code=75)
    assert not Job(Any, "j", ours=True, _info=info).killed  # type: ignore[arg-type]
