"""What a sweep is doing, from its storage alone: on any machine, also when its cluster is gone.

Reads listings, the newest of everything, and no history, so it takes seconds for any sweep.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from dis_scale.storage import lease, manifest
from dis_scale.sweep import METRICS, Sampled, Sweep, state
from dis_scale.threads import in_order
from dis_scale.tracking import rows

Doing = Literal["waiting", "training", "silent", "stopped", "failed", "trained"]
QUIET_S = 300.0
"""Time without a new metric row after which a run counts as silent."""


@dataclass(frozen=True)
class RunStatus:
    """One model. Times are seconds before now, by the clocks of the machines that wrote them."""

    model: str
    doing: Doing
    images_seen: int
    images: int
    images_per_s: float | None
    left_s: float | None
    """Time to the last image at that rate, while it trains."""
    row_age_s: float | None
    """Age of the newest metric row."""
    resume_images: int
    resume_age_s: float | None
    """Age of the newest resume point: what a failure would cost now."""
    attempts: int
    holder: str
    """Who trains it now: host and process."""
    last_end: str
    """Why the last attempt ended, if it ended by an error."""
    published: int
    evaluated: int
    """Checkpoints that are measured under the main settings."""
    metric: float | None
    """The main metric of the newest measured checkpoint."""


@dataclass(frozen=True)
class Status:
    """A sweep; `wrong` are lines that name what is wrong and what to do."""

    sweep: str
    doing: str
    holder: str
    runs: list[RunStatus]
    backlog: int
    """Evaluations that are due."""
    wrong: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def collect(sweep: Sweep, now: float) -> Status:
    """Return the status at the Unix time `now`."""
    models = sweep.recipe.models
    found = list(in_order(models, lambda model: _run(sweep, model, now), len(models)))
    runs, left = [run for run, _ in found], [sampled for _, due in found for sampled in due]
    holder = _holder(lease.last_holding(sweep.lease("sweep")))
    wrong = _wrong(sweep, runs, holder) + [
        f"skipped: {each}: {why}" for each, why in state.why_skipped(sweep, left).items()
    ]
    return Status(str(sweep), _doing(sweep, runs, len(left)), holder, runs, len(left), wrong)


def _holder(holding: lease.Holding | None) -> str:
    """Name the process that holds a lease; empty if none does."""
    return f"process {holding.pid} on {holding.host}" if holding and holding.ended is None else ""


def _run(sweep: Sweep, model: str, now: float) -> tuple[RunStatus, list[Sampled]]:
    """Return a model's status and its evaluations that are due."""
    run, images = sweep.run(model), sweep.recipe.train.images
    backlog = state.Backlog(sweep, (model,))
    left, published = backlog.left(), backlog.published
    due = {sampled.images_seen for sampled in left if not sampled.variant}
    evaluated = [n for n in published if n not in due and n in sweep.recipe.train.publish_images]
    newest, point, holding = rows.newest(run.log), state.newest_complete(run), lease.last_holding(run.lease)
    last = max(newest.values(), key=lambda row: row.time, default=None)
    row_age_s = now - last.time if last else None
    holder = _holder(holding)
    doing: Doing
    if images in published:
        doing = "trained"
    elif state.ended(sweep, model):
        doing = "failed"
    elif holder:
        doing = "training" if row_age_s is not None and row_age_s < QUIET_S else "silent"
    else:
        doing = "stopped" if holding else "waiting"
    seen = max(last.images if last else 0, point.images_seen if point else 0, *published, 0)
    rate = newest["images_per_s"].value if "images_per_s" in newest else None
    saved = manifest.find(run.resume_point(point)) if point else None
    measured = sweep.evaluation(Sampled(model, evaluated[-1])).read_json(METRICS)["values"] if evaluated else {}
    status = RunStatus(
        model=model, doing=doing, images_seen=seen, images=images, images_per_s=rate,
        left_s=(images - seen) / rate if rate and doing == "training" else None, row_age_s=row_age_s,
        resume_images=point.images_seen if point else 0, resume_age_s=now - saved["at"] if saved and "at" in saved else None,
        attempts=holding.number if holding else 0, holder=holder, last_end=holding.why if holding else "",
        published=len(published), evaluated=len(evaluated), metric=measured.get(sweep.recipe.evaluate.metric),
    )  # fmt: skip
    return status, left


def _doing(sweep: Sweep, runs: list[RunStatus], backlog: int) -> str:
    if all(run.doing == "trained" for run in runs):
        return "evaluating" if backlog else "done"
    if any(run.attempts for run in runs):
        return "training"
    if state.find_latents(sweep.folder):
        return "ready to train"
    return "encoding latents" if state.prepared(sweep) else "preparing"


def _wrong(sweep: Sweep, runs: list[RunStatus], holder: str) -> list[str]:
    """Return what an operator should know or do, the most urgent first."""
    lines = []
    for run in runs:
        if run.doing == "failed":
            lines.append(f"{run.model}: ended: {state.ended(sweep, run.model)}; the next sweep command trains it again")
        if run.doing == "silent":
            lines.append(
                f"{run.model}: no metric row for {_span(run.row_age_s) or 'its whole time'}, and {run.holder} holds the run: "
                "it starts, hangs, or died without a word; see ops/runbooks/stuck-job.md"
            )
        if run.doing == "stopped":
            lines.append(f"{run.model}: stopped at {run.images_seen:,} images: run the sweep command again to continue")
    lines += [
        f"{node}: {count} failures of its devices; see ops/runbooks/bad-gpu-or-node.md"
        for node, count in state.node_failures(sweep).items()
    ]
    if not holder and any(run.doing != "trained" for run in runs):
        lines.append("no sweep command runs: start it again to continue")
    return lines


def table(status: Status) -> Table:
    """Return one row per model."""
    # as Text, since a name or an error may look like markup
    title, caption = Text(f"{status.sweep}: {status.doing}"), Text("\n".join(status.wrong))
    out = Table(title=title, caption=caption, caption_justify="left")
    for column in (
        "model",
        "doing",
        "images",
        "of",
        "images/s",
        "left",
        "resume point",
        "attempts",
        "evaluated",
        "metric",
    ):
        out.add_column(column, justify="left" if column in ("model", "doing") else "right")
    for run in status.runs:
        out.add_row(
            run.model, run.doing, f"{run.images_seen:,}", f"{run.images_seen / run.images:.0%}",
            "" if run.images_per_s is None else f"{run.images_per_s:,.0f}", _span(run.left_s), _span(run.resume_age_s, " ago"),
            f"{run.attempts}", f"{run.evaluated}/{run.published}", "" if run.metric is None else f"{run.metric:.4g}",
        )  # fmt: skip
    return out


def _span(seconds: float | None, after: str = "") -> str:
    """Return a time in the largest unit that fits: 45 s, 12 min, 3.5 h, 2.1 d."""
    if seconds is None:
        return ""
    for unit, length, digits in (("d", 86_400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= length:
            return f"{seconds / length:.{digits}f} {unit}{after}"
    return f"{max(0.0, seconds):.0f} s{after}"


def watch(sweep: Sweep, every_s: float) -> None:
    """Show the status again and again until it is interrupted."""
    from rich.live import Live

    with Live(table(collect(sweep, time.time())), auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            live.update(table(collect(sweep, time.time())), refresh=True)
