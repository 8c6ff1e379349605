"""Ray's job API: start a Ray of our own or take the one that we run on, submit stages, watch and stop them.

Learnt the hard way: two raylets on one machine collide on the dashboard agent's port unless each gets its own; a job's driver has
3 s between SIGTERM and SIGKILL unless RAY_JOB_STOP_WAIT_TIME_S is in its environment; an id stays taken after its job has ended; a
child job without a runtime environment runs in the cluster's own folder, on other code; `ray.init` puts its own handler of SIGTERM
in place of ours. We never run `ray stop`: it ends all Rays.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ray.job_submission import JobStatus, JobSubmissionClient

from dis_scale.errors import DisScaleError, Held, Preempted, UserError
from dis_scale.recipe import Recipe
from dis_scale.storage.folder import Folder

START_TIMEOUT_S = 90.0
ENDED = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED}


@dataclass
class Cluster:
    """A Ray that jobs can be submitted to."""

    client: JobSubmissionClient
    runtime_env: dict[str, Any]
    described: str
    ours: bool
    room: int
    """How many trainings fit beside each other."""
    gpus: int
    id: str
    """What tells it from every other."""
    address: str | None = None
    """Of a Ray of our own, its dashboard; others find a cluster by RAY_ADDRESS."""


@dataclass
class Job:
    """A stage's job; `ours` is false where another sweep submitted it first and this one only looks on."""

    cluster: Cluster
    id: str
    ours: bool
    _read: int = 0
    _tail: list[str] = field(default_factory=list)

    def status(self) -> JobStatus:
        return self.cluster.client.get_job_status(self.id)

    def ended(self) -> bool:
        return self.status() in ENDED

    def lines(self) -> list[str]:
        """Whole lines that the job has printed since the last call."""
        try:
            text = self.cluster.client.get_job_logs(self.id)
        except RuntimeError:
            return []  # its agent is starting or has gone; the status says which
        end = text.rfind("\n") + 1
        fresh, self._read = text[self._read : end].splitlines(), end
        self._tail = (self._tail + fresh)[-30:]
        return fresh

    def why(self) -> str:
        """What a job that ended says of it: its own error line, else Ray's."""
        self.lines()
        errors = [line.removeprefix("error: ") for line in self._tail if line.startswith("error: ")]
        return errors[-1] if errors else (self.cluster.client.get_job_info(self.id).message or "no message").strip()

    def error(self, words: str) -> DisScaleError:
        """The error of a job that ended: a mistake, a stop and a refusal keep their exit codes."""
        code = self.cluster.client.get_job_info(self.id).driver_exit_code
        kinds: dict[int | None, type[DisScaleError]] = {kind.exit_code: kind for kind in (UserError, Preempted, Held)}
        stopped = self.status() == JobStatus.STOPPED  # by `dis-scale stop` or `ray job stop`, in time or not
        return Preempted(words) if stopped else kinds.get(code, DisScaleError)(words)

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.cluster.client.stop_job(self.id)


@contextlib.contextmanager
def cluster(recipe: Recipe) -> Iterator[Cluster]:
    """The Ray that this process runs on (RAY_ADDRESS), else one of our own that ends with this block and with this process."""
    if address := os.environ.get("RAY_ADDRESS"):
        yield _joined(address, recipe)
        return
    folder = Path(tempfile.mkdtemp(prefix="dis-scale-ray-", dir="/tmp"))  # Ray's sockets need a short path
    head = None
    try:
        head, dashboard = _start_head(recipe, folder)
        yield Cluster(
            JobSubmissionClient(dashboard),
            {},
            f"a local Ray that this command started ({dashboard})",
            True,
            1,
            torch.cuda.device_count(),
            folder.name,
            dashboard,
        )
    finally:
        if head:
            head.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(20)
            head.kill()
        shutil.rmtree(folder, ignore_errors=True)


def choose_device(recipe: Recipe, gpus: int) -> tuple[str, str]:
    """Return (device, reason) on a cluster of `gpus` GPUs: `auto` takes them if each training worker gets one."""
    workers = recipe.train.world_sizes[-1]
    if recipe.device != "auto":
        return recipe.device, "the recipe names it"
    reason = f"auto: {gpus} GPUs for {workers} workers"
    return ("cuda" if gpus >= workers else "cpu"), reason


def submit(cluster: Cluster, recipe: Recipe, sweep: Folder, stage: str, *arguments: str) -> Job:
    """Submits the stage's next attempt, or joins the one that runs.

    Ray admits one of several that submit an id; the others join it. No id is ever used again.
    """
    prefix = "-".join([_prefix(sweep), stage, *arguments])
    attempts = {
        int(job.submission_id.rsplit("-", 1)[1]): job
        for job in cluster.client.list_jobs()
        if job.submission_id and job.submission_id.rpartition("-")[0] == prefix
    }
    last = max(attempts, default=0)
    if last and attempts[last].status not in ENDED:
        return Job(cluster, f"{prefix}-{last}", ours=False)
    return _submit(cluster, recipe, f"{prefix}-{last + 1}", ["pipelines", stage, sweep.url, *arguments])


def _prefix(sweep: Folder) -> str:
    """What the ids of all jobs of a sweep begin with."""
    return f"{sweep.name}-{hashlib.sha256(sweep.url.encode()).hexdigest()[:8]}"


