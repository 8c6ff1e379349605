"""Stand-ins of other programs' commands."""

from pathlib import Path


def stand_in(folder: Path, command: str, script: str = "") -> None:
    """Write a shell script that is called `command`, for those who find `folder` first in PATH."""
    path = folder / command
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
