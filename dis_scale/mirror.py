"""Storage into MLflow: what a stage has just made, or all of a sweep into an MLflow that is empty or was away.

Storage is the truth and MLflow its mirror: each row is sent once, with its own first time, so that filling an empty one gives what
stood in the first. Read next: tracking.py.
"""

import tempfile
from pathlib import Path

from dis_scale import tracking
from dis_scale.errors import DisScaleError
from dis_scale.evaluation import results
from dis_scale.evaluation.results import Drawn
from dis_scale.plan import Plan
from dis_scale.storage.folder import Folder
from dis_scale.tracking import Projection, Row, Rows
from dis_scale.training.checkpoint import images_name


def evaluation(sweep: Folder, drawn: Drawn) -> bool:
    """One evaluation's values, the seconds they took, and its grid; whether MLflow took them."""
    folder, projection = results.folder(sweep, drawn), Projection(sweep, drawn.model)
    found, suffix = folder.read_json(results.METRICS), f"/{drawn.variant}" if drawn.variant else ""
    named = found["values"] | {f"evaluation/{name}": value for name, value in found["seconds"].items()}
    rows = [Row(f"{name}{suffix}", value, drawn.images, found["time"]) for name, value in named.items()]
    projection.send([row for row in rows if not row.name.endswith("_floor")])
    _send_file(projection, f"samples-{images_name(drawn.images)}.png", folder.read(results.GRID), f"samples{suffix}")
    return not projection.away


def report(sweep: Folder, status: str | None) -> bool:
    """The report's files, and the end of the sweep's own run, FINISHED or FAILED, if it has ended; whether MLflow took them."""
    projection = Projection(sweep, None)
    for name in (sweep / "report").list():
        _send_file(projection, name, (sweep / "report").read(name), "report")
    if status:
        projection.finish(status)
    return not projection.away


def everything(sweep: Folder, plan: Plan, uri: str) -> int:
    """All that storage holds of a sweep; returns the number of rows. DisScaleError where MLflow did not take all of it."""
    try:
        tracking.begin(sweep, uri, plan.parameters())
    except Exception as error:  # whatever MLflow raises
        raise DisScaleError(f"MLflow cannot be reached at {uri}: {' '.join(str(error).split())[:200]}") from error
    rows = {model: Rows(sweep / "runs" / model / "log").new() for model in plan.recipe.models}
    arrived = [_model(sweep, plan, model, rows[model]) for model in plan.recipe.models]
    whole = results.finished(sweep, plan.recipe)
    ended = any(results.ended(sweep, model) for model in plan.recipe.models) or results.skipped(sweep, plan.recipe)
    if (sweep / "report").list():
        arrived.append(report(sweep, "FINISHED" if whole else "FAILED" if ended else None))
    if not all(arrived):
        raise DisScaleError(f"MLflow at {uri} did not take everything: give the same command again")
    return sum(map(len, rows.values()))


def _model(sweep: Folder, plan: Plan, model: str, rows: list[Row]) -> bool:
    """One model's run: rows of training, evaluations, and how it ended."""
    projection = Projection(sweep, model)
    projection.send(rows)
    drawn = [
        Drawn(model, images, variant)
        for variant in plan.recipe.evaluate.samplings
        for images in results.evaluated_counts(sweep, model, variant)
    ]
    drawn += [
        one for images in results.evaluated_counts(sweep, model) for one in results.varied_there(sweep, model, images)
    ]
    arrived = [evaluation(sweep, one) for one in drawn]
    if results.ended(sweep, model):
        projection.finish("FAILED")
    elif results.trained(sweep, plan.recipe, model):
        projection.finish("FINISHED")
    return all([*arrived, not projection.away])


def _send_file(projection: Projection, name: str, data: bytes, folder: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / name).write_bytes(data)
        projection.send_file(Path(scratch) / name, folder)