def stop_all(sweep: Folder, address: str | None) -> list[str]:
    """Asks Ray to stop every job of the sweep that runs, whoever submitted it; returns their ids."""
    try:
        client = JobSubmissionClient(address)
        running = [job.submission_id for job in client.list_jobs() if job.status not in ENDED and job.submission_id]
    except (ConnectionError, RuntimeError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise UserError(f"no Ray answers at {where}: has the sweep ended already? (--address names another)") from error
    ours = [job for job in running if job.startswith(f"{_prefix(sweep)}-")]
    for job in ours:
        client.stop_job(job)
    return ours


def _submit(cluster: Cluster, recipe: Recipe, name: str, command: list[str]) -> Job:
    variables = cluster.runtime_env.get("env_vars", {}) | {
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(recipe.grace_s)),
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # on a shared machine, threads that spin for a core make a step five times as long
    }
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            cluster.client.submit_job(
                entrypoint=shlex.join([sys.executable, "-m", *command]),
                submission_id=name,
                runtime_env=cluster.runtime_env | {"env_vars": variables},
            )
            return Job(cluster, name, ours=True)
        except (RuntimeError, ValueError) as error:
            if "already" in str(error):
                return Job(cluster, name, ours=False)
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise DisScaleError(f"Ray did not take the job {name}: {' '.join(str(error).split())[:300]}") from error
        time.sleep(1)  # a Ray that has just started, on a busy machine: its agent comes up after its dashboard


def stop(jobs: list[Job], wait_s: float) -> None:
    """Asks Ray to stop the jobs that we submitted and waits up to `wait_s` for their end."""
    for job in jobs:
        if job.ours:
            job.stop()
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and not all(job.ended() for job in jobs if job.ours):
        time.sleep(0.3)


def one_node() -> bool:
    """Whether the cluster that this process runs on has a single node."""
    import ray

    _connect()
    return sum(node["Alive"] for node in ray.nodes()) == 1


def in_ray_job() -> bool:
    """Whether this process is the driver of a Ray job, whose working folder is a copy that goes with it."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _connect() -> None:
    import ray

    if not ray.is_initialized():
        try:
            with keeping_handlers():
                ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=False)
        except (ConnectionError, ValueError) as error:
            address = os.environ.get("RAY_ADDRESS")
            raise UserError(
                f"no Ray answers at RAY_ADDRESS={address}: start it, or unset the variable to run here"
            ) from error


@contextlib.contextmanager
def keeping_handlers() -> Iterator[None]:
    """Puts the handlers of SIGTERM and SIGINT back: after Ray's own, a stop would end this process before anything is saved."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not installed from Python, and not ours
                signal.signal(number, handler)


def _joined(address: str, recipe: Recipe) -> Cluster:
    """The cluster at RAY_ADDRESS; children get this job's own code package."""
    import ray

    _connect()
    parent = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    resources = ray.cluster_resources()
    slots = resources.get("train") or resources.get("GPU") or resources.get("CPU", 1)
    room = max(1, int(slots) // recipe.train.most_workers)
    keep = {
        key: value for key, value in parent.items() if key in ("working_dir", "py_modules", "pip", "uv", "env_vars")
    }
    return Cluster(
        JobSubmissionClient(), keep, f"the Ray cluster at {address}", False, room, int(resources.get("GPU", 0)),
        ray.get_runtime_context().get_session_name(),
    )  # fmt: skip


def _start_head(recipe: Recipe, folder: Path) -> tuple[subprocess.Popen, str]:
    """A Ray head on loopback with free ports, that dies with this process; (its process, the dashboard's URL)."""
    port, dashboard, agent = free_ports(3)
    resources = {
        "prepare": 1, "precompute": recipe.precompute.workers, "train": recipe.train.most_workers,
        "evaluate": recipe.evaluate.workers,
    }  # fmt: skip
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true",
        f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--temp-dir={folder}", f"--resources={json.dumps(resources)}", f"--object-store-memory={256 * 2**20}",
        f"--num-cpus={max(os.cpu_count() or 1, recipe.train.most_workers, recipe.precompute.workers)}",
    ]  # fmt: skip
    said = (folder / "start.log").open("wb")
    environment = (
        os.environ
        | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux, too: without it Ray swaps 127.0.0.1 for the machine's address
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # its jobs have ended before it is asked to
            "RAY_worker_niceness": "0",  # Ray's 15 leaves training no room above the evaluation's 19
        }
    )
    head = subprocess.Popen(
        command,
        stdout=said,
        stderr=subprocess.STDOUT,
        env=environment,
        preexec_fn=_die_with_parent,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + START_TIMEOUT_S
    while head.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(ConnectionError, RuntimeError):
            JobSubmissionClient(url).list_jobs()
            return head, url
        time.sleep(0.3)
    head.kill()
    tail = " ".join((folder / "start.log").read_text(errors="replace").split())[-300:]
    raise DisScaleError(
        f"a local Ray would not start within {START_TIMEOUT_S:.0f} s (ports {port}, {dashboard}, {agent}): {tail}"
    )


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _die_with_parent() -> None:
    """Linux: the kernel ends this child when its parent dies, also by -9; Ray's own processes follow their head in the same way."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def require_root(recipe: Recipe) -> str:
    """The storage root's URL; a folder of one node will not do on a cluster of several.

    Inside a Ray job, whose working folder is a copy that goes with it, a relative one is put below the node's home.
    """
    root = recipe.storage.root
    on_disk = "://" not in root or root.startswith("file://")
    if not on_disk or "RAY_ADDRESS" not in os.environ:
        return root
    if not one_node():
        raise UserError(
            f"storage.root: {root!r} is a folder of one node, and this cluster has several: "
            "give a root that all reach, for example --set storage.root=s3://bucket/prefix"
        )
    moved = in_ray_job() and not root.startswith(("/", "file://"))
    return str(Path.home() / "dis-scale" / root) if moved else root
