"""Workers: their stacks, their lines, and what counts as a hang. tests/e2e/test_sharing.py watches some on a real Ray."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dis_scale.process import context
from pipelines.sharing import SHARED
from pipelines.watching import Pace, Watch
from pipelines.worker import Worker


@pytest.mark.parametrize(
    ("done", "silent_s", "hangs"),
    [
        ([160, 304], 11.0, True), ([160, 304], 9.0, False), ([320, 304], 11.0, True), ([320, 320], 3599.0, False),
        ([320, 320], 3601.0, True),
        ([0, 0], 39.0, False), ([0, 0], 41.0, True), ([0, 16], 11.0, True),
    ],
    ids=[
        "silent", "not for long", "one is not at the end", "after the last step they only write",
        "a write that never ends", "reading a resume point", "never a first step", "one has no first step",
    ],
)  # fmt: skip
def test_a_hang_is_a_silence_that_is_long_after_the_last_step(done: list[int], silent_s: float, hangs: bool) -> None:
    """Of ranks, which go in step: if one hangs, all do. Slow steps before it change nothing."""
    pace = Pace(2, Watch(hang_after_s=10.0, last=320))
    for now_s, before in ((0.0, [0, 0]), (9.0, done)):
        assert pace.note(before, {0, 1}, (), now_s) == []
    assert pace.note(done, {0, 1}, {1}, 9.0 + silent_s) == [], "it waits for capacity"
    pace = Pace(2, Watch(hang_after_s=10.0, last=320))
    for now_s, before in ((0.0, [0, 0]), (9.0, done)):
        assert pace.note(before, {0, 1}, (), now_s) == []
    begun_s = 9.0 if any(done) else 0.0
    assert pace.note(done, {0, 1}, (), begun_s + silent_s) == [0] * hangs
    assert pace.silent_s(begun_s + silent_s) == silent_s


def hanging(took_s: list[float], hangs_after_s: float) -> float | None:
    """Return when the second of two workers is found hanging that makes these steps, of which the last never ends.

    The first works on; both are asked once a second, by a simulated clock.
    """
    pace, ends = Pace(2, replace(SHARED, hang_after_s=hangs_after_s)), np.cumsum(took_s)
    for now_s in range(20_000):
        done = [now_s // 60, int((ends[:-1] <= now_s).sum())]
        if pace.note(done, {0, 1}, (), float(now_s)):
            return now_s - float(ends[-2])
    return None


def test_one_worker_that_hangs_is_found_and_slow_ones_are_not() -> None:
    """After 15 minutes, or ten times the usual; and not before an hour while nothing is known of that."""
    assert hanging([60.0] * 20 + [1e9], 900.0) == pytest.approx(900, abs=2)
    assert hanging([60.0] * 20 + [600.0] * 5 + [60.0] * 20 + [1e9], 900.0) == pytest.approx(900, abs=2)
    assert hanging([500.0] * 20 + [1e9], 150.0) == pytest.approx(5000, abs=2), "it is slow, however fast the other is"
    again = Pace(1, SHARED)
    assert again.note([None], {0}, (), -1.0) == [], "it has not answered yet"
    assert not any(again.note([37], {0}, (), float(now_s)) for now_s in range(3600)), "what it did before is of other work"
    slow = Pace(1, SHARED)
    assert not any(slow.note([0], {0}, (), float(now_s)) for now_s in range(3600))
    assert slow.note([0], {0}, (), 3601.0) == [0]
    assert not any(slow.note([0], {0}, {0}, float(now_s)) for now_s in range(3600, 99_999, 60)), "it waits for capacity"


def test_without_a_limit_nothing_hangs() -> None:
    endless = Pace(1, Watch(hang_after_s=float("inf")))
    assert not any(endless.note([0], {0}, (), now_s) for now_s in (0.0, 1e9))


def test_a_process_that_does_not_start_in_its_place_hangs() -> None:
    started = Pace(1, Watch(hang_after_s=10.0, held=["node"]))
    assert [started.note([None], {0}, [], float(now_s)) for now_s in (100, 130, 141)] == [[], [], [0]]
    assert started.silent_s(141.0) == 41.0


def test_a_hang_in_which_one_never_answered_has_the_time_since_its_begin() -> None:
    pace = Pace(2, Watch(hang_after_s=10.0))
    for now_s in range(100, 141):
        assert pace.note([0, None], {0, 1}, [], float(now_s)) == []
    assert pace.note([0, None], {0, 1}, [], 141.0) == [0]
    assert pace.silent_s(141.0) == 41.0


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


@pytest.mark.parametrize("policy", [Watch(), SHARED], ids=["in step", "independent"])
def test_what_a_worker_has_done_before_is_no_progress_of_work_that_reports_none(policy: Watch) -> None:
    """An evaluator that has sampled 500 images has an hour for its held-out losses, not a quarter."""
    pace = Pace(2, policy)
    assert not any(
        pace.note(done, {0, 1}, (), now_s) for now_s, done in ((0.0, [None, None]), (1.0, [500, None]), (2.0, [500, 80]))
    )
    assert pace.note([500, 80], {0, 1}, (), 3500.0) == []
    assert 0 in pace.note([500, 80], {0, 1}, (), 3700.0)
