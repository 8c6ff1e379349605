"""Jobs on Ray clusters of several nodes (ops/drills/nodes.py): their events, and waiting for them."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep, state
from ops.drills.nodes import ENVIRONMENT as ENVIRONMENT
from ops.drills.nodes import RAY as RAY
from ops.drills.nodes import Node as Node
from ops.drills.nodes import RayNodes as RayNodes
from ops.drills.nodes import wait_for_nodes as wait_for_nodes
from pipelines import jobs, lines
from pipelines.cluster import Cluster
from pipelines.jobs import Job
from pipelines.silence import Silence
from tests.support import ranks, sweeps


def sweep_to_train(root: Path, *settings: str) -> Sweep:
    """Return a stored sweep with latents: all that a training job needs."""
    sweep = sweeps.sweep_at(root, *settings)
    sweep.save_recipe()
    state.use_latents(sweep, ranks.make_latents(open_folder(root) / "latents/some", sweep.recipe), "v")
    return sweep


def submit(cluster: Cluster, sweep: Sweep, stage: str, *arguments: str) -> Job:
    """Submit a stage as the sweep's command does: again until Ray answers, whose agent may not have started yet."""
    return Silence(most_s=sweeps.TIMEOUT_S).insist(partial(jobs.submit, cluster, sweep, stage, *arguments), lambda: None)


class Events:
    """The events of a job, one after the other as they come."""

    def __init__(self, job: Job) -> None:
        self.job, self._log, self._new = job, list[str](), list[dict[str, Any]]()

    def wait(self, name: str) -> dict[str, Any]:
        """Return the next event of this name; those before it are skipped. Fails if the job ends or it does not come."""
        deadline = time.monotonic() + sweeps.TIMEOUT_S
        while True:
            ended = self.job.ended()  # asked before its log, which is complete then
            log = self.job.lines()
            self._log += log
            self._new += [line.facts for line in map(lines.parse, log) if line and line.kind == "event"]
            for number, event in enumerate(self._new):
                if event["event"] == name:
                    del self._new[: number + 1]
                    return event
            assert not ended, (name, self.job.reason(), self._log)
            assert time.monotonic() < deadline, (name, self._log)
            time.sleep(0.2)


def wait_until(true: Callable[[], bool], job: Job) -> None:
    """Wait while the job runs; fail if it ends or the deadline passes."""
    deadline = time.monotonic() + sweeps.TIMEOUT_S
    while not true():
        assert not job.ended(), job.reason()
        assert time.monotonic() < deadline, job.lines()
        time.sleep(0.05)


def wait_for_end(job: Job) -> str:
    """Return the final status; fail at the deadline."""
    deadline = time.monotonic() + sweeps.TIMEOUT_S
    while not job.ended():
        assert time.monotonic() < deadline, job.lines()
        time.sleep(0.3)
    return str(job.status)


def driver(sweep: Sweep, stage: str) -> psutil.Process:
    """Return the process of a stage's driver, wherever on this machine it was started."""
    command = ["-m", "pipelines", stage, sweep.folder.url]
    (process,) = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:5] == command]
    return process
