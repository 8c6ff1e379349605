"""Environment variables of our processes.

A process reads some when it starts: how threads wait, and what becomes of freed memory. These come with the job, and only the job's
own `env_vars` change them. Others are read when a process group is made: its network interface, and what is recorded for a hang. A
value of these that the node's environment sets is kept.
"""

import os

import psutil

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads sleep while they wait. Spinning threads that share a core with another process make a step up to five times as long."""
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(10 * 2**30)}
"""glibc keeps freed memory; by default each step returns its large tensors to the kernel and faults them in again."""
EXPANDABLE_SEGMENTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Freed memory of a GPU serves tensors of any size. The self-test and two sizes of forward passes would leave gaps otherwise."""

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
RECORDED_COLLECTIVES = {"TORCH_FR_BUFFER_SIZE": "2000"}
"""PyTorch's flight recorder keeps this many collectives of each process."""
NAMED_FAULTS = {"TORCH_NCCL_RETHROW_CUDA_ERRORS": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
"""A GPU's error is raised where training waits for the GPU. Otherwise NCCL would end the process before: its watchdog
without a reason, its monitor after eight minutes without an answer of the driver, before the stacks of a hang are logged."""
REPRODUCIBLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Sums in a fixed order: cuBLAS would choose a workspace by stream."""


def interface_of(ip: str) -> str | None:
    """Return the network interface that owns an address, None if none does, as behind an address translation."""
    owners = [name for name, addresses in psutil.net_if_addrs().items() if ip in {a.address for a in addresses}]
    return owners[0] if owners else None


def prepare_group(ip: str, device: str) -> str:
    """Set the variables of a process group on the node with this address; return the interfaces of gloo and NCCL in words.

    Without these variables gloo uses the address to which the host's name resolves, on Debian 127.0.1.1, and NCCL perhaps docker0.
    """
    name = interface_of(ip)
    values = dict(zip(INTERFACES, (name, f"={name}"), strict=True)) if name else {}  # "=": NCCL compares the complete name
    values |= RECORDED_COLLECTIVES | (REPRODUCIBLE | NAMED_FAULTS if device == "cuda" else {})
    for variable, value in values.items():
        os.environ.setdefault(variable, value)
    gloo, nccl = (os.environ.get(variable, "its own choice") for variable in INTERFACES)
    return f"gloo on {gloo}, NCCL on {nccl.removeprefix('=')}" if device == "cuda" else f"gloo on {gloo}"
