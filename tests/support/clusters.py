"""Ray clusters of several nodes: processes of this machine, each of which can be killed, drained or cut off.

They listen at the machine's own address: Ray does not run several nodes on loopback.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.job_submission import JobSubmissionClient

from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep, state
from pipelines import lines
from pipelines.cluster import Cluster, free_ports
from pipelines.jobs import Job
from tests.support import ranks, sweeps

RAY = str(Path(sys.executable).with_name("ray"))
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "OMP_WAIT_POLICY": "PASSIVE"}
Node = subprocess.Popen[bytes]


class RayNodes:
    """One Ray cluster whose nodes run this tree's code; `address` is its RAY_ADDRESS."""

    def __init__(
        self, cpus: int, ip: str = "", within: Sequence[str] = (), options: Sequence[str] = (),
        folder: Path = sweeps.ROOT, headers: dict[str, str] | None = None, **environment: str,
    ) -> None:  # fmt: skip
        ip = ip or ray.util.get_node_ip_address()
        self.port, dashboard = free_ports(2)
        self.address, self.url = f"{ip}:{self.port}", f"http://{ip}:{dashboard}"
        self.folder = tempfile.mkdtemp(prefix="ray-test-", dir="/tmp")  # Ray's sockets need a short path
        self.nodes: list[Node] = []
        self._working_folder, self._headers = folder, headers
        place = ["--head", f"--port={self.port}", f"--dashboard-port={dashboard}", f"--dashboard-host={ip}"]
        self._start([*place, f"--temp-dir={self.folder}", *options], cpus, ip, within, **environment)
        self._await_jobs()

    def node(
        self, cpus: int, ip: str = "", within: Sequence[str] = (), options: Sequence[str] = (), **environment: str
    ) -> Node:
        """Start one more node, through the command `within`, with further options of `ray start`."""
        ip = ip or self.address.partition(":")[0]
        return self._start([f"--address={self.address}", *options], cpus, ip, within, **environment)

    def drain(self, node_id: str) -> None:
        """Announce that a node will be taken away, as KubeRay, an autoscaler or a spot notice do."""
        command = [RAY, "drain-node", "--address", self.address, "--node-id", node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        subprocess.run([*command, "--deadline-remaining-seconds", "300"], check=True, capture_output=True)

    def stop(self) -> None:
        for node in reversed(self.nodes):
            if node.poll() is None:
                sweeps.kill_all(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def cluster(self) -> Cluster:
        """Return the cluster for jobs that are submitted one by one."""
        client = JobSubmissionClient(self.url)
        return Cluster(client, {}, self.url, ours=False, capacity=1, gpus=0, gpu_fault="", id=self.folder)

    def alive(self, within: Sequence[str] = ()) -> set[str]:
        """Return the ids of the nodes that are up, by Ray's own list, asked on the head's machine."""
        listed = subprocess.run(
            [*within, sys.executable, "-c", LIST, self.address],
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            check=True,
        )
        return {node["NodeID"] for node in json.loads(listed.stdout.splitlines()[-1]) if node["Alive"]}

    def _start(self, place: list[str], cpus: int, ip: str, within: Sequence[str], **environment: str) -> Node:
        (agent,) = free_ports(1)
        command = [
            *within, RAY, "start", "--block", "--disable-usage-stats", *place, f"--num-cpus={cpus}",
            f"--node-ip-address={ip}", f"--dashboard-agent-listen-port={agent}", "--object-store-memory=100000000",
        ]  # fmt: skip
        with (Path(self.folder) / f"node-{len(self.nodes)}.log").open("wb") as log:
            node = subprocess.Popen(
                command, cwd=self._working_folder, env=os.environ | ENVIRONMENT | environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.nodes.append(node)
        return node

    def _await_jobs(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                JobSubmissionClient(self.url, headers=self._headers).list_jobs()
                return
            except (ConnectionError, RuntimeError):
                assert time.monotonic() < deadline, (Path(self.folder) / "node-0.log").read_text()
                time.sleep(0.3)


LIST = "import ray, sys, json; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR'); print(json.dumps(ray.nodes()))"


def sweep_to_train(root: Path, *settings: str) -> Sweep:
    """Return a stored sweep with latents: all that a training job needs."""
    sweep = sweeps.sweep_at(root, *settings)
    sweep.save_recipe()
    state.use_latents(sweep, ranks.make_latents(open_folder(root) / "latents/some", sweep.recipe), "v")
    return sweep


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
    return str(job.status())


def wait_for_nodes(nodes: RayNodes, count: int, newest: Node, within: Sequence[str] = ()) -> None:
    """Wait until this many nodes are up."""
    deadline = time.monotonic() + sweeps.TIMEOUT_S
    while len(nodes.alive(within)) < count:
        assert newest.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)


def driver(sweep: Sweep, stage: str) -> psutil.Process:
    """Return the process of a stage's driver, wherever on this machine it was started."""
    command = ["-m", "pipelines", stage, sweep.folder.url]
    (process,) = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:5] == command]
    return process
