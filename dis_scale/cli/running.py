"""Commands that start, watch and stop sweeps."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from dis_scale.cli.shared import (
    AsJson,
    Model,
    Overrides,
    RecipePath,
    SweepUrl,
    console,
    driver_console,
    load_recipe,
    require_file,
    say,
    say_aside,
    show,
    working,
)
from dis_scale.process.errors import DisScaleError, UserError
from dis_scale.recipe import Storage
from dis_scale.recipe.shipped import EMBEDDED

ROOT: str = Storage.model_fields["root"].default
Stage = Literal["prepare", "precompute", "evaluate"]
Here = Annotated[bool, typer.Option("--here", help="Continue on a Ray of this machine, though the sweep last ran on a cluster.")]


def sweep(command: typer.Context, recipe: RecipePath = None, overrides: Overrides = None, *, here: Here = False) -> None:
    """Train, evaluate and report a sweep; a rerun does what is left."""
    console = driver_console(command.obj)
    if recipe is None:
        console.print(f"recipe   {EMBEDDED.name} (the embedded example: no recipe was given)", highlight=False)
    settings = load_recipe(recipe, overrides)
    command.obj.sweep = settings.name

    from pipelines.sweep import run_sweep

    run_sweep(settings, console, here=here, overrides=overrides or [])


def resume(command: typer.Context, sweep: SweepUrl, overrides: Overrides = None, *, here: Here = False) -> None:
    """Continue a stored sweep with its own recipe, on the kind of cluster where it last ran."""
    from dis_scale.storage.folder import open_folder
    from dis_scale.sweep import Sweep
    from pipelines.sweep import await_storage, resumed_recipe, run_sweep

    console = driver_console(command.obj)
    await_storage(open_folder(sweep), console)
    stored = Sweep.open(sweep)
    command.obj.sweep = stored.recipe.name
    run_sweep(resumed_recipe(stored, overrides or []), console, here=here, overrides=overrides or [])


def stop(
    sweep: SweepUrl,
    address: Annotated[
        str | None,
        typer.Option(help="Dashboard of the Ray whose jobs a killed command left, http://HOST:8265; default: the sweep's own."),
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Ask a running sweep to save and stop, from any machine; `dis-scale resume SWEEP` continues it."""
    from pipelines.stop import stop_sweep

    with working("stop: asking"):
        stopped = stop_sweep(sweep, address)
    show(
        {"stop_requested": stopped},
        f"stop requested: {', '.join(stopped)}" if stopped else "nothing to stop: no command and no job of this sweep is running",
        as_json=as_json,
    )


def status(
    sweep: Annotated[str, typer.Argument(help="A sweep's folder or URL, or a storage root: all sweeps below it.")] = ROOT,
    *,
    as_json: AsJson = False,
    every: Annotated[float | None, typer.Option("--watch", help="Show it again every so many seconds.", min=1)] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 if something is wrong; for a timer.")] = False,
) -> None:
    """Show what a sweep is doing and what is wrong, from its storage alone: no cluster is asked.

    A sweep is wrong that stopped before it was done or is silent, or that has a damaged file; after its command also one that has a
    failed model or a skipped evaluation.
    """

    from dis_scale.storage.folder import open_folder
    from dis_scale.sweep import LEASES, RECIPE, Sweep, sweeps_below
    from dis_scale.upkeep import status as statuses

    root = open_folder(sweep)
    one = root.exists(RECIPE)
    sweeps = [] if one else sweeps_below(root)
    folders = [] if one else sweeps or [root / name for name in root.folders()]  # also outputs/sweeps
    below = [folder for folder in folders if folder.exists(RECIPE)]
    lost = [folder for folder in sweeps if folder not in below and {*folder.list()} - {LEASES}]
    if every and (as_json or check or below or lost):
        raise UserError("status: expected --watch alone, with one sweep")
    if every:
        return statuses.watch(Sweep.open(sweep), every, console())
    if sweep == ROOT and not (below or lost or check or one):
        return show([], f"no sweeps below {ROOT} yet: dis-scale sweep begins one", as_json=as_json)
    found, unread = list[statuses.Status](), [f"{folder}: its {RECIPE} is gone: restore it from a backup" for folder in lost]
    for line in unread:
        say_aside(f"not read: {line}")
    for url in [folder.url for folder in below] if below or lost else [sweep]:
        try:
            with working(f"status: reading {url}"):
                opened = Sweep.open(url)
                found.append(statuses.collect(opened, opened.folder.time_s()))
        except DisScaleError as error:
            if not below:
                raise
            unread.append(str(error))
            say_aside(f"not read: {error}")
    if below or lost:
        show([asdict(each) for each in found], statuses.overview(found), as_json=as_json)
    else:
        show(asdict(found[0]), statuses.table(found[0]), as_json=as_json)
    wrong = unread + [f"{each.sweep}: {line}" for each in found for line in each.wrong]
    if check and wrong:
        raise DisScaleError(f"{wrong[0]}{f'; and {len(wrong) - 1} more' if len(wrong) > 1 else ''}")


