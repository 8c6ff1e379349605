"""What machine this is. Imports the standard library only: a bare machine's benchmarks record it, too."""

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
    """Return ports of an address of this machine, "" for all of them, that are free now.

    They are below those that the kernel gives to outgoing connections (32768 on): one of these could take a port before its program
    listens there. Kubernetes' own are from 30000 on, and Ray's workers have those below 20000. cluster/slurm.sh takes some of these
    for itself, before its programs ask for others.
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
