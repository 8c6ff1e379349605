"""The device that a stage computes on, and the check of a worker's device and connections before an attempt writes anything."""

import json
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dis_scale.process import faults
from dis_scale.process.errors import BrokenDevice, UserError, WrongKernel, counted, lines_of
from dis_scale.recipe import Recipe

if TYPE_CHECKING:
    import torch

SIDE = {"cpu": 64, "cuda": 1024}
"""Rows and columns of the matrices that are multiplied as a check."""
SUMMED = {"cpu": 2**16, "cuda": 2**24}
"""Numbers that are summed over a group as a check: as many as gradients, since a bad link may pass only a few kilobytes."""

PCI = Path("/sys/bus/pci/devices")
"""The kernel lists the machine's devices here, with a driver or without."""
NVIDIA, DISPLAY = "0x10de", "0x03"
"""PCI vendor, and first digits of the class of graphics devices."""
MEMORY = re.compile(
    r"OutOfMemoryError|(CUDA (driver )?error|Triton Error \[CUDA\]): out of memory|Cuda failure \d+ 'out of memory'|"
    r"_STATUS_ALLOC_FAILED|NVML_SUCCESS == r INTERNAL ASSERT"
)
"""Parts of the errors of a GPU whose memory is too small: from PyTorch, its expandable segments, Triton, NCCL and cuBLAS. The last
part is PyTorch's error if NVML, which it asks for its message, does not report which process holds the memory."""
UNSUPPORTED = re.compile(r"driver on your system is too old|no kernel image is available")
"""Parts of the errors of a driver or a GPU that this PyTorch does not support."""
REJECTED = re.compile(
    r"(CUDA (driver )?error|Triton Error \[CUDA\]): (device-side assert triggered|invalid |no kernel image|device kernel image"
    r" is invalid)|_STATUS_INVALID_VALUE"
)
"""Parts of the errors of a GPU that rejects a program's request. Every device would reject it."""
NODE = re.compile("std::bad_alloc|can't start new thread|unable to mmap|Cannot allocate memory|Too many open files")
"""Parts of the errors of a node that is short of memory, processes or files."""
FOREIGN = 0.25
"""Fraction of a GPU's memory, beyond the evaluators' share. Other processes that hold more are blamed for a lack of memory."""
REMEDY = "this PyTorch needs the NVIDIA driver R580 or newer, and a GPU newer than Volta"


def check_on_all_ranks(check: Callable[[], object]) -> None:
    """Run the same check of the device on all ranks; collective.

    On a rank whose check fails, raises BrokenDevice if the check passes on others, which run the same program on the same case.
    Raises WrongKernel if it fails on all ranks and these are on several nodes. Raises the check's own error if memory is too small,
    or if all ranks are on one node.
    """
    import torch.distributed as dist

    failure: Exception | None = None
    try:
        check()
    except Exception as error:  # any error, also of Triton's compiler or of CUDA: the other ranks wait for an answer
        failure = error
    passed = [False] * dist.get_world_size()
    dist.all_gather_object(passed, failure is None, group=dist.new_group(backend="gloo"))
    if failure and any(passed) and not lacks_memory(failure):
        raise BrokenDevice(f"this device fails where those of {sum(passed)} other ranks do not: {failure}") from failure
    several_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    if several_nodes and isinstance(failure, RuntimeError) and not lacks_memory(failure) and not NODE.search(str(failure)):
        # CUDA's message is that of a failed device: without this error, one node after another would be excluded
        words = f"the kernels fail on all {len(passed)} ranks ({failure}): set train.scan, or train.graphs: false"
        raise WrongKernel(words) from failure
    if failure:
        raise failure


def device_of(recipe: Recipe, gpus: int) -> tuple[str, str]:
    """Return (device, reason) on a cluster of `gpus` GPUs. `auto` uses them if they suffice for the smallest world size."""
    workers = recipe.train.world_sizes[-1]
    if recipe.device != "auto":
        return recipe.device, "the recipe names it"
    reason = f"auto: {counted(gpus, 'GPU')} for {counted(workers, 'worker')}"
    return ("cuda" if gpus >= workers else "cpu"), reason


