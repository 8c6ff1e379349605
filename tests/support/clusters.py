"""Rays for tests: a head and further nodes as processes of this machine, each of which can be killed, drained or cut off.

They listen at the machine's own address: Ray wants several nodes nowhere on loopback.
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

import psutil
import ray
from ray.job_submission import JobSubmissionClient

from dis_scale.data import shards
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import Folder, open_folder
from pipelines import jobs
from pipelines.jobs import Cluster, Job
from tests.support import ranks, sweeps

RAY = str(Path(sys.executable).with_name("ray"))
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "OMP_WAIT_POLICY": "PASSIVE"}
Node = subprocess.Popen[bytes]


class Rays:
    """One Ray cluster; its nodes run this tree's code. `address` is what RAY_ADDRESS wants."""

    def __init__(self, cpus: int, ip: str = "", within: Sequence[str] = ()) -> None:
        ip = ip or ray.util.get_node_ip_address()
        self.port, dashboard = jobs.free_ports(2)
        self.address, self.url = f"{ip}:{self.port}", f"http://{ip}:{dashboard}"
        self.folder = tempfile.mkdtemp(prefix="ray-test-", dir="/tmp")  # Ray's sockets need a short path
        self.nodes: list[Node] = []
        place = ["--head", f"--port={self.port}", f"--dashboard-port={dashboard}", f"--dashboard-host={ip}"]
        self._start([*place, f"--temp-dir={self.folder}"], cpus, ip, within)
        self._await_jobs()

    def node(self, cpus: int, ip: str = "", within: Sequence[str] = (), **environment: str) -> Node:
        """One more node, behind the command `within`."""
        ip = ip or self.address.partition(":")[0]
        return self._start([f"--address={self.address}"], cpus, ip, within, **environment)

    def drain(self, node_id: str) -> None:
        """The notice that a node will be taken away, as KubeRay, an autoscaler or a spot notice give it."""
        command = [RAY, "drain-node", "--address", self.address, "--node-id", node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        subprocess.run([*command, "--deadline-remaining-seconds", "300"], check=True, capture_output=True)

    def stop(self) -> None:
        for node in reversed(self.nodes):
            if node.poll() is None:
                sweeps.kill_all(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def cluster(self) -> Cluster:
        """For jobs that are submitted one by one."""
        return Cluster(JobSubmissionClient(self.url), {}, self.url, False, 1, 0, self.folder)

    def alive(self, within: Sequence[str] = ()) -> set[str]:
        """The ids of the nodes that are up, by Ray's own list, asked on the head's machine."""
        listed = subprocess.run(
            [*within, sys.executable, "-c", LIST, self.address],
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            check=True,
        )
        return {node["NodeID"] for node in json.loads(listed.stdout.splitlines()[-1]) if node["Alive"]}

    def _start(self, place: list[str], cpus: int, ip: str, within: Sequence[str], **environment: str) -> Node:
        (agent,) = jobs.free_ports(1)
        command = [
            *within, RAY, "start", "--block", "--disable-usage-stats", *place, f"--num-cpus={cpus}",
            f"--node-ip-address={ip}", f"--dashboard-agent-listen-port={agent}", "--object-store-memory=100000000",
        ]  # fmt: skip
        with (Path(self.folder) / f"node-{len(self.nodes)}.log").open("wb") as log:
            node = subprocess.Popen(
                command, cwd=sweeps.ROOT, env=os.environ | ENVIRONMENT | environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.nodes.append(node)
        return node

    def _await_jobs(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                JobSubmissionClient(self.url).list_jobs()
                return
            except (ConnectionError, RuntimeError):
                assert time.monotonic() < deadline, (Path(self.folder) / "node-0.log").read_text()
                time.sleep(0.3)


LIST = "import ray, sys, json; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR'); print(json.dumps(ray.nodes()))"


def sweep_to_train(root: Path, *settings: str) -> tuple[Folder, Recipe]:
    """A sweep whose latents are there: all that a training job needs."""
    recipe = reading.load(sweeps.TINY, [f"storage.root={root}", *settings])
    sweep = sweeps.sweep_folder(str(root))
    sweep.write(reading.FILE, reading.dump(recipe).encode())
    shards.point_to(sweep, ranks.make_latents(open_folder(root) / "latents/some", recipe), "v")
    return sweep, recipe


class Said:
    """All that a job says, as it comes."""

    def __init__(self, job: Job) -> None:
        self.job, self.lines = job, list[str]()

    def wait(self, words: str) -> str:
        """The next line with these words; what came before it is passed over."""
        deadline = time.monotonic() + sweeps.TIMEOUT_S
        while True:
            self.lines += self.job.lines()
            for number, line in enumerate(self.lines):
                if words in line:
                    del self.lines[: number + 1]
                    return line
            assert not self.job.ended(), (words, self.job.why(), self.lines)
            assert time.monotonic() < deadline, (words, self.lines)
            time.sleep(0.2)


def driver(sweep: Folder, stage: str) -> psutil.Process:
    """The process of a stage's driver, wherever on this machine it was started."""
    wanted = ["-m", "pipelines", stage, sweep.url]
    (found,) = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:5] == wanted]
    return found
