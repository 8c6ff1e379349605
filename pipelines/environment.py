"""Environment variables of a job's processes: how threads wait, and what becomes of freed memory. Read when a process starts."""

import os

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads sleep while they wait. Spinning threads that share a core with another process make a step up to five times as long."""
SPINNING = {"GOMP_SPINCOUNT": "20000"}
"""Threads spin briefly before they sleep: 8 % faster alone, a quarter slower next to a busy process (benchmarks/threads.py)."""
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(10 * 2**30)}
"""glibc keeps freed memory; by default each step returns its large tensors to the kernel and faults them in again."""


def words() -> str:
    """Return in words what this process's variables choose."""
    waiting = "spin briefly, then sleep," if SPINNING.keys() <= os.environ.keys() else "sleep"
    memory = "kept" if KEEP_FREED_MEMORY.keys() <= os.environ.keys() else "returned to the system"
    return f"threads {waiting} while they wait; freed memory is {memory}"
