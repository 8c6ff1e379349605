"""A fault plan's waits: an accident and the process that it meets wait for each other, on a machine of any speed."""

import contextlib
import threading
import time
from pathlib import Path

from dis_scale.process import faults
from tests.support.waiting import wait_until


def test_a_wait_ends_with_another_fault_or_a_file(tmp_path: Path) -> None:
    plan, spent = tmp_path / "plan", tmp_path / "plan.spent"
    plan.write_text("wait at step images=160 until=1.0\nfull at write\nwait at step images=320 until=go-on\n")
    steps = list[int]()

    def train() -> None:
        mine = faults.load(plan)
        for images in range(0, 480, 80):
            mine.at("step", images=images)
            steps.append(images)

    training = threading.Thread(target=train)
    training.start()
    wait_until((spent / "0.0").exists)
    training.join(0.2)
    assert steps == [0, 80]
    with contextlib.suppress(OSError):
        faults.load(plan).at("write")  # as another process
    wait_until((spent / "2.0").exists)
    training.join(0.2)
    assert steps == [0, 80, 160, 240]
    (spent / "go-on").touch()
    training.join(60)
    assert steps[-1] == 400


def test_a_wait_with_seconds_ends_alone_as_often_as_it_is_planned(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    plan.write_text("wait at step seconds=0.2 times=2\n")
    ours, began_s = faults.load(plan), time.monotonic()
    for _ in range(2):
        ours.at("step", images=0)
    assert time.monotonic() - began_s >= 0.4
    assert len(list((tmp_path / "plan.spent").iterdir())) == 2
    ours.at("step", images=0)
    assert len(list((tmp_path / "plan.spent").iterdir())) == 2
