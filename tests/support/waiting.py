"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable


def wait_until(true: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not true after {timeout_s:g} s"
        time.sleep(0.05)
