"""Status of a sweep, read from its storage only: on any machine, also after its cluster is gone.

Reads listings of folders and the newest files, and no history, so it takes seconds for any sweep.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from logging.handlers import BufferingHandler
from typing import Literal, TypeVar

from rich.console import Console, Group
from rich.text import Text

from dis_scale.process.errors import StorageAway, StorageError, shown
from dis_scale.process.progress import time_words
from dis_scale.process.tables import narrow_table
from dis_scale.process.threads import in_order
from dis_scale.storage import lease
from dis_scale.storage.folder import Folder
from dis_scale.storage.lease import Holding
from dis_scale.sweep import STAGES, PointName, Run, Sampled, Sweep, state
from dis_scale.sweep.documents import Metrics, ResumePointManifest, StageProgress
from dis_scale.tracking import rows

Doing = Literal["waiting", "training", "silent", "stopped", "failed", "trained"]
IN_STAGES = ("preparing", "encoding latents", "evaluating")
"""Values of `Status.doing` while only a stage other than training runs."""
QUIET_S = 300.0
"""Seconds without a new metric row after which a run counts as silent; with steps of over 15 s, the time of 20 steps."""
STAGE_QUIET_S = 5400.0
"""Seconds without progress after which another stage counts as silent, as in the alert: its own watch has not helped."""
ENDS = 3
"""Number of a run's last attempts whose errors are shown."""
T = TypeVar("T")


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
    """Host and process of an attempt that has not ended its lease, alive or not."""
    beat_age_s: float | None
    """Age of that process's last heartbeat."""
    ends: list[str]
    """Errors by which the last attempts ended, the newest first."""
    ended: str | None
    """Why the model failed."""
    published: int
    evaluated: int
    """Checkpoints that are measured under the main settings."""
    backlog: int
    """Evaluations that are due, under all settings."""
    metric: float | None
    """The main metric of the newest measured checkpoint."""


@dataclass(frozen=True)
class Status:
    """Status of a sweep. `wrong` has a line for each problem and its cure, `known` a line for each loss that it continues without.

    Models and evaluations that failed for good are in `known` while a sweep command runs, in `wrong` otherwise.
    """

    sweep: str
    doing: str
    """How far it is, whether a process works on it or not."""
    stopped: str
    """Why no process works on it; empty while one does, and once it is done."""
    holder: str
    """Host and process of the sweep command that works, if any."""
    stage: str
    """Progress of the stage that runs, other than training."""
    runs: list[RunStatus]
    backlog: int
    """Evaluations that are due."""
    wrong: list[str]
    known: list[str]

    @property
    def at_work(self) -> bool:
        """Whether a process works on it."""
        return self.doing != "done" and not self.stopped


@dataclass(frozen=True)
class _Reader:
    """Reads a sweep's files as of the time `now`; collects a line for each that cannot be read in `damaged`."""

    sweep: Sweep
    now: float
    damaged: list[str] = field(default_factory=list)

    def read(self, what: str, read: Callable[[], T]) -> T | None:
        """Return the result of `read`; None if a file is missing, damaged or refused by storage."""
        try:
            return read()
        except (StorageError, FileNotFoundError) as error:
            page = "see ops/runbooks/damaged-resume-point.md"
            cure = page if "resume point" in what else f"dis-scale verify {self.sweep} names its cure"
            self.damaged.append(f"{what} cannot be read: {error}; {cure}")
            return None

    def holdings(self, what: str, folder: Folder, count: int = 1) -> list[Holding]:
        """Return the last holders of a lease, the last one first."""
        return self.read(f"the lease of {what}", lambda: lease.last_holdings(folder, count)) or []


def collect(sweep: Sweep, now: float) -> Status:
    """Return the status at the Unix time `now`."""
    reader = _Reader(sweep, now)
    log, warnings = logging.getLogger("dis_scale"), BufferingHandler(10**6)
    warnings.setLevel(logging.WARNING)
    log.addHandler(warnings)
    try:
        return _collect(reader, warnings.buffer)
    finally:
        log.removeHandler(warnings)


