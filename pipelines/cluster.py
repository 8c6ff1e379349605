"""The Ray of a sweep: the cluster that this process runs in, or a local Ray that this process starts and that ends with it.

Pitfalls: two raylets on one machine collide on the port of the dashboard agent, unless each gets a port of its own; `ray.init`
replaces our handler of SIGTERM. We never run `ray stop`: it ends all Rays of the machine.
"""

import contextlib
import ctypes
import fcntl
import itertools
import json
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.job_submission import JobSubmissionClient

from dis_scale.process.errors import UserError, counted, lines_of
from dis_scale.process.machine import free_ports
from dis_scale.recipe import Recipe
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import RECIPE, Sweep
from dis_scale.training.devices import smallest_gpu_bytes, usable_gpus
from pipelines import packages
from pipelines.nodes import LostNode
from pipelines.ray_private import DashboardClient, Resources, gpu_bytes_by_node, job_facts, known_nodes
from pipelines.shared_folder import require_shared
from pipelines.silence import NotStarted, RayEnded, Silence, Unanswered
from pipelines.stage import keeping_handlers

START_TIMEOUT_S = 90.0
_FOLDER = "dis-scale-ray-"
"""Prefix of a local Ray's folder in /tmp. Its mode is 0700, since Ray opens the folder `ray` that it makes inside to all users."""
NOT_INHERITED = ("RAY_AUTH_TOKEN", "PYTHONDONTWRITEBYTECODE")
"""Environment variables that a local Ray does not get. The first would take precedence over the token's file. With the second each
process would compile PyTorch to bytecode again, which takes five seconds of CPU time."""
_OURS = re.compile(r"http://(?:127\.0\.0\.1|localhost):(\d+)")
"""URL of a local Ray's dashboard. The port is part of the name of the token's file."""


@dataclass
class Cluster:
    """A Ray cluster that takes jobs."""

    client: JobSubmissionClient
    runtime_env: dict[str, Any]
    description: str
    ours: bool
    at_once: Callable[[], int]
    """Returns the number of models that can train at the same time now. This and the other numbers change when nodes join."""
    gpus: Callable[[], int]
    """Returns the number of GPUs."""
    gpu_fault: str
    """Why PyTorch cannot use this machine's GPUs; empty if it can, or if there are none."""
    id: str
    """Id that no other cluster has."""
    address: str | None = None
    """URL of a local Ray's dashboard; None for any other cluster, which is found by RAY_ADDRESS."""
    gpu_bytes: Callable[[], int | None] = lambda: None
    """Returns the memory in bytes of a local Ray's smallest GPU, or of another cluster's largest GPU; None if unknown."""
    require_alive: Callable[[], None] = lambda: None
    """Raises `RayEnded` if this is a local Ray that has ended."""
    unanswered: set[str] = field(default_factory=set)
    """Ids of jobs that were submitted without an answer: Ray may have accepted them."""


def ray_address() -> str | None:
    """Return RAY_ADDRESS, the cluster that this process is to use; None if it is empty or not set."""
    return os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def open_cluster(recipe: Recipe, say: Callable[[str], None] = print, go_on: Callable[[], None] = lambda: None) -> Iterator[Cluster]:
    """Yield the Ray that this process runs in (RAY_ADDRESS), otherwise a local Ray that ends with this block and process.

    If the Ray at RAY_ADDRESS does not answer, `say` logs this and it is asked again. `go_on` is called during each wait and may end
    the wait by an error.
    """
    if address := ray_address():
        yield _joined(address, recipe, Silence(say), go_on)
        return
    with _own_folder() as folder:
        head = None
        try:
            gpus, fault = usable_gpus()
            require_gpus(recipe, gpus, fault)
            head, dashboard = _start_head(recipe, folder, gpus, go_on)
            yield Cluster(
                client_of(dashboard), {}, f"a local Ray that this command started ({dashboard})",
                ours=True, at_once=lambda: 1, gpus=lambda: gpus, gpu_fault=fault, id=folder.name, address=dashboard,
                gpu_bytes=lambda: smallest_gpu_bytes() if gpus else None, require_alive=partial(_require_alive, head, folder),
            )  # fmt: skip
        finally:
            if head:
                head.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    head.wait(20)
                head.kill()


def require_gpus(recipe: Recipe, gpus: int, fault: str) -> None:
    """Raise UserError if the recipe needs more GPUs than this machine has; `fault` is the reason why others cannot be used."""
    if recipe.device == "cuda" and gpus < recipe.train.world_sizes[-1]:
        why = f"; {fault}" if fault else ""
        raise UserError(
            f"device: cuda for {recipe.train.workers} workers, but this machine has {counted(gpus, 'GPU')}{why}: "
            "--set device=auto takes what is there"
        )


