"""The lines of a job's log, as its sweep follows them."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.job_submission import JobStatus

from pipelines import jobs
from pipelines.jobs import Job


@dataclass
class Log:
    """A job's log behind Ray's client: each connection sends it from its beginning and breaks after some chunks."""

    chunks: list[str]
    breaks: list[int]
    status: JobStatus = JobStatus.RUNNING
    complete_reads: int = 0
    connections: list[int] = field(default_factory=list)

    def get_job_status(self, _: str) -> JobStatus:
        return self.status

    def get_job_logs(self, _: str) -> str:
        self.complete_reads += 1
        return "".join(self.chunks)

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        sent = self.breaks.pop(0)
        self.connections.append(sent)
        for chunk in self.chunks[:sent]:
            yield chunk
        raise RuntimeError("closed unexpectedly")


def job_of(log: Log) -> Job:
    @dataclass
    class Cluster:
        client: Any

    return Job(Cluster(log), "job", ours=True)  # type: ignore[arg-type]


def read(job: Job, count: int) -> list[str]:
    lines, deadline = list[str](), time.monotonic() + 30
    while len(lines) < count:
        lines += job.lines()
        assert time.monotonic() < deadline, lines
        time.sleep(0.01)
    return lines


def test_each_line_comes_once_through_broken_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RECONNECT_EVERY_S", 0.0)
    log = Log(["one\ntw", "o\nthree\n", "fo", "ur\nfive"], breaks=[0, 1, 3, 2, 4, *[4] * 1000])
    job = job_of(log)
    assert read(job, 4) == ["one", "two", "three", "four"]
    assert log.complete_reads == 0
    log.chunks.append(" and six\nseven\n")
    log.status = JobStatus.SUCCEEDED
    assert job.ended()
    assert job.lines() == ["five and six", "seven"]
    assert job.lines() == []


def test_a_running_log_is_never_read_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A week of polls on one connection."""
    log = Log([f"{i}\n" for i in range(1000)], breaks=[1000, *[0] * 100_000])
    monkeypatch.setattr(jobs, "RECONNECT_EVERY_S", 3600.0)
    job = job_of(log)
    assert read(job, 1000) == [str(i) for i in range(1000)]
    for _ in range(100):
        assert job.lines() == []
    assert (log.complete_reads, log.connections) == (0, [1000])
