"""Metrics for Prometheus, through the exporter of each node's Ray agent, which adds the prefix `ray_`.

Gauges are set by a stage's driver, from what is in storage. Ray drops a gauge that was not set for some 20 s, so each is exported
every few seconds with its last value; a process that ends takes its gauges with it. Totals are counted in each process, and Ray
adds the label WorkerId: sum them. Times are Unix times: an age grows also if the process that would report it hangs. Ray exports no
NaN: a loss that is not finite shows in the skipped steps.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable

from ray.util.metrics import Counter, Gauge

from dis_scale.process import counts
from dis_scale.process.context import Context
from dis_scale.recipe import Train
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.documents import ResumePointManifest
from dis_scale.tracking.goodput import ATTEMPT
from dis_scale.tracking.rows import Row
from pipelines import ray_private

PREFIX = "dis_scale_"
EXPORT_EVERY_S, REFRESH_EVERY_S = 5.0, 60.0
"""Interval at which a process exports its totals, and at which a driver reads storage for its gauges."""
LABELS = ("sweep", "model", "folder")
GAUGES = {
    "images_per_second": "Training throughput over all workers.",
    "step_seconds": "Time of one training step.",
    "mfu_ratio": "Model FLOP/s over the peak FLOP/s of the devices, from 0 to 1.",
    "loss": "Training loss of the last logged step.",
    "gradient_norm": "Norm of the gradient of the last logged step, before clipping.",
    "skipped_steps": "Steps of the run that were skipped because their gradient was not finite.",
    "images_seen": "Images that the run has seen.",
    "training_begun_timestamp_seconds": "Time at which the job of this training began; its restarts do not change it.",
    "training_workers": "Workers of the run's current attempt; 0 while it waits for them.",
    "training_workers_most": "The fewest workers of the recipe's range that are as fast as its most.",
    "waiting_workers": "Workers that wait for capacity.",
    "waited_timestamp_seconds": "Time at which the last wait for capacity of more than ten minutes ended.",
    "row_timestamp_seconds": "Time of the newest metric row.",
    "attempts": "Number of the run's current attempt.",
    "resume_point_timestamp_seconds": "Time of the newest complete resume point.",
    "resume_interval_seconds": "Time between two resume points at the current throughput.",
    "goodput_ratio": "Share of the run's time that went into lasting steps, at its newest resume point.",
    "failed_nodes": "Nodes that are excluded because their devices failed.",
    "mlflow_away": "1 if the last copy to MLflow failed, otherwise 0.",
    "sweep_alive_timestamp_seconds": "Time of the last turn of the loop of the sweep's command.",
    "sweep_ended_timestamp_seconds": "Time at which the sweep's command ended with all done, or by a stop request.",
    "models_failed": "Models that have failed, while others may go on.",
    "evaluation_failed": "1 if the last evaluation job failed, otherwise 0.",
    "progress_timestamp_seconds": "Time at which the stage's work last advanced, or had nothing to do, or no worker.",
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
SetGauge = Callable[[str, float], None]
"""Sets a gauge of a sweep's model."""


class Exporter:
    """Exports a process's gauges and totals through its node's agent, with the labels of its context."""

    def __init__(self, context: Context) -> None:
        self._labels = {label: getattr(context, label) or "" for label in LABELS}
        self._made: dict[str, Counter | Gauge] = {}
        self._gauges: dict[str, float] = {}
        """Last value of each gauge."""
        self._exported = dict.fromkeys(counts.MEANINGS, 0.0)

    def start(self) -> None:
        """Export totals and gauges from now on, in a thread of its own."""
        threading.Thread(target=self._export, daemon=True, name="metrics").start()

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._gauges[name] = value
        with contextlib.suppress(Exception):  # a metric never stops the thread that sets it
            self._gauge(name).set(value, self._labels)

    def export_totals(self) -> None:
        """Export what this process has counted since the last call."""
        for name, total in counts.totals().items():
            if name not in self._made:
                self._made[name] = Counter(f"{PREFIX}{name}_total", counts.MEANINGS[name], LABELS)
                ray_private.count_from_zero(self._made[name], self._labels)
            if total > self._exported[name]:
                self._made[name].inc(total - self._exported[name], self._labels)
                self._exported[name] = total

    def _gauge(self, name: str) -> Gauge:
        if name not in self._made:
            self._made[name] = Gauge(PREFIX + name, GAUGES[name], LABELS)
        return self._made[name]

    def _export(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # metrics never stop a process
                self.export_totals()
                for name, value in list(self._gauges.items()):  # Ray drops one that was not set for some 20 s
                    self._gauge(name).set(value, self._labels)
            time.sleep(EXPORT_EVERY_S)


def show_rows(rows: Iterable[Row], settings: Train, since: float, gauge: SetGauge) -> None:
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


def show_run(sweep: Sweep, model: str, gauge: SetGauge) -> None:
    """Set the gauges that come from a run's newest resume point, and the number of excluded nodes."""
    gauge("failed_nodes", len(state.excluded_nodes(sweep)))
    run = sweep.run(model)
    point = state.newest_complete(run)
    if point and (saved := ResumePointManifest.find(run.resume_point(point))):
        gauge("resume_point_timestamp_seconds", saved.progress.at)
        gauge("goodput_ratio", saved.progress.cost.goodput or 0.0)
