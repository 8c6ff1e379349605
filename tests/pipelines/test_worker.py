"""Workers: their stacks, their lines, and what counts as a hang. tests/e2e/test_sharing.py watches some on a real Ray."""

import json

import pytest

from dis_scale.process import context
from pipelines.watching import Watch
from pipelines.worker import Worker


@pytest.mark.parametrize(
    ("done", "silent_s", "hangs"),
    [([160, 304], 11.0, True), ([160, 304], 9.0, False), ([320, 304], 11.0, True), ([320, 320], 11.0, False)],
    ids=["silent", "not for long", "one is not at the end", "after the last step they only write"],
)
def test_a_hang_is_a_silence_before_the_last_step(done: list[int], silent_s: float, hangs: bool) -> None:
    assert Watch(hang_after_s=10.0, last=320).hangs(done, silent_s) == hangs


def test_without_a_limit_nothing_hangs() -> None:
    assert not Watch().hangs([0], 1e9)


def test_a_poll_returns_the_lines_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(context.VARIABLE, '{"sweep": "tiny", "stage": "train"}')
    worker = Worker()
    worker.log("one")
    worker.emit("work")
    worker.report(16)
    done, lines = worker.poll()
    assert (done, [json.loads(line)["kind"] for line in lines]) == (16, ["message", "event"])
    assert json.loads(lines[0])["stage"] == "train"
    assert worker.poll() == (16, [])


def test_stacks_name_the_running_function() -> None:
    assert "test_stacks_name_the_running_function" in Worker().stacks()
