"""Signals to the command: each requests a stop, also that of a terminal that was closed."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipelines.signals import Stop, obeying_signals
from tests.support import sweeps

PROGRAM = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from pipelines.signals import Stop, obeying_signals

    stop_requested = Stop()
    with obeying_signals(stop_requested):
        print("ready", flush=True)
        deadline = time.monotonic() + float(sys.argv[2])
        while not stop_requested.is_set() and time.monotonic() < deadline:
            time.sleep(0.05)
        Path(sys.argv[1]).write_text(f"stop requested: {stop_requested.is_set()}")
        print("a line to the terminal", flush=True)
""")


def close_the_terminal(out: Path, within_s: float, *before: str) -> int:
    """Run the program on a terminal of its own, which is closed as soon as the program is ready; return its exit code."""
    master, terminal = pty.openpty()
    command = [*before, sys.executable, "-c", PROGRAM, str(out), str(within_s)]
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command],
        cwd=sweeps.ROOT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"PYTHONPATH": str(sweeps.ROOT)},
    )
    os.close(terminal)
    shown = b""
    while not shown.endswith(b"\n"):  # closed before the end of the line, the terminal would fail the program's write
        shown += os.read(master, 1024)
    os.close(master)
    return process.wait(60)


def test_a_closed_terminal_requests_a_stop(tmp_path: Path) -> None:
    assert close_the_terminal(tmp_path / "out", 60) == 0
    assert (tmp_path / "out").read_text() == "stop requested: True"


def test_under_nohup_a_closed_terminal_changes_nothing(tmp_path: Path) -> None:
    close_the_terminal(tmp_path / "out", 2, "env", "--ignore-signal=HUP")
    assert (tmp_path / "out").read_text() == "stop requested: False"


@pytest.mark.parametrize("signals", [1, 2])
def test_only_a_second_signal_ends_the_process_at_once(signals: int) -> None:
    """Not the first after a stop that was requested through storage, while jobs save."""
    stop_requested = Stop()
    stop_requested.set()
    ended = contextlib.nullcontext() if signals == 1 else pytest.raises(KeyboardInterrupt)
    with ended, obeying_signals(stop_requested):
        for _ in range(signals):
            signal.raise_signal(signal.SIGINT)


def test_signals_that_come_while_others_are_obeyed_block_nothing() -> None:
    """A lock that one of them holds would be waited for by the next one, in the same thread, for ever."""
    program = """
        import signal, time
        from pipelines.signals import Stop

        stop, until_s = Stop(), time.monotonic() + 0.5
        signal.signal(signal.SIGALRM, lambda *_: stop.set())
        signal.setitimer(signal.ITIMER_REAL, 2e-4, 2e-4)
        while time.monotonic() < until_s:
            stop.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=sweeps.ROOT, timeout=60, check=True)


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])
def test_each_signal_requests_a_stop(tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "out"), "60"]
    with subprocess.Popen(command, cwd=sweeps.ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
        assert process.wait(60) == 0
    assert (tmp_path / "out").read_text() == "stop requested: True"
