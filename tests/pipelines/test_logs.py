"""Logs of workers, as their driver collects them. With real workers: tests/e2e/test_lost_workers.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from dis_scale.storage.folder import open_folder
from dis_scale.tracking.attempt_logs import LogName
from pipelines import logs, worker
from pipelines.worker import WorkerFailure


def actor(name: str) -> Any:
    return SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: name))


def test_all_workers_that_are_watched_keep_their_logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No stage has to think of it."""
    kept: list[tuple[str, str]] = []

    def worker_of(name: str) -> Any:
        observe = SimpleNamespace(remote=lambda _, log: kept.append((name, log.process)))
        return SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: name), observe=observe)

    monkeypatch.setattr(logs, "_own", SimpleNamespace(folder=open_folder(tmp_path)))
    monkeypatch.setattr(logs, "_workers", {})
    monkeypatch.setattr(worker, "_watch", lambda *_: [])
    ranks = [worker_of("aa"), worker_of("bb")]
    worker.watch(ranks[::-1], [], lambda _: None, keep_logs=False)
    worker.watch(ranks, [], lambda _: None)
    worker.watch([*ranks, worker_of("cc")], [], lambda _: None)
    assert kept == [("aa", "0000"), ("bb", "0001"), ("cc", "0002")], "it replaces a lost one"


@pytest.mark.parametrize("of", ["another attempt", "this attempt"])
def test_a_failure_is_raised_whatever_becomes_of_the_logs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, of: str
) -> None:
    """Without Ray nothing of `collect` works; workers of a new attempt may not keep a log yet."""

    def fail(*_: object) -> None:
        raise WorkerFailure("a worker was lost")

    known = {"another attempt": "aa", "this attempt": "bb"}[of]
    monkeypatch.setattr(logs, "_workers", {known: (open_folder(tmp_path), LogName("20261121T183819", "0000"))})
    monkeypatch.setattr(worker, "_watch", fail)
    monkeypatch.setattr(ray, "kill", lambda _: None)
    with pytest.raises(WorkerFailure, match="a worker was lost"):
        worker.watch([actor("bb")], [None], lambda _: None)
