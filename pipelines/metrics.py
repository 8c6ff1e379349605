"""Metrics for Prometheus, through the exporter of each node's Ray agent, which adds the prefix `ray_`.

Gauges are set by a stage's driver, from what is in storage. Ray drops a gauge that was not set for some 20 s, so each is exported
every few seconds with its last value; a process that ends takes its gauges with it. Totals are counted in each process, and Ray
adds the label WorkerId: sum them. Times are Unix times: an age grows also if the process that would report it hangs. Ray exports no
NaN: a loss that is not finite shows in the skipped steps.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ray.util.metrics import Counter, Gauge

from dis_scale.process import context, counts
from dis_scale.recipe import Train
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.documents import ResumePointManifest
from dis_scale.tracking.goodput import ATTEMPT
from dis_scale.tracking.rows import Row

PREFIX = "dis_scale_"
EXPORT_EVERY_S, REFRESH_EVERY_S = 5.0, 60.0
"""Interval at which a process exports its totals, and at which a driver reads storage for its gauges."""
LABELS = ("sweep", "model")
GAUGES = {
    "images_per_second": "Training throughput over all workers.",
    "step_seconds": "Time of one training step.",
    "mfu_ratio": "Model FLOP/s over the peak FLOP/s of the devices, from 0 to 1.",
    "loss": "Training loss of the last logged step.",
    "gradient_norm": "Norm of the gradient of the last logged step, before clipping.",
    "skipped_steps": "Steps of the run that were skipped because their gradient was not finite.",
    "images_seen": "Images that the run has seen.",
    "training_begun_timestamp_seconds": "Time at which the job of this training began; its restarts do not change it.",
    "waiting_workers": "Workers that wait for capacity.",
    "row_timestamp_seconds": "Time of the newest metric row.",
    "attempts": "Number of the run's current attempt.",
    "resume_point_timestamp_seconds": "Time of the newest complete resume point.",
    "resume_interval_seconds": "Time between two resume points at the current throughput.",
    "goodput_ratio": "Share of the run's time that went into lasting steps, at its newest resume point.",
    "failed_nodes": "Nodes that are excluded because their devices failed.",
    "mlflow_away": "1 if the last copy to MLflow failed, otherwise 0.",
    "evaluation_backlog": "Published checkpoints that are not evaluated, counted for each sampling setting.",
}
"""Each gauge, by its name without the prefix."""
FROM_ROWS = {
    "images_per_s": "images_per_second",
    "mfu": "mfu_ratio",
    "loss": "loss",
    "gradient_norm": "gradient_norm",
    "skipped": "skipped_steps",
    ATTEMPT: "attempts",
}
"""Metric rows, and the gauges that show the last of each."""
_made: dict[str, Any] = {}
_gauges: dict[tuple[str, tuple[str, ...]], float] = {}
"""Last value of each gauge, by its name and the values of its labels."""
_exported = dict.fromkeys(counts.MEANINGS, 0.0)
_exporting = threading.Lock()


def gauge(name: str, value: float) -> None:
    """Set a gauge of this process's sweep and model."""
    labels = _labels()
    _gauges[name, tuple(labels.values())] = value
    with contextlib.suppress(Exception):  # a metric never stops the thread that sets it
        _set(name, labels, value)


def _set(name: str, labels: dict[str, str], value: float) -> None:
    if name not in _made:
        _made[name] = Gauge(PREFIX + name, GAUGES[name], LABELS)
    _made[name].set(value, labels)


def export_gauges() -> None:
    """Export all gauges again: Ray drops one that was not set for some 20 s."""
    for (name, values), value in list(_gauges.items()):
        _set(name, dict(zip(LABELS, values, strict=True)), value)


def _labels() -> dict[str, str]:
    return {label: context.facts.get(label, "") for label in LABELS}


def export_totals() -> None:
    """Export what this process has counted since the last call."""
    for name, total in counts.totals().items():
        if name not in _made:
            _made[name] = Counter(f"{PREFIX}{name}_total", counts.MEANINGS[name], LABELS)
            _made[name]._record(0, _labels())  # `inc` refuses 0, without which Prometheus misses the first increase
        if total > _exported[name]:
            _made[name].inc(total - _exported[name], _labels())
            _exported[name] = total


def start() -> None:
    """Export this process's totals and gauges from now on, in a thread of its own."""
    if _exporting.acquire(blocking=False):
        threading.Thread(target=_export, daemon=True, name="metrics").start()


def _export() -> None:
    while True:
        with contextlib.suppress(Exception):  # metrics never stop a process
            export_totals()
            export_gauges()
        time.sleep(EXPORT_EVERY_S)


@contextlib.contextmanager
def refreshing(refresh: Callable[[], None], every_s: float = REFRESH_EVERY_S) -> Iterator[None]:
    """Call `refresh` in a thread of its own during the block; what it raises is left out."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            with contextlib.suppress(Exception):  # storage that is away: the ages grow
                refresh()
            over.wait(every_s)

    threading.Thread(target=run, daemon=True, name="gauges").start()
    try:
        yield
    finally:
        over.set()


def show_rows(rows: Iterable[Row], settings: Train, since: float) -> None:
    """Set the gauges of training from rows that were written after `since`: older ones are an earlier driver's."""
    shown = sorted((row for row in rows if row.time >= since), key=lambda row: row.time)
    for row in shown:
        gauge("images_seen", row.images)
        gauge("row_timestamp_seconds", row.time)
        if row.name in FROM_ROWS:
            gauge(FROM_ROWS[row.name], row.value)
        if row.name == "images_per_s" and row.value > 0:
            gauge("step_seconds", settings.batch_images / row.value)
            gauge("resume_interval_seconds", settings.resume_every_images / row.value)


def show_run(sweep: Sweep, model: str, excluded: int) -> None:
    """Set the gauges that come from a run's newest resume point, and the number of its excluded nodes."""
    gauge("failed_nodes", excluded)
    run = sweep.run(model)
    point = state.newest_complete(run)
    if point and (saved := ResumePointManifest.find(run.resume_point(point))):
        gauge("resume_point_timestamp_seconds", saved.progress.at)
        gauge("goodput_ratio", saved.progress.cost.goodput or 0.0)
