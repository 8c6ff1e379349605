"""cluster/slurm.sh on a real Slurm of two nodes: stopped by a signal it saves, is queued again and ends; by a request it stays."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dis_scale.storage.folder import open_folder
from tests.support import slurm, stages, sweeps
from tests.support.slurm import Slurm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.faults
SETTINGS = (*sweeps.SLOW, f"models={stages.ONE_MODEL}", "evaluate.variants={}")
OPTIONS = ("--nodes=2", "--cpus-per-task=1", "--gpus-per-node=0", "--mem=400", "--time=20")


@pytest.fixture
def cluster() -> Iterator[Slurm]:
    if slurm.missing() or os.geteuid() != 0:
        pytest.skip(f"a real Slurm needs root and {', '.join(slurm.PROGRAMS)}")
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        running = Slurm(Path(folder), nodes=2)
        yield running
        running.stop()


def submit(cluster: Slurm, root: Path) -> str:
    words = [word for setting in (f"storage.root={root}", *SETTINGS) for word in ("--set", setting)]
    script = [str(sweeps.ROOT / "cluster/slurm.sh"), str(sweeps.TINY), *words]
    output = ["--parsable", f"--output={root.parent}/log", f"--chdir={sweeps.ROOT}"]
    return cluster.run("sbatch", *output, *OPTIONS, *script).strip()


def test_a_signal_queues_the_job_again_and_a_request_does_not(cluster: Slurm, tmp_path: Path) -> None:
    root = tmp_path / "store"
    resume = open_folder(root) / "sweeps/tiny/runs/dit/resume"
    log = tmp_path / "log"
    job = submit(cluster, root)
    wait_until(lambda: len(resume.list()) >= 2, 400)
    cluster.run("scancel", "--batch", "--signal=TERM", job)  # as Slurm does before the time limit and at a preemption
    wait_until(lambda: "queued again" in log.read_text(), 120)
    wait_until(lambda: cluster.state(job) == "RUNNING 1 0:0", 400)
    saved = len(resume.list())
    cluster.run("scancel", "--batch", "--signal=INT", job)
    wait_until(lambda: cluster.state(job) == "COMPLETED 1 0:0", 200)
    assert saved
    again = submit(cluster, root)
    wait_until(lambda: cluster.state(again).startswith(("COMPLETED", "FAILED")), 400)
    assert cluster.state(again) == "COMPLETED 0 0:0", log.read_text()
    sweeps.assert_complete(str(root), *SETTINGS)
