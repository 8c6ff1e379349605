"""Facts about this machine. Imports only the standard library: benchmarks of a bare machine also record them."""

import contextlib
import errno
import platform
import random
import socket
from pathlib import Path


def processor() -> str:
    """Return the name of this machine's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Return ports that are free now at an address of this machine; "" for all its addresses.

    The kernel gives ports from 32768 on to outgoing connections: such a connection could take a port before its program listens
    there. Kubernetes uses ports from 30000 on, and Ray's workers use ports below 20000. The returned ports are between these.
    cluster/slurm.sh takes some of them for itself, before its programs ask for others.
    """
    found = list[int]()
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            port = random.SystemRandom().randrange(20_000, 30_000)
            try:
                stack.enter_context(socket.socket()).bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                found.append(port)
    return found
