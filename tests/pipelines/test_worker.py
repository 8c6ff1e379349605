"""Workers: their stacks, their lines, and what counts as a hang. tests/e2e/test_sharing.py watches some on a real Ray."""

import json

import numpy as np
import pytest

from dis_scale.process import context
from pipelines.watching import Pace, Watch
from pipelines.worker import Worker


@pytest.mark.parametrize(
    ("done", "silent_s", "hangs"),
    [
        ([160, 304], 11.0, True), ([160, 304], 9.0, False), ([320, 304], 11.0, True), ([320, 320], 11.0, False),
        ([0, 0], 39.0, False), ([0, 0], 41.0, True), ([0, 16], 11.0, True),
    ],
    ids=[
        "silent", "not for long", "one is not at the end", "after the last step they only write",
        "reading a resume point", "never a first step", "one has no first step",
    ],
)  # fmt: skip
def test_a_hang_is_a_silence_before_the_last_step(done: list[int], silent_s: float, hangs: bool) -> None:
    assert Watch(hang_after_s=10.0, first=4, last=320).hangs(done, silent_s) == hangs


def hanging(took_s: list[float], hangs_after_s: float) -> float | None:
    """Return when the second of two workers is found hanging that makes these steps, of which the last never ends.

    The first works on; both are asked once a second, by a simulated clock.
    """
    pace, ends = Pace(2, hangs_after_s), np.cumsum(took_s)
    for now_s in range(20_000):
        done = [now_s // 60, int((ends[:-1] <= now_s).sum())]
        if pace.note(done, {0, 1}, float(now_s)):
            return now_s - float(ends[-2])
    return None


def test_one_worker_that_hangs_is_found_and_slow_ones_are_not() -> None:
    """After 15 minutes, or ten times the usual; and not before an hour while nothing is known of that."""
    assert hanging([60.0] * 20 + [1e9], 900.0) == pytest.approx(900, abs=2)
    assert hanging([60.0] * 20 + [600.0] * 5 + [60.0] * 20 + [1e9], 900.0) == pytest.approx(900, abs=2)
    assert hanging([500.0] * 20 + [1e9], 150.0) == pytest.approx(5000, abs=2), "it is slow, however fast the other is"
    again = Pace(1, 900.0)
    assert not any(again.note([37], {0}, float(now_s)) for now_s in range(3600)), "what it did before is of other work"
    slow = Pace(1, 900.0)
    assert not any(slow.note([0], {0}, float(now_s)) for now_s in range(3600))
    assert slow.note([0], {0}, 3601.0) == [0]
    assert not any(slow.note([0], set(), float(now_s)) for now_s in range(3600, 99_999, 60)), "it waits for capacity"


def test_without_a_limit_nothing_hangs() -> None:
    assert not Watch(hang_after_s=float("inf")).hangs([0], 1e9)


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