def usable_gpus(cuda: Any = None, pci: Path = PCI) -> tuple[int, str]:
    """Return the number of this machine's GPUs that PyTorch can use; if it can use none of them, also the reason and the remedy.

    `cuda` is `torch.cuda`, or a test's replacement; `pci` lists the machine's devices.
    """
    import torch

    cuda = cuda or torch.cuda
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = [cuda.get_device_name(n) for n in range(cuda.device_count())] if cuda.is_available() else []
        usable = [n for n in range(len(names)) if _has_kernels(cuda.get_arch_list(), cuda.get_device_capability(n))]
    present = nvidia_gpus(pci)
    if usable or not (names or present):
        return len(usable), ""
    if names:
        return 0, f"{names[0]}: no kernels for its compute capability; {REMEDY}"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) in ("", "-1"):
        return 0, f"CUDA_VISIBLE_DEVICES={visible} hides {present} NVIDIA GPUs"
    said = " ".join(str(caught[0].message).split())[:200] if caught else "PyTorch finds no NVIDIA driver"
    return 0, f"{present} NVIDIA GPUs cannot be used: {said}; {REMEDY}"


def smallest_gpu_bytes() -> int:
    """Return the memory of the smallest of this machine's GPUs."""
    import torch

    return min(torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count()))


def _has_kernels(names: list[str], capability: tuple[int, int]) -> bool:
    """Whether a PyTorch built for these architectures supports a GPU of this compute capability.

    A binary (`sm_`) runs on GPUs of its major version that are not older; PTX (`compute_`) is compiled for any GPU not older.
    """
    built = [match.groups() for name in names if (match := re.match(r"(sm|compute)_(\d+)", name))]
    versions = [(kind, divmod(int(version), 10)) for kind, version in built]
    return any(version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in versions)


def nvidia_gpus(pci: Path = PCI) -> int:
    """Return the number of NVIDIA's graphics devices in this machine, with a driver or without."""
    devices = pci.glob("*") if pci.exists() else []
    return sum(_reads(d / "vendor", NVIDIA) and _reads(d / "class", DISPLAY) for d in devices)


def _reads(file: Path, start: str) -> bool:
    return file.exists() and file.read_text().startswith(start)


def torch_device(device: str) -> "torch.device":
    """Return the device that this worker computes on: one GPU is visible."""
    import torch

    return torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")


def hide_others(number: int) -> None:
    """Hide all visible GPUs but GPU `number` from this process, so that it is `cuda` in each thread. Call before CUDA starts.

    Raises UserError if that GPU is itself hidden.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number)] if visible is None else visible.split(",")[number : number + 1]
    if not names or not names[0]:
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible} hides GPU {number}, which this worker is for")
    os.environ["CUDA_VISIBLE_DEVICES"] = names[0]


def check_device(device: "torch.device") -> None:
    """Raise BrokenDevice unless the device allocates memory and multiplies two matrices of small integers exactly.

    Raises UserError with the remedy if this PyTorch does not support the device or its driver.
    """
    import torch

    side = SIDE[device.type]
    u = torch.arange(side) % 7 - 3.0  # exact also in TF32
    try:
        faults.at("check")
        product = u.to(device)[:, None].repeat(1, side) @ u.to(device)[None].repeat(side, 1)
    except RuntimeError as error:
        if UNSUPPORTED.search(str(error)):
            raise UserError(f"node {socket.gethostname()}: {lines_of(error)[0]}; {REMEDY}") from error
        raise
    if wrong := int((product.cpu() != side * torch.outer(u, u)).sum()):
        raise BrokenDevice(f"{device}: {wrong} of {side * side} elements of a matrix product are wrong")


def check_on_node(device: "torch.device", shared: float = 0.0) -> None:
    """Check the device of a worker that could also run on another node.

    Raises BrokenDevice also in these cases: this PyTorch does not support the device or its driver; the device does not start, for
    example without a fabric manager; other processes hold all its memory, and it is not shared.
    """
    try:
        check_device(device)
    except UserError as error:
        raise BrokenDevice(str(error)) from error
    except RuntimeError as error:
        lacks = lacks_memory(error)
        elsewhere = device.type == "cpu" or NODE.search(str(error)) or REJECTED.search(str(error))  # not the device's fault
        if (lacks and shared) or (not lacks and elsewhere):
            raise
        words = "other processes left no memory for a matrix of 4 MiB" if lacks else "it does not multiply two matrices"
        raise BrokenDevice(f"{device}: {words}: {error}") from error


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error reports that a GPU's memory is too small. Such errors have several classes, so the text decides."""
    return isinstance(error, RuntimeError) and bool(MEMORY.search(f"{type(error).__name__}: {error}"))


