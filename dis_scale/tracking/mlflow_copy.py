"""Copies a sweep's results from storage to MLflow: one evaluation or the report as they come, or everything at once.

Each row is sent once, with its own first time, so an empty MLflow that is filled later holds the same as the first.
Read next: tracking/mlflow.py.
"""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from dis_scale.process.errors import Damaged, DisScaleError, UserError
from dis_scale.sweep import GRID, Sampled, Sweep, images_name, state
from dis_scale.sweep.documents import Metrics
from dis_scale.tracking.mlflow import RunCopy, create_runs, fault
from dis_scale.tracking.rows import Row, RowReader

log = logging.getLogger(__name__)
LAST = "metrics"
"""Part of an evaluation whose seconds are its last row, sent after the grid: a run with that row has the full evaluation."""


def copy_evaluation(sweep: Sweep, sampled: Sampled, copy: RunCopy | None = None) -> bool:
    """Copy one evaluation's grid, values, and the seconds that they took; return whether MLflow has them.

    `copy` is the copy of the model's run. If many evaluations share it, MLflow is queried once for what it has. Files that are
    missing or damaged in storage are logged and left out.
    """
    folder, copy, sent = sweep.evaluation(sampled), copy or RunCopy(sweep, sampled.model), True
    try:
        grid = f"samples-{images_name(sampled.images_seen)}.png"
        sent = _send_file(copy, grid, folder.read(GRID), f"samples{_suffix(sampled.variant)}")
    except FileNotFoundError:
        log.warning("%s/%s is missing: MLflow gets the numbers only", folder, GRID)
    try:
        rows = rows_of_evaluation(sweep, sampled)
    except Damaged as error:
        log.warning("%s; MLflow does not get this evaluation", error)
        return sent
    last = _seconds(LAST, sampled.variant)  # all other rows are sent even if MLflow refuses files
    return copy.send(row for row in rows if sent or row.name != last) and sent


def rows_of_evaluation(sweep: Sweep, sampled: Sampled) -> list[Row]:
    """Return an evaluation's values, and the seconds that they took."""
    metrics, suffix = Metrics.read(sweep.evaluation(sampled)), _suffix(sampled.variant)
    values = {f"{name}{suffix}": value for name, value in metrics.values.items()}
    values |= {_seconds(name, sampled.variant): value for name, value in metrics.seconds.items()}
    return [Row(name, value, sampled.images_seen, metrics.time) for name, value in values.items()]


def copy_earlier(sweep: Sweep, raise_if_stopped: Callable[[], None] = lambda: None) -> None:
    """Copy the earlier evaluations that MLflow lacks; stop at the first copy that fails."""
    for model in sweep.recipe.models:
        copy = RunCopy(sweep, model)
        for sampled in evaluations_to_copy(sweep, model, copy):
            raise_if_stopped()
            if not copy_evaluation(sweep, sampled, copy):
                return


def evaluations_to_copy(sweep: Sweep, model: str, copy: RunCopy) -> list[Sampled]:
    """Return a model's evaluations, without ablations, that MLflow lacks; all if it is away."""
    missing = []
    for variant in sweep.recipe.evaluate.samplings:
        known = copy.images_of(_seconds(LAST, variant))
        counts = state.evaluated_counts(sweep, model, variant)
        missing += [Sampled(model, images, variant) for images in counts if images not in known]
    return missing


def _suffix(variant: str) -> str:
    return f"/{variant}" if variant else ""


def _seconds(part: str, variant: str) -> str:
    """Return the name of a row of seconds. MLflow shows `system/NAME` below the curves, but above them if it has another slash."""
    return "_".join(["system/evaluation", part, *([variant.replace("/", "_")] if variant else [])])


def copy_report(sweep: Sweep, status: str | None) -> bool:
    """Copy the report's files and, if the sweep has ended, its status; return whether MLflow has them.

    The status is sent first: an MLflow that hangs takes half a minute to fail, and a report has twenty files.
    """
    copy = RunCopy(sweep, None)
    if status and not copy.finish(status):
        return False
    sent = [_send_file(copy, name, sweep.report.read(name), "report") for name in sweep.report.list()]
    return all(sent)


def copy_everything(sweep: Sweep, parameters: dict[str, dict[str, object]], uri: str) -> int:
    """Copy all that storage holds of a sweep, with its runs' parameters; return the number of rows.

    DisScaleError if MLflow did not take all.
    """
    try:
        create_runs(sweep, uri, parameters)
    except UserError:
        raise
    except Exception as error:  # whatever MLflow raises
        raise DisScaleError(f"MLflow {fault(error)} at {uri}: {' '.join(str(error).split())[:200]}") from error
    models = [_copy_model(sweep, model) for model in sweep.recipe.models]
    copied = [taken for _, taken in models]
    if sweep.report.list():
        copied.append(copy_report(sweep, _status(sweep)))
    if not all(copied):
        raise DisScaleError(f"MLflow at {uri} did not take everything: run the same command again")
    return sum(rows for rows, _ in models)


def _status(sweep: Sweep) -> str | None:
    if state.all_evaluated(sweep):
        return "FINISHED"
    failed = any(state.ended(sweep, model) for model in sweep.recipe.models) or state.skipped(sweep)
    return "FAILED" if failed else None


def _copy_model(sweep: Sweep, model: str) -> tuple[int, bool]:
    """Copy one model's run: rows of training, evaluations, and how it ended; return the rows and whether all was taken."""
    copy, done, count = RunCopy(sweep, model), list[bool](), 0
    for rows in RowReader(sweep.run(model).log).batches():  # all rows of weeks would fill the memory
        done.append(copy.send(rows))
        count += len(rows)
        if not done[-1]:
            break
    done += [copy_evaluation(sweep, sampled, copy) for sampled in state.measured(sweep, model)]
    if state.ended(sweep, model):
        done.append(copy.finish("FAILED"))
    elif state.trained(sweep, model):
        done.append(copy.finish("FINISHED"))
    return count, all(done)


def _send_file(copy: RunCopy, name: str, data: bytes, folder: str) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / name).write_bytes(data)
        return copy.send_file(Path(scratch) / name, folder)
