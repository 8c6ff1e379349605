"""Workers: which of their errors a new attempt may survive, which of several is to blame, and the stacks that they return."""

import pytest
import ray
import torch
from torch.distributed import DistStoreError

from dis_scale.process.errors import BrokenDevice, StorageAway, StorageError
from pipelines import worker
from pipelines.worker import CAUSES, DeviceFailure, OutOfMemory, Worker, WorkerFailure, blame, may_pass

ECC = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
PEER_LOST = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")


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
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), True),
        (RuntimeError("No CUDA GPUs are available"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (BrokenDevice("cuda:0: 3 of 1048576 elements of a matrix product are wrong"), True),
        (RuntimeError("Triton Error [CUDA]: uncorrectable ECC error encountered"), True),
        (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), True),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), False),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (torch.AcceleratorError("CUDA error: invalid configuration argument"), False),
        (torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`"), False),
        (OUT_OF_MEMORY, False),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
    ],
    ids=str,
)
def test_a_broken_connection_or_device_restarts_as_a_lost_worker_does(cause: Exception, passes: bool) -> None:
    assert may_pass(task_error(cause)) == passes


def test_a_worker_that_ray_killed_for_its_nodes_memory_is_a_lost_one() -> None:
    error = ray.exceptions.OutOfMemoryError(
        "1 worker(s) were killed due to the node running low on memory.\nMemory on the node"
    )
    assert may_pass(error)
    assert worker.describe(error).startswith(
        "a worker was lost (1 worker(s) were killed due to the node running low on memory."
    )


def task_error(cause: Exception) -> ray.exceptions.RayTaskError:
    return ray.exceptions.RayTaskError("train", "trace", cause)


@pytest.mark.parametrize(
    ("failures", "kind", "words"),
    [
        ([PEER_LOST, ECC], DeviceFailure, "uncorrectable ECC"),
        ([PEER_LOST, StorageAway("503")], WorkerFailure, "503"),
        ([PEER_LOST, OUT_OF_MEMORY], OutOfMemory, "Tried to allocate"),
        ([PEER_LOST, ValueError("mistake")], ray.exceptions.RayTaskError, "trace"),
        ([PEER_LOST, PEER_LOST], WorkerFailure, "Connection closed"),
    ],
)
def test_of_several_failures_the_one_to_blame_is_raised(
    monkeypatch: pytest.MonkeyPatch, failures: list[Exception], kind: type[Exception], words: str
) -> None:
    monkeypatch.setattr(ray, "wait", lambda results, **_: (results, []))
    monkeypatch.setattr(worker, "failure_of", lambda number: task_error(failures[number]))
    with pytest.raises(kind, match=words) as raised:
        worker._raise_failure([0], range(len(failures)), 0, 0.0)
    assert getattr(raised.value, "worker", 1) == 1
    assert blame(task_error(failures[1])) in CAUSES


@pytest.mark.parametrize("words", ["an illegal memory access was encountered", "misaligned address"])
def test_an_error_that_may_be_the_programs_is_tried_again_and_blames_no_node(words: str) -> None:
    assert blame(task_error(torch.AcceleratorError(f"CUDA error: {words}"))) == "lost"


def test_the_hang_watch_ends_with_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it a worker only writes: storage that is slow is no hang."""
    rounds = iter([([], ["result"])] * 3 + [(["result"], [])])
    monkeypatch.setattr(ray, "wait", lambda *_, **__: next(rounds))
    monkeypatch.setattr(ray, "get", lambda _: [320])
    monkeypatch.setattr(ray, "kill", lambda _: None)
    monkeypatch.setattr(
        worker._Polls, "ask", lambda polls, _: setattr(polls, "done", [320]) or setattr(polls, "unplaced", [])
    )
    monkeypatch.setattr(worker, "_log_stacks", lambda _: None)
    assert worker.watch(["worker"], ["result"], lambda _: None, hang_after_s=-1.0, last=320) == [320]
    rounds = iter([([], ["result"])] * 3)
    with pytest.raises(WorkerFailure, match="hanging"):
        worker.watch(["worker"], ["result"], lambda _: None, hang_after_s=-1.0, last=336)


def test_stacks_name_the_running_function() -> None:
    assert "test_stacks_name_the_running_function" in Worker().stacks()
