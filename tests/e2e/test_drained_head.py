"""A head that is evicted: the sweep's command and its jobs save before it goes, and a new cluster continues from there."""

import shlex
import sys
import time
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from dis_scale.storage import lease
from dis_scale.sweep import Run, state
from dis_scale.tracking import rows
from tests.support.clusters import RayNodes, sweep_to_train
from tests.support.stages import ONE_MODEL
from tests.support.sweeps import TIMEOUT_S

LONG = (
    f"models={ONE_MODEL}", "train.publish_images=[0, 1600000]",
    "train.workers=1", "train.resume_every_images=160000", "precompute.workers=1",
)  # fmt: skip


@pytest.mark.faults
def test_no_step_is_lost_when_the_head_is_drained(tmp_path: Path) -> None:
    nodes = RayNodes(cpus=3, RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="90")
    try:
        sweep = sweep_to_train(tmp_path, *LONG)
        run, client = sweep.run("dit"), JobSubmissionClient(nodes.url)
        command = [sys.executable, "-m", "dis_scale", "resume", sweep.folder.url]
        job = client.submit_job(entrypoint=shlex.join(command))
        deadline = time.monotonic() + TIMEOUT_S
        while images_seen(run) < 1600:
            assert time.monotonic() < deadline, client.get_job_logs(job)
            assert client.get_job_status(job) in ("PENDING", "RUNNING"), client.get_job_logs(job)
            time.sleep(0.5)
        (head,) = nodes.nodes
        head.terminate()  # as `kubectl drain` does
        head.wait(TIMEOUT_S)
    finally:
        nodes.stop()
    assert images_seen(run) % 160000, "it was stopped between two resume points"
    assert state.resumable_images(run) == images_seen(run)
    command_end, run_end = (lease.last_holding(folder) for folder in (sweep.lease("sweep"), run.lease))
    assert command_end
    assert command_end.end
    assert command_end.end.why.startswith("Drained: the node of this command is being drained; to continue: ")
    assert run_end
    assert run_end.end
    assert run_end.end.why == ""


def images_seen(run: Run) -> int:
    return max((row.images for row in rows.newest(run.log).values()), default=0)
