"""Failures of workers: which of their errors a new attempt may survive, and which of several is to blame."""

import errno
from pathlib import Path

import pytest
import ray
import torch
from torch.distributed import DistStoreError

from dis_scale.process.errors import BrokenDevice, OutOfMemory, StorageAway, StorageError
from dis_scale.storage import lease
from dis_scale.storage.folder import open_folder
from dis_scale.training import resume
from pipelines.failures import CAUSES, WorkerFailure, blame, describe, failure_to_raise, may_pass

ECC = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
PEER_LOST = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")


def test_the_reason_of_an_attempt_that_failed_is_kept_in_words(tmp_path: Path) -> None:
    failure = WorkerFailure("no step ended for 901 s: hanging")
    with pytest.raises(WorkerFailure), lease.hold(open_folder(tmp_path)):
        raise failure
    holding = lease.last_holding(open_folder(tmp_path))
    assert holding
    assert holding.end
    assert holding.end.why == "WorkerFailure: no step ended for 901 s: hanging"
    assert describe(failure) == "no step ended for 901 s: hanging"


@pytest.mark.parametrize(
    ("cause", "passes"),
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (StorageAway("cannot write"), True),
        (StorageError("no space left on the device"), False),
        (ValueError("gloo"), False),
        (DistStoreError("The client socket has timed out after 600000ms while trying to connect to (a, 1)"), True),
        (RuntimeError("The client socket has timed out after 600000ms while trying to connect to (a, 1)"), True),
        (ECC, True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("CUDA error: unknown error"), True),
        (RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment"), True),
        (RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"), True),
        (RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"), True),
        (RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/c10/cuda/CUDACachingAllocator.cpp":1174'), False),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), True),
        (RuntimeError("No CUDA GPUs are available"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (BrokenDevice("cuda:0: 3 of 1048576 elements of a matrix product are wrong"), True),
        (RuntimeError("Triton Error [CUDA]: uncorrectable ECC error encountered"), True),
        (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), True),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), False),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False),
        (RuntimeError("CUDA driver error: out of memory"), False),
        (RuntimeError("CUDA driver error: unspecified launch failure"), True),
        (RuntimeError("CUDA driver error: invalid argument"), False),
        (RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"), False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (torch.AcceleratorError("CUDA error: invalid configuration argument"), False),
        (torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`"), False),
        (OSError(errno.ENOSPC, "No space left on device", "/cache/triton/x"), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (OSError(errno.ESTALE, "Stale file handle", "/nfs/module.py"), True),
        (OSError(errno.EADDRINUSE, "Address already in use"), True),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), True),
        (TimeoutError("timed out"), True),
        (RuntimeError("The server socket has failed to listen on any local network address. EADDRINUSE"), True),
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (OUT_OF_MEMORY, False),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
    ],
    ids=str,
)
def test_a_broken_connection_or_device_restarts_as_a_lost_worker_does(cause: Exception, passes: bool) -> None:
    assert may_pass(task_error(cause)) == passes


def test_a_rank_whose_storage_is_slow_ends_an_attempt_and_no_model(tmp_path: Path) -> None:
    """Rank 0 waits for its sidecar for as long as that rank tries again."""
    with pytest.raises(StorageAway, match=r"rank-00001\.json: not written within 0 s; this resume point stays") as away:
        resume.await_sidecar(open_folder(tmp_path), 1, wait_s=0.0)
    assert may_pass(away.value)


def test_a_worker_that_ray_killed_for_its_nodes_memory_is_a_lost_one() -> None:
    error = ray.exceptions.OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.\nMemory on the node")
    assert may_pass(error)
    assert describe(error).startswith("a worker was lost (1 worker(s) were killed due to the node running low on memory.")


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.ActorUnschedulableError("The node specified via NodeAffinitySchedulingStrategy doesn't exist any more"),
        ray.exceptions.NodeDiedError("the node died"),
        ray.exceptions.WorkerCrashedError(),
        ray.exceptions.LocalRayletDiedError(),
        ray.exceptions.ObjectLostError("ab", None, ""),
        ray.exceptions.OwnerDiedError("ab", None, ""),
        ray.exceptions.RuntimeEnvSetupError("Failed to download the package of the working directory: no space left"),
        ray.exceptions.OutOfDiskError("the local disk is full"),
        ray.exceptions.RpcError("unavailable"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_node_that_dies_while_a_worker_is_placed_or_answers_is_an_accident(error: Exception) -> None:
    assert may_pass(error)
    assert describe(error).startswith("a worker was lost (")


def task_error(cause: Exception) -> ray.exceptions.RayTaskError:
    return ray.exceptions.RayTaskError("train", "trace", cause)


@pytest.mark.parametrize(
    ("failures", "kind", "cause", "words"),
    [
        ([PEER_LOST, ECC], WorkerFailure, "device", "uncorrectable ECC"),
        ([PEER_LOST, OSError(errno.EIO, "Input/output error")], WorkerFailure, "device", "Input/output error"),
        ([PEER_LOST, StorageAway("503")], WorkerFailure, "storage", "503"),
        ([PEER_LOST, OUT_OF_MEMORY], OutOfMemory, None, "Tried to allocate"),
        ([PEER_LOST, RuntimeError("CUDA driver error: out of memory")], OutOfMemory, None, "CUDA driver error"),
        ([PEER_LOST, ValueError("mistake")], ray.exceptions.RayTaskError, None, "trace"),
        ([ConnectionResetError(errno.ECONNRESET, "reset"), ValueError("mistake")], ray.exceptions.RayTaskError, None, "trace"),
        ([PEER_LOST, PEER_LOST], WorkerFailure, "connection", "Connection closed"),
    ],
)
def test_of_several_failures_the_one_to_blame_is_raised(
    failures: list[Exception], kind: type[Exception], cause: str | None, words: str
) -> None:
    raised = failure_to_raise(list(enumerate(map(task_error, failures))), done=160, silent_s=2.0)
    assert type(raised) is kind
    if isinstance(raised, WorkerFailure):
        assert raised.cause == cause
    assert words in str(raised)
    assert blame(task_error(failures[1])) in CAUSES


def test_a_failure_knows_its_worker_and_the_progress_before_it() -> None:
    numbered = [(3, task_error(PEER_LOST)), (5, task_error(ECC))]
    raised = failure_to_raise(numbered, done=160, silent_s=2.0)
    assert isinstance(raised, WorkerFailure)
    assert (raised.cause, raised.worker, raised.done, raised.silent_s) == ("device", 5, 160, 2.0)


@pytest.mark.parametrize("words", ["an illegal memory access was encountered", "misaligned address"])
def test_an_error_that_may_be_the_programs_is_tried_again_and_blames_no_node(words: str) -> None:
    assert blame(task_error(torch.AcceleratorError(f"CUDA error: {words}"))) == "lost"
