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
from collections.abc import Sequence
from pathlib import Path

import ray
from ray.job_submission import JobSubmissionClient

from dis_scale.process.machine import free_ports
from ops.drills.processes import kill_all
from pipelines.cluster import Cluster

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 400
RAY = str(Path(sys.executable).with_name("ray"))
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_prestart_worker_first_driver": "0",  # such workers lack a job's environment: no job would use them
}
STARTED, TOO_SLOW = "Ray runtime started", "timed out during startup"
"""Ray's words for a node that is up, and for one that ended because it was not registered within 30 s, as on a busy machine."""
STARTS = 3
"""Times that such a node is started, as a supervisor would."""
Node = subprocess.Popen[bytes]


class RayNodes:
    """One Ray cluster whose nodes run this tree's code; `address` is its RAY_ADDRESS."""

    def __init__(
        self, cpus: int, ip: str = "", within: Sequence[str] = (), options: Sequence[str] = (),
        folder: Path = ROOT, headers: dict[str, str] | None = None, **environment: str,
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

    def node(self, cpus: int, ip: str = "", within: Sequence[str] = (), options: Sequence[str] = (), **environment: str) -> Node:
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
                kill_all(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def cluster(self) -> Cluster:
        """Return the cluster for jobs that are submitted one by one."""
        client = JobSubmissionClient(self.url)
        return Cluster(client, {}, self.url, ours=False, at_once=lambda: 1, gpus=lambda: 0, gpu_fault="", id=self.folder)

    def log_of(self, node: Node) -> str:
        return (Path(self.folder) / f"node-{self.nodes.index(node)}.log").read_text()

    def alive(self, within: Sequence[str] = ()) -> set[str]:
        """Return the ids of the nodes that are up, by Ray's own list, asked on the head's machine."""
        listed = subprocess.run(
            [*within, sys.executable, "-c", LIST, self.address], env=os.environ | ENVIRONMENT, capture_output=True, check=True
        )
        (found,) = [line for line in listed.stdout.splitlines() if line.startswith(b"[{")]  # Ray tells of lost nodes there, too
        return {node["NodeID"] for node in json.loads(found) if node["Alive"]}

    def _start(self, place: list[str], cpus: int, ip: str, within: Sequence[str], **environment: str) -> Node:
        agent, environments = free_ports(2)
        command = [
            *within, RAY, "start", "--block", "--disable-usage-stats", *place, f"--num-cpus={cpus}",
            f"--node-ip-address={ip}", f"--dashboard-agent-listen-port={agent}", "--object-store-memory=100000000",
            f"--runtime-env-agent-port={environments}",  # as in pipelines/cluster.py
        ]  # fmt: skip
        output, deadline = Path(self.folder) / f"node-{len(self.nodes)}.log", time.monotonic() + TIMEOUT_S
        for _ in range(STARTS):
            with output.open("wb") as log:
                node = subprocess.Popen(
                    command, cwd=self._working_folder, env=os.environ | ENVIRONMENT | environment, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            while node.poll() is None and STARTED not in output.read_text() and time.monotonic() < deadline:
                time.sleep(0.2)
            if node.poll() is None or TOO_SLOW not in output.read_text():
                break
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


def wait_for_nodes(nodes: RayNodes, count: int, newest: Node, within: Sequence[str] = ()) -> None:
    """Wait until this many nodes are up; on a busy machine Ray may refuse a driver meanwhile."""
    deadline, refused = time.monotonic() + TIMEOUT_S, b""
    while True:
        try:
            if len(nodes.alive(within)) >= count:
                return
        except subprocess.CalledProcessError as error:
            refused = error.stderr
        assert newest.poll() is None, nodes.log_of(newest)
        assert time.monotonic() < deadline, refused.decode()
        time.sleep(0.2)
