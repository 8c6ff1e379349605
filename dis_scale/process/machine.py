"""What machine this is. Imports the standard library only: a bare machine's benchmarks record it, too."""

import contextlib
import platform
import socket
from pathlib import Path


def processor() -> str:
    """Return the name of this machine's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Return ports of an address of this machine, "" for all of them, that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((host, 0))
        return [each.getsockname()[1] for each in sockets]
