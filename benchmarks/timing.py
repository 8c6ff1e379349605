"""Times of jobs that are taken in turn, so that all meet the same machine; the least counts: other work can only add."""

import time
from collections.abc import Callable
from typing import Any


def least_times(jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds; the first round warms up."""
    least = dict.fromkeys(jobs, float("inf"))
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            least[name] = min(least[name], time.perf_counter() - start if turn else float("inf"))
    return least