def try_cluster(recipe: Recipe) -> str:
    """Open the Ray that a sweep would use; return its version, its description and the time that it took."""
    began_s = time.monotonic()
    with open_cluster(recipe) as cluster:
        took_s = time.monotonic() - began_s
        return f"{metadata.version('ray')}, {cluster.description}, ready in {took_s:.0f} s"


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """Yield a new folder for a local Ray and remove it at the end. Also remove the folders that killed commands left."""
    for left in Path("/tmp").glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError), _locked(left):  # removed meanwhile, or in use
            if left.lstat().st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{_FOLDER}", dir="/tmp"))  # Ray's sockets need a short path
    try:
        with _locked(folder, waits=True):  # systemd locks a folder while it checks it
            folder = folder.rename(folder.with_name(folder.name[1:]))  # from here on another command may try to remove it
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, *, waits: bool = False) -> Iterator[None]:
    """Lock a folder for the block; OSError if it is no folder, or if another process holds the lock and `waits` is false.

    The kernel frees the lock when the process ends in any way. In /tmp, systemd deletes what was not used for ten days, except in
    locked folders.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def client_of(address: str | None) -> JobSubmissionClient:
    """Return a client of the Ray with this dashboard (default: RAY_ADDRESS), with its token if it is a local Ray of this machine.

    The token of any other Ray comes from the environment, by Ray's rules. Raises ConnectionError if no Ray answers.
    """
    token = _token_of(address) if address else None
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if address else ():
        os.environ.pop(variable, None)  # Ray prefers both to its `address` argument
    # The client logs the normal end of each websocket.
    logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.WARNING)
    return DashboardClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)


def _token_of(address: str) -> str | None:
    """Return the token of a local Ray of this user, None for any other Ray; the newest if a killed command left its folder."""
    ours, user = _OURS.fullmatch(address.rstrip("/")), os.getuid()
    files = Path("/tmp").glob(f"{_FOLDER}*/token-{ours[1]}") if ours else ()
    dated = [(status.st_mtime, path) for path in files if (status := path.lstat()).st_uid == user]
    return max(dated)[1].read_text() if dated else None


def require_root(recipe: Recipe, one_node: Callable[[], bool] | None = None, probe: Callable[[str], None] = require_shared) -> str:
    """Return the storage root's URL; UserError for a folder that is not the same one on all nodes of the cluster.

    LostNode instead if this is a job and the sweep is already in the folder: a node's mount broke since, and a later job may get
    other nodes.

    The working folder of a Ray job is a copy that is deleted with the job, so a relative root is moved below the node's home.
    """
    root = recipe.storage.root
    on_disk = "://" not in root or root.startswith("file://")
    if not on_disk or ray_address() is None:
        return root
    complete = root.startswith(("/", "file://"))
    if not (one_node or _one_node)():
        if not complete:
            raise UserError(
                f"storage.root: {root!r} is a folder of one node, and this cluster has several: give a root that all reach, "
                "for example --set storage.root=s3://bucket/prefix, or the complete path of a file system that all mount"
            )
        try:
            probe(root)
        except UserError as error:
            if in_job() and Sweep.below(open_folder(root), recipe).folder.exists(RECIPE):
                raise LostNode(f"{error}; the sweep is in it, so that a later job may do better") from error
            raise
        return root
    return str(Path.home() / "dis-scale" / root) if in_ray_job() and not complete else root


def in_ray_job() -> bool:
    """Return whether this process is the driver of a Ray job."""
    return job_facts() is not None


def in_job() -> bool:
    """Return whether this process is part of a job of Ray or of Slurm, which may continue a sweep of an earlier job."""
    return in_ray_job() or "SLURM_JOB_ID" in os.environ


def own_job() -> str | None:
    """Return the submission id of the Ray job whose driver this process is, None outside one."""
    facts = job_facts() or {}
    own: str | None = facts.get("metadata", {}).get("job_submission_id")
    return own


def models_at_once(recipe: Recipe, resources: Resources, known: Sequence[Resources] = ()) -> int:
    """Return how many models train at the same time on a cluster of these resources.

    0 if `known` nodes declare the resource `train` and all of these are away: the other nodes are for other stages.
    """
    if "train" not in resources and any("train" in node for node in known):
        return 0
    slots = resources.get("train") or resources.get("GPU") or resources.get("CPU", 1)
    return max(1, int(slots) // recipe.train.most_workers)


def _one_node() -> bool:
    """Return whether the cluster that this process runs in has a single node."""
    _connect()
    return sum(node["Alive"] for node in ray.nodes()) == 1


def _connect() -> None:
    if not ray.is_initialized():
        try:
            with keeping_handlers():
                ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=False)
        except ValueError as error:
            raise UserError(f"RAY_ADDRESS={ray_address()}: {lines_of(error)[0]}") from error
        except ConnectionError as error:
            kind = Unanswered if in_job() else UserError  # it was there a moment ago, and may be busy
            raise kind(f"no Ray answers at RAY_ADDRESS={ray_address()}: start it, or unset the variable to run here") from error


def _joined(address: str, recipe: Recipe, silence: Silence, go_on: Callable[[], None]) -> Cluster:
    """Return the cluster at RAY_ADDRESS. Its jobs get this job's code package, otherwise they would run other code."""
    _connect()
    packages.require_on_nodes(recipe)
    parent = (job_facts() or {}).get("runtime_env", {})
    client = reach(silence, go_on)

    def gpus() -> int:
        return silence.insist(lambda: int(ray.cluster_resources().get("GPU", 0)), go_on)

    inherited = ("working_dir", "py_modules", "pip", "uv", "env_vars")
    return Cluster(
        client, {key: value for key, value in parent.items() if key in inherited},
        f"the Ray cluster at {address}", ours=False,
        at_once=lambda: silence.ask(lambda: models_at_once(recipe, ray.cluster_resources(), known_nodes())) or 0,
        gpus=gpus, gpu_fault=usable_gpus()[1],
        id=ray.get_runtime_context().get_session_name(),
        gpu_bytes=lambda: largest_gpu_bytes(client, silence, go_on, gpus()),
    )  # fmt: skip


