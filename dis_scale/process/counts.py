"""Totals of this process since its start, for metrics: each is counted where it happens and exported by pipelines/metrics.py."""

import threading
import time

RESTARTS, TAKEOVERS = "restarts", "lease_takeovers"
STORAGE_RETRIES, STORAGE_AWAY_S = "storage_retries", "storage_away_seconds"
CACHE_HITS, CACHE_MISSES = "cache_hits", "cache_misses"
MEANINGS = {
    RESTARTS: "Attempts that ended by an accident and were followed by another.",
    TAKEOVERS: "Leases taken over from a holder that did not end them.",
    STORAGE_RETRIES: "Requests to storage that failed and were tried again.",
    STORAGE_AWAY_S: "Seconds in which at least one request waited for storage that did not answer.",
    CACHE_HITS: "Shards read from the node's cache.",
    CACHE_MISSES: "Shards read from storage because the node's cache did not have them.",
}
"""Each total, by its name without the prefix and suffix that the exporter adds."""
_totals, _until, _lock = dict.fromkeys(MEANINGS, 0.0), dict.fromkeys(MEANINGS, 0.0), threading.Lock()


def add(name: str) -> None:
    """Add one to one of this process's totals."""
    with _lock:
        _totals[name] += 1


def add_seconds(name: str, began_s: float) -> None:
    """Add the time since `began_s` (monotonic), without the part that other threads have already added."""
    with _lock:
        now_s = time.monotonic()
        _totals[name] += now_s - max(began_s, _until[name])
        _until[name] = now_s


def totals() -> dict[str, float]:
    """Return this process's totals by name."""
    with _lock:
        return dict(_totals)
