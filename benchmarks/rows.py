"""Rows of a benchmark: jobs timed in turn, ratios of pairs, one JSON line per row and a table at the end.

In each round every job runs up to ten times and its least time counts, so that the two jobs of a row are timed close together. A
row's ratio is the median of the rounds' ratios. Goals are ratios, so that they hold on another machine of the same kind.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Job = Callable[[], Any]
SLOW_S = 6.0
"""A slower job is timed only once, in seconds."""


class Row(NamedTuple):
    """A comparison. `ratio` is the peer's time divided by ours if `at_least` (larger is better), else ours by the peer's.

    Both times are first divided by the work of their job (`work`), such as multiply-adds or tokens.
    """

    name: str
    job: str
    peer: str
    goal: float | None
    at_least: bool
    work: tuple[float, float] = (1.0, 1.0)

    def ratio(self, ours_s: float, peer_s: float) -> float:
        ours_s, peer_s = ours_s / self.work[0], peer_s / self.work[1]
        return peer_s / ours_s if self.at_least else ours_s / peer_s


def on_threads(count: int, job: Job) -> Job:
    """The job on `count` threads."""

    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        job()
        torch.set_num_threads(before)

    return run


def measure(jobs: dict[str, Job], rounds: int, slow_s: float = SLOW_S) -> dict[str, list[float]]:
    """Times of each job in seconds, one per round. In a round a job runs for half a second, at most ten times.

    Each job runs once before it is timed: its first run may compile kernels for a minute.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for name, job in jobs.items():
        job()
        first = _timed(job)
        if first > slow_s:
            times[name].append(first)
    quick = {name: job for name, job in jobs.items() if not times[name]}
    for _ in range(rounds):
        for name, job in quick.items():
            deadline, least = time.perf_counter() + 0.5, float("inf")
            for _ in range(10):
                least = min(least, _timed(job))
                if time.perf_counter() > deadline:
                    break
            times[name].append(least)
    return times


def least_times(jobs: dict[str, Job], rounds: int) -> dict[str, float]:
    """Least time of each job in seconds, since other work can only add time. The first round is a warm-up."""
    least = dict.fromkeys(jobs, float("inf"))
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            least[name] = min(least[name], time.perf_counter() - start if turn else float("inf"))
    return least


def _timed(job: Job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def report(rows: list[Row], times: dict[str, list[float]], more: list[tuple[str, float, float | None]] | None = None) -> None:
    """Print the rows. `more` are other ratios: name, ratio, largest allowed ratio."""
    table = []
    for row in rows:
        pairs = [row.ratio(*pair) for pair in zip(times[row.job], times[row.peer], strict=False)]
        ratio, ours, peer = (statistics.median(x) for x in (pairs, times[row.job], times[row.peer]))
        facts = {"ms": 1e3 * ours, "peer_ms": 1e3 * peer, "ratio": ratio, "pairs": len(pairs)}
        print(json.dumps(row._asdict() | facts))
        met = verdict(ratio, row.goal, at_least=row.at_least)
        table.append((row.name, f"{1e3 * ours:9.3f}", f"{1e3 * peer:9.3f}", ratio, met))
    for name, ratio, goal in more or []:
        print(json.dumps({"name": name, "ratio": ratio, "goal": goal}))
        table.append((name, "", "", ratio, verdict(ratio, goal, at_least=False)))
    print(f"\n{'':54} {'ms':>9} {'peer ms':>9} {'ratio':>8}  goal")
    for name, ms, peer_ms, ratio, goal_met in table:
        print(f"{name:54} {ms:>9} {peer_ms:>9} {ratio:8.2f}  {goal_met}")


def verdict(ratio: float, goal: float | None, *, at_least: bool) -> str:
    if goal is None:
        return ""
    met = ratio >= goal if at_least else ratio <= goal
    return f"{'>=' if at_least else '<='} {goal:g} {'met' if met else 'MISSED'}"
