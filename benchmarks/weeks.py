"""The metric rows of a run of weeks: `python -m benchmarks.weeks [days]`. Objects, requests and the time to read them.

Writes what training would write, by a simulated clock: a row every 5 s of 12 metrics, a file every 10 s, a merge at a resume point
each half hour, a preemption each six hours. Then reads it all as a new driver does, with 30 ms for each request.
"""

import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Container, Iterator
from unittest.mock import patch

from dis_scale import faults
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.tracking import rows
from dis_scale.tracking.rows import RowReader, RowWriter, compact

ROW_S, FILE_S, RESUME_S, PREEMPTED_S, DAY_S = 5, 10, 1800, 6 * 3600, 86_400
METRICS = (
    "loss",
    "loss_mse",
    "loss_vlb",
    "lr",
    "grad_norm",
    "images_per_s",
    "tokens_per_s",
    "mfu",
    "memory_gib",
    "paused",
    "ema",
    "skipped",
)
REQUEST_S = 0.03
OF_ROWS = ("read", "write", "delete", "list")
"""Kinds of requests that write, merge and read rows."""


@contextlib.contextmanager
def requests(latency_s: float = 0.0, verbs: Container[str] = OF_ROWS) -> Iterator[Counter[str]]:
    """Count the requests to storage of these kinds, and delay each."""
    counts = Counter[str]()

    def request(verb: str, **_: object) -> None:
        if verb in verbs:
            counts[verb] += 1
            time.sleep(latency_s)

    with patch.object(faults, "at", request):
        yield counts


def train(folder: Folder, days: float) -> None:
    """Write the rows of `days`."""
    attempts, writer = itertools.count(1), None
    for second in range(0, int(days * DAY_S), ROW_S):
        if second % PREEMPTED_S == 0:
            writer = RowWriter(folder, next(attempts))
        assert writer
        with patch.object(rows.time, "time", lambda second=second: 1.8e9 + second):
            writer.add(1000 * second, dict.fromkeys(METRICS, 1 / (second + 1)))
        if second % FILE_S == 0:
            writer.settle()
        if second % RESUME_S == 0:
            compact(folder)


def main(days: float = 14) -> None:
    with tempfile.TemporaryDirectory() as scratch, patch.object(os, "fsync", lambda _: None):
        folder = open_folder(scratch)
        with requests() as written:
            train(folder, days)
        sizes, reader, count = folder.sizes(), RowReader(folder), 0
        began_s = time.perf_counter()
        with requests(REQUEST_S) as read:
            for batch in reader.batches():
                count += len(batch)
        print(json.dumps({
            "name": f"rows of {days:g} days", "rows": count, "objects": len(sizes), "mb": round(sum(sizes.values()) / 1e6, 1),
            "requests_a_day": {verb: round(n / days) for verb, n in written.items()},
            "read_s": round(time.perf_counter() - began_s, 1), "requests_to_read": read.total(),
        }))  # fmt: skip


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