def logs(
    sweep: SweepUrl,
    model: Annotated[str | None, typer.Argument(help="A model, or a log's name as listed.", show_default=False)] = None,
    stage: Annotated[Stage | None, typer.Option(help="A stage instead.")] = None,
    attempt: Annotated[str | None, typer.Option(help="When it began, as listed; default: the newest.")] = None,
    *,
    raw: Annotated[bool, typer.Option("--raw", help="Print the lines as they are stored: JSON.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the logs that attempts left in storage, or print those of one attempt: of its driver and of each worker."""
    from dis_scale.sweep import Sweep
    from dis_scale.tracking import attempt_logs
    from pipelines.lines import readable

    opened = Sweep.open(sweep)
    if model is not None and stage is not None:
        raise UserError("logs: expected a model or --stage, got both")
    if model is None and stage is None:
        if attempt is not None or raw:
            raise UserError("logs: --attempt and --raw are of one job's logs: name a model, or --stage")
        with working("logs: listing"):
            lines = attempt_logs.overview(opened)
        return show({"attempts": lines}, *lines, as_json=as_json)
    if model in get_args(Stage) and model not in opened.recipe.models:
        model, stage = None, model
    if model is not None:  # also as listed: train-dis-m
        model = model if model in opened.recipe.models else model.removeprefix("train-")
        opened.run(model)  # refuses an unknown one
    folder = opened.logs(stage or "train", model)
    with working("logs: reading"):
        texts = attempt_logs.read_attempt(folder, attempt)
    files = {f"{folder}/{name}": text for name, text in texts.items()}
    words = {file: text if raw else readable(attempt_logs.in_words(text)) for file, text in files.items()}
    show(files, *(f"==> {file} <==\n{text}" for file, text in words.items()), as_json=as_json)


def fork(
    sweep: SweepUrl,
    model: Model,
    at: Annotated[int, typer.Option(help="Images seen at a resume point of the model.", min=0)],
    new: Annotated[str, typer.Option("--as", help="The new run's name.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the new run's training, such as learning_rate=5e-5.")
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Start a new run from another run's resume point. To roll back, fork from an earlier point, with another learning rate."""
    from dis_scale.sweep import Sweep
    from dis_scale.training.fork import fork_run

    opened = Sweep.open(sweep)
    with working("fork: copying"):
        run = fork_run(opened, model, at, new, settings or [])
    changed = f", with {', '.join(settings)} of its own," if settings else ""
    show(
        {"run": run.folder.url, "model": new, "images": at},
        f"forked   {run.folder}: continues from {at} images\n"
        f"next     dis-scale resume {opened}; or give {new} the settings of {model}{changed} under models: in your recipe and run "
        "that",
        as_json=as_json,
    )


def profile(
    sweep: SweepUrl,
    model: Model,
    steps: Annotated[int, typer.Option(help="Steps that are timed.", min=1)] = 10,
    trace: Annotated[
        Path | None, typer.Option(help="Write one more step into this Chrome trace (chrome://tracing, Perfetto).")
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Time a few training steps on this machine: rates, memory, where the time goes. Nothing is saved."""
    from dis_scale.sweep import Sweep
    from dis_scale.training.profile import profile_training
    from pipelines.environment import EXPANDABLE_SEGMENTS, REPRODUCIBLE

    for name, value in (EXPANDABLE_SEGMENTS | REPRODUCIBLE).items():
        os.environ.setdefault(name, value)  # what a worker has; read when the GPU is first used
    if trace is not None:
        require_file(trace, "--trace")
    with working("profile: at work"):
        rates = profile_training(Sweep.open(sweep), model, steps, trace, say_aside if as_json else say)
    document = rates | {"model": model, "steps": steps, "trace": trace and str(trace)}
    show(document, *([f"trace    {trace}"] if trace else []), as_json=as_json)