def reach(silence: Silence, go_on: Callable[[], None]) -> JobSubmissionClient:
    """Return a client of the Ray at RAY_ADDRESS."""
    return silence.insist(lambda: client_of(None), go_on)


def largest_gpu_bytes(client: JobSubmissionClient, silence: Silence, go_on: Callable[[], None], gpus: int) -> int | None:
    """Return the memory in bytes of a cluster's largest GPU; None if the nodes' agents report fewer than `gpus` GPUs.

    The agent of a node that joins reports late. The smaller GPUs of a mixed cluster may be there for evaluation.
    """
    reported = list(itertools.chain(*silence.insist(lambda: gpu_bytes_by_node(client), go_on)))
    return max(reported) if len(reported) >= max(1, gpus) else None


def _start_head(recipe: Recipe, folder: Path, gpus: int, go_on: Callable[[], None]) -> tuple[subprocess.Popen, str]:
    """Start a Ray head on loopback, with free ports and a token of its own; return its process and the dashboard's URL.

    The head dies with this process.
    """
    port, dashboard, agent, environments = free_ports(4)
    resources = {
        "prepare": 1, "precompute": recipe.precompute.workers, "train": recipe.train.most_workers,
        "evaluate": recipe.evaluate.workers,
    }  # fmt: skip
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true",
        f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--runtime-env-agent-port={environments}",  # else the head ends if a busy machine needs over 30 s to find it
        f"--temp-dir={folder}/ray", f"--resources={json.dumps(resources)}", f"--object-store-memory={256 * 2**20}",
        f"--num-cpus={max(os.cpu_count() or 1, recipe.train.most_workers, recipe.precompute.workers)}",
        f"--num-gpus={gpus}",  # Ray would also count GPUs that PyTorch cannot use
        "--no-monitor", "--include-log-monitor=false",  # 1 s of CPU time: neither autoscaler nor copies of logs are used here
    ]  # fmt: skip
    token = folder / f"token-{dashboard}"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED} | {
        "RAY_AUTH_MODE": "token",  # otherwise any user of this machine could submit a job, which runs as this one
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # also on Linux: otherwise Ray replaces 127.0.0.1 by the machine's address
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # its jobs have ended before it is stopped
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # a head never comes back, and each driver that waits for it uses a core
        "RAY_prestart_worker_first_driver": "0",  # prestarted workers lack a job's environment: no job would use them
        "RAY_worker_niceness": "0",  # with Ray's default of 15, evaluation's further 5 would hardly give training any priority
    }
    with (folder / "start.log").open("wb") as output:
        head = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, preexec_fn=_die_with_parent,
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    started = False
    try:
        started = answers(head, lambda: client_of(url).list_jobs(), go_on)
    finally:
        if not started:
            head.kill()
    if started:
        return head, url
    raise NotStarted(
        f"a local Ray did not start within {START_TIMEOUT_S:.0f} s (ports {port}, {dashboard}, {agent}): {_last_words(folder)}"
    )


def _require_alive(head: subprocess.Popen, folder: Path) -> None:
    """Raise RayEnded if the head has ended, as it does if one of its processes dies: its dashboard will never answer again."""
    if head.poll() is not None:
        raise RayEnded(f"the Ray that this command started has ended: {_last_words(folder)}")


def _last_words(folder: Path) -> str:
    return " ".join((folder / "start.log").read_text(errors="replace").split())[-300:]


def answers(
    head: subprocess.Popen, ask: Callable[[], object], between: Callable[[], None], time_s: float = START_TIMEOUT_S
) -> bool:
    """Ask the dashboard of a new head until it answers; return false if the head ends or `time_s` passes before that.

    `between` is called after each question without an answer; its errors are raised.
    """
    deadline = time.monotonic() + time_s
    while head.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, RuntimeError):  # requests' errors are of OSError
            ask()
            return True
        between()
        time.sleep(0.3)
    return False


_LIBC = ctypes.CDLL(None)
"""C library, loaded before any fork: during the fork another thread may hold the loader's lock."""


def _die_with_parent() -> None:
    """Let Linux kill this child when its parent dies, also by SIGKILL. Ray's own processes follow their head in the same way."""
    PR_SET_PDEATHSIG = 1
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
