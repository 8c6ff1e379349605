"""A rank that crashes: the stacks that its crash handler wrote are in storage when its cluster is gone. The logs are JSON."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from dis_scale import jsonlog
from dis_scale.sweep import Sweep
from dis_scale.tracking import attempt_logs
from pipelines import jobs
from pipelines.cluster import open_cluster
from tests.support import clusters, stages, sweeps
from tests.support.clusters import Events
from tests.test_cli import invoke


def pid_of_rank_1(sweep: Sweep) -> int:
    """Return the process id that its stored log names."""
    folder, deadline = sweep.logs("train", "dit"), time.monotonic() + sweeps.TIMEOUT_S
    while True:
        for name in attempt_logs.listed(folder):
            if name.process == "0001":
                return int(json.loads(folder.read(str(name)).splitlines()[0])["pid"])
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_stacks_of_a_crash_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jsonlog.VARIABLE, "json")
    sweep = clusters.sweep_to_train(
        tmp_path, f"models={stages.ONE_MODEL}", "train.publish_images=[0, 160, 320000]", "train.resume_every_images=160"
    )
    with open_cluster(sweep.recipe) as cluster:
        events = Events(job := jobs.submit(cluster, sweep, "train", "dit"))
        events.wait("work")
        os.kill(pid_of_rank_1(sweep), signal.SIGSEGV)
        events.wait("restart")
        events.wait("work")
        job.stop()
        assert clusters.wait_for_end(job) == "STOPPED"
    first, second = sorted({n.begun for n in attempt_logs.listed(sweep.logs("train", "dit")) if n.process != "driver"})
    texts = attempt_logs.read_attempt(sweep.logs("train", "dit"), first)
    (crashed,) = [text for name, text in texts.items() if name.process.endswith("-end")]
    assert "Fatal Python error: Segmentation fault" in crashed
    driver = next(text for name, text in texts.items() if name.process == "driver")
    assert "a worker was lost" in driver
    entries = [json.loads(line) for line in driver.splitlines() if line.startswith('{"kind"')]
    (crash,) = [entry for entry in entries if entry.get("event") == "restart"]
    assert (crash["sweep"], crash["stage"], crash["model"]) == ("tiny", "train", "dit")
    of_ranks = [entry for entry in entries if entry["rank"] == 0]
    assert {entry["attempt"] for entry in of_ranks} == {1, 2}
    assert of_ranks[-1]["images"] > 0
    _, printed = invoke("logs", sweep.folder.url, "dit", "--attempt", second)
    assert '"attempt": 2, "rank": 0' in printed
    assert '"attempt": 2, "rank": 1' in printed
