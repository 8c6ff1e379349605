"""Failures of workers: which have a cause that a new attempt may survive, and which of several is to blame."""

import errno
import re
import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import ray

from dis_scale.process.errors import FULL, BrokenDevice, DisScaleError, OutOfMemory, StorageAway
from dis_scale.storage.retries import PASSING
from dis_scale.training.devices import NODE, REJECTED, lacks_memory

DEVICE = re.compile(
    r"AcceleratorError|CUDA (unknown |driver )?error|Triton Error \[CUDA\]|CUDA driver initialization failed|"
    r"No CUDA GPUs are available|cudaGetDeviceCount|NVIDIA driver|cuDNN error|(CUBLAS|CUDNN|CUSOLVER|CUFFT)_(STATUS_|[A-Z_]*FAILED)"
)
"""Parts of the errors of a GPU that fails: memory with uncorrectable errors, a failed launch, a device that is busy or gone, or a
node whose driver or fabric manager does not run."""
CONNECTION = re.compile(
    r"gloo|NCCL|Dist(Backend|Network|Store)Error|Socket Timeout|socket has (timed out|failed to listen)|Connection (closed|reset)"
)
"""Parts of the errors of a process group that lost a member, or whose port another process has taken."""
AMBIGUOUS = re.compile(r"illegal memory access|misaligned address|illegal instruction")
"""Parts of the errors of a program or of a device: worth another attempt, but no reason to exclude a node."""
DISK = (*FULL, errno.EIO, errno.EROFS)
"""Errors of a node's own disk, in the cache of kernels or a temporary file. Storage raises its own class."""
SHORT = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)
"""Errors of a node that is short of memory, processes or files."""
NETWORK = (errno.EADDRINUSE, *PASSING)
"""Errors of connections, and of a network's file system that has the programs."""
Cause = Literal["device", "lost", "storage", "memory", "mistake", "connection"]
CAUSES = get_args(Cause)
"""Causes in the order of blame. Of several failures the first in this order is reported: all others break connections."""
LOST = (
    ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.ActorUnschedulableError,
    ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError, ray.exceptions.LocalRayletDiedError,
    ray.exceptions.ObjectLostError, ray.exceptions.RuntimeEnvSetupError, ray.exceptions.OutOfDiskError, ray.exceptions.RpcError,
)  # fmt: skip
"""Errors of a worker whose process is gone: Ray killed it because its node ran low on memory, or its node or the node that held its
answer is gone. Also errors of a worker that a node could not start, such as a new node that did not get the program."""
ACCIDENTS = {"device", "lost", "storage", "connection"}
"""Causes after which a new attempt may succeed."""


class WorkerFailure(DisScaleError):
    """An attempt ended by an accident that a new attempt may survive: a lost worker, a broken connection, a hang, storage that was
    away, a failed device. `worker` is the number of the worker to blame, if any."""

    def __init__(self, words: str, done: int = 0, silent_s: float = 0.0, cause: Cause = "lost", worker: int | None = None) -> None:
        super().__init__(words)
        self.done, self.silent_s, self.at = done, silent_s, time.time()
        self.cause, self.worker = cause, worker
        self.nodes = frozenset[str]()
        """Names of the nodes that the attempt ran on, as far as they are known."""
        self.node = ""
        """Name of the node of the worker to blame, if it is known."""
        self.node_gone = False
        """Whether one of `nodes` is gone, as a node of spare capacity may be at any time."""


class Hang(WorkerFailure):
    """No step ended for a while: all workers wait, and it is not known for which of them."""


def failure_to_raise(failures: Sequence[tuple[int, Exception]], done: int, silent_s: float) -> Exception:
    """Return the error to raise for failures, each with the number of its worker.

    That is the failure to blame: the peers of a lost worker only report the broken connection.
    """
    worker, worst = min(failures, key=lambda failure: CAUSES.index(blame(failure[1])))
    cause = blame(worst)
    if cause == "mistake":
        return worst
    if cause == "memory":
        return OutOfMemory(describe(worst), done, silent_s)
    return WorkerFailure(describe(worst), done, silent_s, cause, worker)


def failure_of(result: Any) -> Exception | None:
    """Return what a finished task of Ray raised, or None."""
    try:
        ray.get(result)
    except ray.exceptions.RayError as error:
        return error
    return None


def may_pass(error: Exception) -> bool:
    """Return whether a new attempt may succeed: after a lost worker, a failed device, a broken connection or a storage outage."""
    return blame(error) in ACCIDENTS


def blame(error: Exception) -> Cause:
    """Return the cause of an error of Ray, or of storage in this process. An error of no known accident is a mistake."""
    if isinstance(error, LOST):
        return "lost"
    cause = cause_of(error)
    if isinstance(cause, StorageAway):
        return "storage"
    if isinstance(cause, OSError | MemoryError | BrokenDevice):
        return _blame_system(cause)
    if not isinstance(cause, RuntimeError):
        return "mistake"
    if lacks_memory(cause):
        return "memory"
    text = f"{type(cause).__name__}: {cause}"
    if REJECTED.search(text):
        return "mistake"
    if AMBIGUOUS.search(text) or NODE.search(text):
        return "lost"
    if DEVICE.search(text):
        return "device"
    return "connection" if CONNECTION.search(text) else "mistake"


def _blame_system(error: Exception) -> Cause:
    """Return the cause of an error of a node: its device or disk, its memory, its network."""
    code = getattr(error, "errno", None)
    if isinstance(error, BrokenDevice) or code in DISK:
        return "device"
    if isinstance(error, MemoryError) or code in SHORT:
        return "lost"
    return "connection" if isinstance(error, ConnectionError | TimeoutError) or code in NETWORK else "mistake"


def cause_of(error: BaseException) -> BaseException:
    """Return what a worker raised, without the traceback and addresses that Ray adds."""
    return error.cause if isinstance(error, ray.exceptions.RayTaskError) else error


def describe(error: Exception) -> str:
    """Return an error of Ray in one line."""
    if isinstance(error, LOST):
        return f"a worker was lost ({' '.join(str(error).split())[:200]})"
    return " ".join(str(cause_of(error)).split())[:300]
