"""Devices: the check of a worker's finds a wrong product in no time; GPUs that PyTorch cannot use are counted and explained."""

import errno
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError
from torch._inductor.exc import InductorError
from torch.distributed import DistBackendError
from torch.overrides import TorchFunctionMode

from dis_scale.process.errors import BrokenDevice, UserError
from dis_scale.training import devices
from pipelines.failures import blame
from tests.support import store_requests

CPU = torch.device("cpu")


class WrongProducts(TorchFunctionMode):
    """A device that gets one element of each matrix product wrong."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.matmul or function is torch.Tensor.__matmul__:
            result[3, 4] += 1
        return result


def test_a_wrong_product_is_found() -> None:
    with WrongProducts(), pytest.raises(BrokenDevice, match="cpu: 1 of 4096 elements of a matrix product are wrong"):
        devices.check_device(CPU)


def test_a_wrong_sum_is_a_broken_connection_of_no_node() -> None:
    with pytest.raises(DistBackendError, match="cpu: a sum over 2 workers is 4, expected 3") as raised:
        devices.require_sum(torch.full((64,), 4.0), 2)
    assert blame(RayTaskError("check", "trace", raised.value)) == "connection"
    devices.require_sum(torch.full((64,), 3.0), 2)


def test_a_process_sees_one_of_the_gpus_that_it_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, after in [(None, "1"), ("4,6", "6"), ("GPU-a,GPU-b", "GPU-b")]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before or "")  # which is undone
        if before is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        devices.hide_others(1)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == after
    for before in ("", "0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
        with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={before} hides GPU 1, which this worker is for"):
            devices.hide_others(1)


def test_a_right_one_takes_milliseconds() -> None:
    devices.check_device(CPU)
    took_s = []
    for _ in range(5):
        began_s = time.perf_counter()
        devices.check_device(CPU)
        took_s.append(time.perf_counter() - began_s)
    assert min(took_s) < 0.02


TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver"


@dataclass
class Cuda:
    """What PyTorch says of a machine's GPUs, in the place of `torch.cuda`."""

    capabilities: list[tuple[int, int]] = field(default_factory=list)
    warning: str = ""

    def is_available(self) -> bool:
        if self.warning:
            warnings.warn(self.warning, stacklevel=2)
        return bool(self.capabilities)

    def device_count(self) -> int:
        return len(self.capabilities)

    def get_device_name(self, _: int) -> str:
        return "Some GPU"

    def get_device_capability(self, number: int) -> tuple[int, int]:
        return self.capabilities[number]

    def get_arch_list(self) -> list[str]:
        return ["sm_75", "sm_80", "sm_90", "compute_90"]