@contextmanager
def blaming_others(device: "torch.device", shared: float = 0.0, cuda: Any = None) -> Iterator[None]:
    """Raise BrokenDevice if GPU memory is too small because other processes hold it: foreign ones, or ones that do not end.

    An error that PyTorch's compiler wraps is raised unwrapped: a full disk is no mistake, and no driver can unpickle the wrapper.
    Evaluators may hold the fraction `shared`. `cuda` is `torch.cuda`, or a test's replacement.
    """
    import torch

    cuda = cuda or (torch.cuda if device.type == "cuda" else None)
    try:
        yield
    except RuntimeError as raised:
        error: Exception = getattr(raised, "inner_exception", raised)
        if cuda and lacks_memory(error):
            free, total = cuda.mem_get_info(device)
            others = total - free - cuda.memory_reserved(device)
            if others > (shared + FOREIGN) * total:
                held = f"other processes hold {others / 2**30:.1f} of {total / 2**30:.1f} GiB"
                raise BrokenDevice(f"{device}: {held}: {lines_of(error)[0]}") from error
        if error is raised:
            raise
        raise error from error.__cause__


def check_group(device: "torch.device") -> None:
    """Raise DistBackendError unless the sum over all ranks of the process group is right; collective.

    No worker is blamed: a wrong sum has passed through all workers, and the matrix product of each was right.
    """
    import torch
    import torch.distributed as dist

    total = torch.full((SUMMED[device.type],), dist.get_rank() + 1.0, device=device)
    dist.all_reduce(total)
    require_sum(total, dist.get_world_size())
    if device.type == "cuda":
        del total
        torch.cuda.empty_cache()


def require_sum(total: "torch.Tensor", world: int) -> None:
    """Raise DistBackendError unless each element is the sum of 1 to `world`."""
    import torch.distributed as dist

    if bool((total != world * (world + 1) / 2).any()):
        raise dist.DistBackendError(
            f"{total.device}: a sum over {world} workers is {total[0]:g}, expected {world * (world + 1) / 2:g}"
        )


def flight_record() -> str:
    """Return this process's groups and unfinished collectives, one line each, as recorded by PyTorch's flight recorder."""
    import torch._C._distributed_c10d as c10d

    described = []
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # NCCL's, then gloo's
        if (dump := getattr(c10d, name, None)) is None:
            continue  # PyTorch for the CPU only
        record = json.loads(dump(includeCollectives=True, onlyActive=True))
        for group, status in record["pg_status"].items():
            counts = ", ".join(f"{name.removesuffix('_collective')} {number}" for name, number in status.items())
            described.append(f"process group {group}: {counts}")
        for each in record.get("entries", []):
            if not each["retired"]:
                name, number, state = each["profiling_name"], each["collective_seq_id"], each["state"]
                described.append(f"{name} number {number}, sizes {each['input_sizes']}: {state}")
    return "".join(f"{line}\n" for line in described)