def _collect(reader: _Reader, warnings: Sequence[logging.LogRecord]) -> Status:
    sweep, now, models = reader.sweep, reader.now, reader.sweep.recipe.models
    held = [next(iter(reader.holdings(name, sweep.lease(name))), None) for name in ("sweep", *STAGES)]
    working = [holding is not None and holding.works(now) for holding in held]
    commanded = working[0]
    since = held[0].holder.at or 0.0 if commanded and held[0] else None
    both = list(in_order(models, lambda model: _run(reader, model, since)))
    runs, left = [run for run, _ in both], [sampled for _, due in both for sampled in due]
    doing = reader.read("the VAE, the latents or the reference", lambda: _doing(sweep, runs, len(left))) or "preparing"
    works = any(working) or any(run.doing in ("training", "silent") for run in runs)
    stopped = "" if works or doing == "done" else _why_stopped(held[0], now)
    cure = "" if "to continue: " in stopped else f"; to continue: dis-scale resume {sweep}"
    wrong = [f"stopped: {stopped}{cure}"] if stopped else []
    if not stopped and not commanded and doing != "done":
        command, goes_on = held[0], f"dis-scale resume {sweep}"
        how = f"{goes_on} joins them, or ends those of a killed command"
        if command is None or command.end is not None:
            how = f"{goes_on} joins them"
        elif command.gone:
            how = f"the command was killed; {goes_on} continues"
        wrong.append(f"no sweep command runs, and its jobs do: {how}")
    skipped = reader.read("the reason of a skipped evaluation", lambda: state.why_skipped(sweep, left)) or {}
    progress = reader.read("the progress of a stage", lambda: StageProgress.find_intact(sweep.folder))
    idle = {"precompute": progress and progress.stage == "prepare", "evaluate": not left}  # precompute waits for its nodes then
    for stage, holding, alive in zip(STAGES, held[1:], working[1:], strict=True):
        if alive and holding and not idle.get(stage):
            wrong += _silent(sweep, stage, holding, progress, now)
    excluded = reader.read("the failures of nodes", lambda: state.excluded_nodes(sweep)) or []
    known = [f"{node}: excluded after failures of its devices; see ops/runbooks/bad-gpu-or-node.md" for node in excluded]
    ages_s = [run.row_age_s for run in runs if run.row_age_s is not None]
    before = progress.at if progress and progress.stage != "evaluate" else 0.0  # evaluation continues beside training
    idle_s = min([now - (since or now), now - before, *ages_s])
    trains = doing in ("training", "ready to train") and any(run.doing not in ("trained", "failed") for run in runs)
    if excluded and trains and idle_s > STAGE_QUIET_S:
        wrong.append(
            f"no step for {_span(idle_s)}, and nodes are excluded ({', '.join(excluded)}): others do not come, or fail too; "
            "see ops/runbooks/bad-gpu-or-node.md"
        )
    failed = [f"{run.model}: ended: {run.ended}; the next sweep command trains it again" for run in runs if run.doing == "failed"]
    failed += [f"skipped: {each}: {why}" for each, why in skipped.items()]
    (known if commanded else wrong).extend(failed)
    wrong += [*_wrong(runs), *reader.damaged, *(record.getMessage() for record in warnings)]
    stage = f"{progress}, {_span(now - progress.at, ' ago')}" if progress and doing in IN_STAGES else ""
    return Status(str(sweep), doing, stopped, _holder(held[0]) if commanded else "", stage, runs, len(left), wrong, known)


def _silent(sweep: Sweep, stage: str, holding: Holding, progress: StageProgress | None, now: float) -> list[str]:
    """Return a line if a running stage has made no progress for `STAGE_QUIET_S`; time before its holder began does not count."""
    quiet_s = now - max(holding.holder.at or 0.0, progress.at if progress else 0.0)
    if quiet_s < STAGE_QUIET_S:
        return []
    return [
        f"{stage}: no progress for {_span(quiet_s)}, and {_holder(holding)} is alive: it waits for capacity or hangs; "
        f"dis-scale logs {sweep} --stage {stage} shows which, see ops/runbooks/stuck-job.md"
    ]


def _holder(holding: Holding | None) -> str:
    """Name the process that holds a lease; empty if none does."""
    return f"process {holding.holder}" if holding and holding.end is None else ""


