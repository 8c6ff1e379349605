"""Processes of a drill or a test, and what can happen to them."""

import signal
import subprocess


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to the command and all its descendants, so that none can clean up."""
    import psutil

    for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        try:
            child.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
