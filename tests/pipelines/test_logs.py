"""Logs of workers, as their driver keeps and collects them. With real workers: tests/e2e/test_lost_workers.py."""

from pathlib import Path

from dis_scale.process.context import Context
from dis_scale.storage.folder import open_folder
from pipelines.logs import JobLogs
from tests.support.stage_jobs import actor


def test_workers_keep_their_logs_under_their_numbers(tmp_path: Path) -> None:
    kept: list[tuple[str, str]] = []
    logs = JobLogs(open_folder(tmp_path), Context())
    one, two, three = (actor(n, observe=lambda _, log, n=n: kept.append((n, log.process))) for n in ("aa", "bb", "cc"))
    logs.keep_workers([one, two])
    logs.keep_workers([one, two])
    logs.keep_workers([one, two, three])
    assert kept == [("aa", "0000"), ("bb", "0001"), ("cc", "0002")], "the last one replaces a lost one"


def test_logs_that_cannot_be_collected_raise_nothing(tmp_path: Path) -> None:
    """Without Ray nothing of it works; workers of a new attempt may not keep a log yet."""
    logs = JobLogs(open_folder(tmp_path), Context())
    logs.keep_workers([kept := actor("aa", observe=lambda *_: None)])
    logs.collect([kept, actor("bb")])


def test_a_process_that_is_no_stage_keeps_no_logs() -> None:
    logs = JobLogs(None, Context())
    logs.keep_workers([actor("aa")])
    logs.close()