def _why_stopped(command: Holding | None, now: float) -> str:
    """Return why no sweep command works."""
    if command is None:
        return "no sweep command has run yet"
    if command.end is None:
        return _no_heartbeat(_holder(command), None if command.beat is None else now - command.beat)
    return f"the last sweep command ended{f': {command.end.why}' if command.end.why else ''}"


def _no_heartbeat(holder: str, age_s: float | None) -> str:
    return f"no heartbeat {'' if age_s is None else f'for {_span(age_s)} '}from {holder}"


def _run(reader: _Reader, model: str, since: float | None) -> tuple[RunStatus, list[Sampled]]:
    """Return a model's status and its due evaluations. `since` is when the sweep command that runs, if any, began.

    That command trains each model in its turn: one whose last attempt has ended, or began before `since`, is waiting."""
    sweep, now = reader.sweep, reader.now
    run, settings = sweep.run(model), sweep.recipe.train_of(model)
    images = settings.images
    backlog = state.Backlog(sweep, (model,))
    left = reader.read(f"{model}: what is published", backlog.left) or []
    published, evaluated = backlog.published, backlog.evaluated
    newest = reader.read(f"{model}: the newest metric rows", lambda: rows.newest(run.log)) or {}
    ended = reader.read(f"{model}: why it failed", lambda: state.ended(sweep, model))
    holdings = reader.holdings(model, run.lease, ENDS)
    point = reader.read(f"{model}: its resume points", lambda: state.newest_complete(run))
    holding = holdings[0] if holdings else None
    last = max(newest.values(), key=lambda row: row.time, default=None)
    quiet_s = now - max(last.time if last else 0.0, holding.holder.at or 0.0) if holding else 0.0
    rate = newest["images_per_s"].value if "images_per_s" in newest else None
    quiet_after_s = max(QUIET_S, 2 * rows.EVERY_STEPS * settings.batch_images / rate if rate else 0.0)
    doing: Doing
    if images in published:
        doing = "trained"
    elif ended:
        doing = "failed"
    elif holding and holding.works(now):
        doing = "training" if quiet_s < quiet_after_s else "silent"
    else:
        before = since is not None and holding is not None and (holding.end is not None or (holding.holder.at or 0.0) < since)
        doing = "waiting" if holding is None or before else "stopped"
    seen = max(last.images if last else 0, point.images_seen if point else 0, *published, 0)
    status = RunStatus(
        model=model, doing=doing, images_seen=seen, images=images, images_per_s=rate,
        left_s=(images - seen) / rate if rate and doing == "training" else None, row_age_s=now - last.time if last else None,
        resume_images=point.images_seen if point else 0,
        resume_age_s=reader.read(f"{model}: resume point {point}", lambda: _age_s(run, point, now)) if point else None,
        attempts=holding.number if holding else 0, holder=_holder(holding),
        beat_age_s=now - holding.beat if holding and holding.end is None and holding.beat is not None else None,
        ends=[f"attempt {each.number} ended: {each.end.why}" for each in holdings if each.end and each.end.why], ended=ended,
        published=len(published), evaluated=len(evaluated), backlog=len(left),
        metric=_metric(reader, Sampled(model, evaluated[-1])) if evaluated else None,
    )  # fmt: skip
    return status, left


def _age_s(run: Run, point: PointName, now: float) -> float | None:
    """Return the age of a resume point, None if it was just deleted."""
    saved = ResumePointManifest.find(run.resume_point(point))
    return now - saved.progress.at if saved else None


def _metric(reader: _Reader, sampled: Sampled) -> float | None:
    """Return the main metric of an evaluation."""
    folder, name = reader.sweep.evaluation(sampled), reader.sweep.recipe.evaluate.metric
    return reader.read(f"evaluation of {sampled}", lambda: Metrics.read(folder).values.get(name))


def _doing(sweep: Sweep, runs: list[RunStatus], backlog: int) -> str:
    if all(run.doing == "trained" for run in runs):
        return "evaluating" if backlog else "done"
    if any(run.attempts for run in runs):
        return "training"
    if state.find_latents(sweep.folder):
        return "ready to train"
    return "encoding latents" if state.prepared(sweep) else "preparing"


