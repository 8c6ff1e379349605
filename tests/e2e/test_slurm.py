"""cluster/slurm.sh on a real Slurm of two nodes: stopped by a signal it saves, is queued again and ends; by a request it stays."""

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dis_scale.storage.folder import open_folder
from tests.support import slurm, stages, sweeps
from tests.support.slurm import Slurm
from tests.support.stand_ins import stand_in
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


def asked_as_the_runbook_says(cluster: Slurm, job: str, log: str) -> str:
    """Return what `ray list nodes` prints by the commands of ops/runbooks/README.md, with the job's address from its log."""
    found = re.search(r"--address='([0-9.:]+)'", log)
    assert found, log
    page = (sweeps.ROOT / "ops/runbooks/README.md").read_text().partition("## On Slurm")[2]
    step, variables = (line.strip() for line in page.splitlines() if line.startswith("    "))
    variables = variables.replace("JOB", job).replace("IP:PORT", found[1])
    words = step.replace("JOB", job).replace("--pty bash", "bash -c").split()
    return cluster.run(*words, f"{variables}; ray list nodes")


def test_jobs_that_slurm_holds_are_exported_and_no_others(cluster: Slurm, tmp_path: Path) -> None:
    """Slurm's own words for the reasons; `sacct` needs a database."""
    wrap = ("--parsable", "--job-name=dis-scale", "--output=/dev/null", "--wrap=sleep 300")
    held, runs = (cluster.run("sbatch", *wrap).strip() for _ in range(2))
    cluster.run("sbatch", "--hold", *wrap)
    wait_until(lambda: [cluster.state(job) for job in (held, runs)] == ["RUNNING 0 0:0"] * 2)
    cluster.run("scontrol", "requeuehold", held)
    wait_until(lambda: "held" in cluster.run("squeue", "--noheader", f"--jobs={held}", "--format=%r"))
    stand_in(tmp_path, "sacct")
    script, out = sweeps.ROOT / "ops/prometheus/slurm-jobs.sh", tmp_path / "jobs.prom"
    cluster.run("env", f"PATH={tmp_path}:{cluster.environment['PATH']}", str(script), str(out))
    lines = [line for line in out.read_text().splitlines() if line.startswith("dis_scale_slurm_job_state")]
    assert lines == [f'dis_scale_slurm_job_state{{slurm_job="{held}",state="HELD"}} 1']


def test_a_signal_queues_the_job_again_and_a_request_does_not(cluster: Slurm, tmp_path: Path) -> None:
    root = tmp_path / "store"
    resume = open_folder(root) / "sweeps/tiny/runs/dit/resume"
    log = tmp_path / "log"
    job = submit(cluster, root)
    wait_until(lambda: len(resume.list()) >= 2, 400)
    assert asked_as_the_runbook_says(cluster, job, log.read_text()).count("ALIVE") == 2
    cluster.run("scancel", "--batch", "--signal=TERM", job)  # as Slurm does before the time limit and at a preemption
    wait_until(lambda: "queued again" in log.read_text(), 120)
    wait_until(lambda: cluster.state(job).startswith("PENDING"))
    cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")  # Slurm lets it wait for three minutes
    wait_until(
        lambda: "Ray runtime started" in log.read_text().partition("queued again")[2], 400
    )  # the script runs, not only the job
    saved = len(resume.list())
    cluster.run("scancel", "--batch", "--signal=INT", job)
    wait_until(lambda: cluster.state(job) == "COMPLETED 1 0:0", 200)
    assert saved
    again = submit(cluster, root)
    wait_until(lambda: cluster.state(again).startswith(("COMPLETED", "FAILED")), 400)
    assert cluster.state(again) == "COMPLETED 0 0:0", log.read_text()
    sweeps.assert_complete(str(root), *SETTINGS)