@pytest.fixture
def pci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an NVIDIA GPU, its audio device, and another maker's graphics device, as the kernel lists them."""
    for name, vendor, kind in [("0", "0x10de", "0x030200"), ("1", "0x10de", "0x040300"), ("2", "0x1234", "0x030000")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_a_gpu_whose_driver_is_too_old_is_counted_out_and_explained(pci: Path) -> None:
    count, fault = devices.usable_gpus(Cuda(warning=f"CUDA initialization: {TOO_OLD}"), pci)
    assert count == 0
    assert fault.startswith("1 NVIDIA GPUs cannot be used: CUDA initialization: The NVIDIA driver on your system is too old")
    assert fault.endswith("; this PyTorch needs the NVIDIA driver R580 or newer, and a GPU newer than Volta")


def test_a_gpu_without_a_driver_is_explained_and_a_hidden_one_named(pci: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fault = devices.usable_gpus(Cuda(), pci)
    assert fault.startswith("1 NVIDIA GPUs cannot be used: PyTorch finds no NVIDIA driver; ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert devices.usable_gpus(Cuda(), pci) == (0, "CUDA_VISIBLE_DEVICES=-1 hides 1 NVIDIA GPUs")


def test_a_machine_without_one_has_no_fault(tmp_path: Path) -> None:
    for missing in (tmp_path, tmp_path / "none"):
        assert devices.usable_gpus(Cuda(), missing) == (0, "")


@pytest.mark.parametrize(("capability", "count"), [((7, 0), 0), ((7, 5), 1), ((8, 6), 1), ((8, 9), 1), ((9, 0), 1), ((12, 0), 1)])
def test_a_gpu_without_kernels_is_counted_out(pci: Path, capability: tuple[int, int], count: int) -> None:
    usable, fault = devices.usable_gpus(Cuda([capability]), pci)
    assert (usable, fault == "") == (count, count == 1)


@dataclass
class Memory:
    """A GPU of 80 GiB of which others hold this much; this process holds 30."""

    others_gib: int

    def mem_get_info(self, _: torch.device) -> tuple[int, int]:
        return (50 - self.others_gib) << 30, 80 << 30

    def memory_reserved(self, _: torch.device) -> int:
        return 30 << 30


@pytest.mark.parametrize(
    ("others_gib", "shared", "cause"), [(3, 0.0, "memory"), (40, 0.0, "device"), (40, 0.3, "memory"), (49, 0.3, "device")]
)
def test_memory_that_others_hold_is_the_nodes_failure_and_not_too_small(others_gib: int, shared: float, cause: str) -> None:
    """The sweep continues elsewhere, with its planned passes; evaluators beside training hold what they may."""
    for short in (  # the second one is that of a segment that cannot grow
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("CUDA driver error: out of memory"),
    ):
        raised = pytest.raises((RuntimeError, BrokenDevice))
        with raised as error, devices.blaming_others(CPU, shared, Memory(others_gib)):
            raise short
        assert blame(RayTaskError("train", "", error.value)) == cause
        assert cause == "memory" or str(error.value).startswith(f"cpu: other processes hold {others_gib}.0 of 80.0 GiB: CUDA")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "device"), (MemoryError(), "lost"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"), (ValueError("a mistake"), "mistake"),
    ],
)  # fmt: skip
def test_what_pytorchs_compiler_wraps_has_its_own_cause(error: Exception, cause: str) -> None:
    """Its class cannot be unpickled by the driver, which would end the model."""
    with pytest.raises(type(error)) as raised, devices.blaming_others(CPU, 0.0, Memory(3)):
        raise InductorError(error, None)
    assert blame(RayTaskError("train", "", raised.value)) == cause


def test_a_machine_without_gpus_that_has_too_little_memory_says_so() -> None:
    """PyTorch was asked how much the GPU has, and the model ended by a mistake: expected a cuda device."""
    with pytest.raises(torch.OutOfMemoryError, match="no memory"), devices.blaming_others(CPU):
        raise torch.OutOfMemoryError("no memory")


def test_a_device_without_memory_for_its_check_is_full_of_others() -> None:
    with (
        store_requests.failing(torch.AcceleratorError("CUDA error: out of memory")),
        pytest.raises(BrokenDevice, match=r"^cpu: other processes left no memory for a matrix of 4 MiB: CUDA error"),
    ):
        devices.check_on_node(CPU)
    with store_requests.failing(torch.AcceleratorError("CUDA error: out of memory")), pytest.raises(torch.AcceleratorError):
        devices.check_on_node(CPU, shared=0.2)


@pytest.mark.parametrize(
    "words",
    [
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver",
        "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices()? Error 802",
        "PyTorch gives a device that does not start words of its own in each version",
    ],
)
def test_a_node_whose_device_does_not_start_is_avoided(words: str) -> None:
    """Without a driver, without the fabric manager of its NVSwitches, or else."""
    gpu, refused = torch.device("cuda", 0), pytest.raises(BrokenDevice, match=r"^cuda:0: it does not multiply two matrices: ")
    with store_requests.failing(RuntimeError(words)), refused:
        devices.check_on_node(gpu)
    for others in ("can't start new thread", "CUDA error: device-side assert triggered"):
        with store_requests.failing(RuntimeError(others)), pytest.raises(RuntimeError, match=others):
            devices.check_on_node(gpu)


def test_a_workers_gpu_that_is_not_supported_is_a_mistake_with_a_remedy() -> None:
    with (
        store_requests.failing(RuntimeError(TOO_OLD)),
        pytest.raises(UserError, match=r"^node .*: The NVIDIA driver on your system is too old .* R580 or newer"),
    ):
        devices.check_device(CPU)