def _wrong(runs: list[RunStatus]) -> list[str]:
    """Return a line for each model that is silent or stopped."""
    lines = []
    for run in runs:
        if run.doing == "silent":
            lines.append(
                f"{run.model}: no metric row for {_span(run.row_age_s) or 'its whole time'}, and {run.holder} is alive: "
                "it starts or hangs; see ops/runbooks/stuck-job.md"
            )
        if run.doing == "stopped":
            lost = f"; {_no_heartbeat(run.holder, run.beat_age_s)}" if run.holder else ""
            lines.append(f"{run.model}: stopped at {run.images_seen:,} images{lost}")
    return lines


def table(status: Status) -> Group:
    """Return a table with one row per model, and the problems below it as text, from which commands can be copied."""
    how = f"stopped ({status.doing})" if status.stopped else status.doing
    how += f": {status.stage}" if status.stage else ""
    held = {run.model: [f"attempt {run.attempts} held by {run.holder}"] if run.holder else [] for run in status.runs}
    attempts = [f"{run.model}: {', '.join(words)}" for run in status.runs if (words := [*held[run.model], *run.ends])]
    # as Text, since a name or an error may look like markup
    head = Text(shown(f"{status.sweep}: {how}{f', run by {status.holder}' if status.holder else ''}"))
    below = Text(shown("\n".join(status.wrong + status.known + attempts)))
    out = narrow_table(
        "model", "doing", "images", "images\n/s", "left", "saved\nago", "evalu-\nated", "metric", left=("model", "doing"),
    )  # fmt: skip
    out.columns[0].no_wrap = False
    for run in status.runs:
        out.add_row(
            run.model, run.doing, f"{_count(run.images_seen)} ({_share(run.images_seen, run.images)})",
            "" if run.images_per_s is None else f"{run.images_per_s:,.0f}", _span(run.left_s), _span(run.resume_age_s),
            f"{run.evaluated}/{run.published}", "" if run.metric is None else f"{run.metric:.4g}",
        )  # fmt: skip
    return Group(head, out, below) if below else Group(head, out)


def _share(seen: int, images: int) -> str:
    """Return the share of images that were seen; 100% of 0 images, if only initial weights are published."""
    return f"{seen / images if images else 1:.0%}"


def _count(images: int) -> str:
    return f"{images:,}" if images < 10**7 else f"{images / 1e6:,.1f} M"


def overview(found: Sequence[Status]) -> Group:
    """Return one row per sweep. If one folder has all sweeps, it is named once, above the table."""
    folders = {status.sweep.rpartition("/")[0] for status in found}
    above = f"{folders.pop()}/" if len(folders) == 1 else ""
    out = narrow_table(
        "sweep", "doing", "models\ntrained", "images", "evalua-\ntions due", "wrong", left=("sweep", "doing"),
    )  # fmt: skip
    for column in out.columns[:2]:
        column.no_wrap, column.overflow = False, "fold"
    for status in found:
        seen, images = (sum(getattr(run, name) for run in status.runs) for name in ("images_seen", "images"))
        trained = sum(run.doing == "trained" for run in status.runs)
        out.add_row(
            Text(shown(status.sweep.removeprefix(above))), f"stopped ({status.doing})" if status.stopped else status.doing,
            f"{trained} of {len(status.runs)}", _share(seen, images), f"{status.backlog}", f"{len(status.wrong)}",
        )  # fmt: skip
    return Group(Text(shown(f"below {above}")), out) if above else Group(out)


def _span(seconds: float | None, after: str = "") -> str:
    return "" if seconds is None else time_words(max(0.0, seconds)) + after


def watch(sweep: Sweep, every_s: float, console: Console) -> None:
    """Show the status every `every_s` seconds until interrupted, with models that are added; retry if storage is away.

    A terminal shows the newest status in place; another output receives all of them.
    """
    from rich.live import Live

    with Live(console=console, auto_refresh=False) if console.is_interactive else nullcontext() as live:
        while True:
            try:
                head, rows, *below = table(collect(Sweep.open(sweep.folder.url), sweep.folder.time_s())).renderables
                page: Group | Text = Group(head, *below, rows)  # a terminal that is too low cuts the end
            except StorageAway as error:
                page = Text(f"{sweep}: {error}; asked again in {_span(every_s)}")
            if live:
                live.update(page, refresh=True)
            else:
                console.print(page)
            time.sleep(every_s)
