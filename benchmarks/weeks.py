"""The metric rows of a run of weeks: `python -m benchmarks.weeks [days]`. Objects, requests and the time to read them.
Then the requests of a day by which a sweep is watched: heartbeats and polls, each made once and counted.

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
from collections.abc import Callable, Container, Iterator
from unittest.mock import patch

from dis_scale.process import faults
from dis_scale.recipe import reading
from dis_scale.storage import lease, manifest
from dis_scale.storage.folder import Folder, open_folder

from dis_scale.sweep import PointName, Sampled, Sweep, state
from dis_scale.tracking import rows
from dis_scale.tracking.rows import RowReader, RowWriter, compact
from pipelines import evaluate, metrics
from pipelines import train as train_job
from tests.support.documents import put_published

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


def watch(root: str) -> dict[str, Counter[str]]:
    """Return the requests of a day by their cause, for a sweep of two models, one of which trains and has rows each 10 s."""
    sweep = Sweep.below(open_folder(root), reading.load("tests/support/tiny.yaml", [f"storage.root={root}"]))
    model = next(iter(sweep.recipe.models))
    run, writer = sweep.run(model), RowWriter(sweep.run(model).log, 1)
    sweep.folder.write_json(TRACKING, {"uri": ""})
    for images in (0, 160):
        manifest.put(run.resume_point(PointName(images, 1)), {}, images=images)
    put_published(run.published_at(0), images=0)
    sweep.evaluation(Sampled(model, 0)).write_json(EVALUATED, {})
    backlog, reader = state.Backlog(sweep, tuple(sweep.recipe.models)), RowReader(run.log)
    backlog.left()
    reader.new()

    def copy() -> None:
        reader.new()
        sweep.folder.read_json(TRACKING)  # for each file of rows

    leases = (sweep.lease("sweep"), sweep.lease("evaluate"), run.lease)
    causes: dict[str, tuple[float, Callable[[], object]]] = {
        "heartbeats": (lease.BEAT_S, lambda: [folder.write("0001.beat", b"1") for folder in leases]),
        "poll for a stop request": (lease.BEAT_S, lease.Lease(sweep.lease("sweep"), 1).stop_requested),
        "evaluation's poll": (evaluate.LONGEST_POLL_S, lambda: (backlog.left(), state.training_over(sweep))),
        "copy of rows, no new ones": (2 * train_job.COPY_EVERY_S, reader.new),
        "copy of rows, a new file": (2 * train_job.COPY_EVERY_S, copy),
        "gauges": (metrics.REFRESH_EVERY_S, lambda: (metrics.show_run(sweep, model, 0), state.node_failures(sweep))),
        "backlog": (evaluate.BACKLOG_EVERY_S, state.Backlog(sweep, tuple(sweep.recipe.models)).left),
    }
    day = {}
    for cause, (every_s, make) in causes.items():
        if cause == "copy of rows, a new file":
            writer.add(160, {"loss": 1.0})
            writer.settle()
        with requests(verbs=(*OF_ROWS, "look up")) as made:
            make()
        day[cause] = Counter({verb: round(n * DAY_S / every_s) for verb, n in made.items()})
    return day


def price(made: Counter[str]) -> float:
    """Return the dollars of requests to S3. A look-up of a missing object is a read and a list, so all are counted as lists."""
    return sum(n * {"read": 0.0004, "delete": 0.0}.get(verb, 0.005) for verb, n in made.items()) / 1000


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
        day = Counter({verb: round(n / days) for verb, n in written.items()})
        print(json.dumps({
            "name": f"rows of {days:g} days", "rows": count, "objects": len(sizes), "mb": round(sum(sizes.values()) / 1e6, 1),
            "requests_a_day": day, "dollars_a_day": round(price(day), 2),
            "read_s": round(time.perf_counter() - began_s, 1), "requests_to_read": read.total(),
        }))  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        for cause, made in watch(scratch).items():
            print(json.dumps({"name": cause, "requests_a_day": made, "dollars_a_day": round(price(made), 2)}))


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
