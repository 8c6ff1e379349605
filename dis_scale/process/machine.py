"""What machine this is. Imports the standard library only: a bare machine's benchmarks record it, too."""

import platform
from pathlib import Path


def processor() -> str:
    """Return the name of this machine's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
