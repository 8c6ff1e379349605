"""The `dis-scale` command. Exit code 0, 2 for a user's mistake, 1 for a failure, 69 if held elsewhere, 74 if storage is
away, 75 if stopped as requested.

Each command imports what it needs when it runs, so that `--help` and a mistake are answered at once.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from dis_scale import jsonlog
from dis_scale.errors import DisScaleError, UserError
from dis_scale.jsonlog import JsonLines

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np

    from dis_scale.plan import Plan
    from dis_scale.progress import ReportDone
    from dis_scale.sweep import Sweep

ADM_SAMPLES = 50_000
"""Samples that FID is defined by."""
EMBEDDED = Path(__file__).parent.parent / "configs" / "digits.yaml"
app = typer.Typer(
    help="Scaling sweeps of diffusion models with a state-space backbone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path | None, typer.Argument(help="A recipe; default: configs/digits.yaml.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: a.b=value. Repeatable.")]
SweepUrl = Annotated[str, typer.Argument(help="A sweep's folder or URL, for example outputs/sweeps/digits.")]
Model = Annotated[str, typer.Argument(help="A model of the sweep.")]
Here = Annotated[
    bool, typer.Option("--here", help="Continue on a Ray of this machine, though the sweep last ran on a cluster.")
]
At = Annotated[int | None, typer.Option(help="A published image count; default: the last.", min=0)]

VaeOption = Annotated[
    str | None,
    typer.Option(
        help="Autoencoder: folder or hub id, TorchScript file, or `none` for pixels; default: the sweep's own."
    ),
]


@app.callback()
def options(_: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    pass


@app.command()
def sweep(recipe: RecipePath = None, overrides: Overrides = None, here: Here = False) -> None:
    """Train, evaluate and report a sweep; a rerun does what is left."""
    from dis_scale.recipe import reading

    console = _driver_console()
    if recipe is None:
        console.print(f"recipe   {EMBEDDED.name} (the embedded example: no recipe was given)", highlight=False)
    settings = reading.load(recipe or EMBEDDED, overrides)

    from pipelines.sweep import run_sweep

    run_sweep(settings, console, here)


@app.command()
def resume(sweep: SweepUrl, overrides: Overrides = None, here: Here = False) -> None:
    """Continue a stored sweep with its own recipe, on the kind of cluster where it last ran."""
    from dis_scale.storage.folder import open_folder
    from dis_scale.sweep import Sweep
    from pipelines.sweep import await_storage, resume_sweep

    console = _driver_console()
    await_storage(open_folder(sweep), console)
    resume_sweep(Sweep.open(sweep), overrides or [], console, here)


@app.command()
def plan(
    recipe: RecipePath = None,
    overrides: Overrides = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images of the source, if it cannot be listed from here.")
    ] = None,
) -> None:
    """Show what a sweep will cost, and start nothing."""
    from dis_scale.recipe import reading

    settings = reading.load(recipe or EMBEDDED, overrides)

    from dis_scale import isoflop, vae
    from dis_scale.data.sources import open_source
    from dis_scale.plan import price_reading, price_sweep, table
    from dis_scale.progress import listing_words

    shape = vae.latent_shape(settings.vae, settings.data.resolution)
    study = isoflop.cells(price_sweep(settings, shape))
    priced = price_sweep(isoflop.written_out(settings, shape), shape)
    Console().print(table(priced))
    count = images
    try:
        count = count or len(open_source(settings.data, None, listing_words(_print)))
        _print(f"data     {price_reading(settings, shape, count)}")
    except DisScaleError as error:
        _print(f"data     unknown: {error}; to price it all the same, name the number of images: --images 1281167")
    if study:
        Console().print(isoflop.table(priced, study, count))


@app.command()
def stop(
    sweep: SweepUrl,
    address: Annotated[
        str | None,
        typer.Option(
            help="Dashboard of the Ray whose jobs a killed command left, http://HOST:8265; default: the sweep's own."
        ),
    ] = None,
) -> None:
    """Ask a running sweep to save and stop, from any machine; `dis-scale resume SWEEP` continues it."""
    from pipelines.stop import stop_sweep

    stopped = stop_sweep(sweep, address)
    _print(
        f"stop requested: {', '.join(stopped)}"
        if stopped
        else "nothing to stop: no command and no job of this sweep is running"
    )


@app.command()
def status(
    sweep: SweepUrl,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    every: Annotated[float | None, typer.Option("--watch", help="Show it again every so many seconds.", min=1)] = None,
) -> None:
    """Show what a sweep is doing and what is wrong, from its storage alone: no cluster is asked."""
    import json
    import time

    from dis_scale.report import status as statuses
    from dis_scale.sweep import Sweep

    opened = Sweep.open(sweep)
    if every:
        return statuses.watch(opened, every)
    found = statuses.collect(opened, time.time())
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        _console().print(statuses.table(found))


@app.command("verify")
def verify_results(sweep: SweepUrl) -> None:
    """Read back everything that a sweep's results rest on and name what is damaged or missing; exit code 1 if there is any."""
    from dis_scale.progress import Board
    from dis_scale.sweep import Sweep
    from dis_scale.upkeep.verify import verify_sweep

    with Board(_console()) as board:
        damaged = verify_sweep(Sweep.open(sweep), lambda done, total: board.update("verify", done, total, "files"))
        for line in damaged:
            board.say(f"damaged  {line}")
    if damaged:
        raise DisScaleError(f"{sweep}: {len(damaged)} files are damaged or missing")
    _print("complete all that the results rest on was read back")


@app.command()
def gc(sweep: SweepUrl, yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False) -> None:
    """List what no result needs, with its size: samples of finished evaluations, old leases, latents that no sweep uses, ...

    A metric that is added to the recipe later needs samples: they are sampled again.
    """
    from dis_scale.sweep import Sweep
    from dis_scale.upkeep import retention

    opened = Sweep.open(sweep)
    found = retention.find_unneeded(opened)
    try:
        found += retention.find_unshared(opened.store)
    except UserError as error:
        _print(f"kept     {error}")
    for each in found:
        _print(f"{each.kind:<12} {each.folder}: {len(each.sizes)} files, {each.size_bytes / 1e6:,.1f} MB")
    total = (
        f"{sum(each.size_bytes for each in found) / 1e9:,.3f} GB in {sum(len(each.sizes) for each in found):,} files"
    )
    if yes:
        retention.delete(found)
    _print(f"deleted  {total}" if yes else f"total    {total}; to delete them: dis-scale gc {sweep} --yes")


@app.command()
def logs(
    sweep: SweepUrl,
    model: Annotated[str | None, typer.Argument(help="A model: the logs of its training.", show_default=False)] = None,
    stage: Annotated[str | None, typer.Option(help="A stage instead: prepare, precompute or evaluate.")] = None,
    attempt: Annotated[str | None, typer.Option(help="When it began, as listed; default: the newest.")] = None,
) -> None:
    """List the logs that attempts left in storage, or print those of one attempt: of its driver and of each worker."""
    from dis_scale.sweep import Sweep
    from dis_scale.tracking import attempt_logs

    opened = Sweep.open(sweep)
    if model is not None and stage is not None:
        raise UserError("logs: expected a model or --stage, got both")
    if model is None and stage is None:
        for line in attempt_logs.overview(opened):
            _print(line)
        return
    if model is not None:
        opened.run(model)  # refuses an unknown one
    folder = opened.logs(stage or "train", model)
    for name, text in attempt_logs.read_attempt(folder, attempt).items():
        print(f"==> {folder}/{name} <==\n{text}")


@app.command()
def report(
    sweep: SweepUrl,
    published: Annotated[
        bool, typer.Option("--published", help="Show published points of DiT, SiT and DiG as well.")
    ] = False,
) -> None:
    """Rebuild a sweep's table, figures and page from what was evaluated."""
    from dis_scale.report import PAGE, collect, table, write
    from dis_scale.sweep import Sweep

    opened = Sweep.open(sweep)
    points = collect(opened, _plan(opened))
    write(opened, points, published)
    _console().print(table(points))
    _print(f"page     {opened.report}/{PAGE}")


@app.command()
def compare(
    a: SweepUrl,
    b: SweepUrl,
    pair: Annotated[
        list[str] | None, typer.Option(help="Compare a model of the first with one of the second: NAME=NAME.")
    ] = None,
    by_cost: Annotated[
        bool, typer.Option("--by-cost", help="Compare models of about one cost instead of one name.")
    ] = False,
    figure: Annotated[Path | None, typer.Option(help="Draw the curves of both into this file (.png or .svg).")] = None,
) -> None:
    """Show two sweeps side by side, with the errors of their differences, and how the sweeps differ."""
    from dis_scale.report import collect
    from dis_scale.report import compare as comparison
    from dis_scale.sweep import Sweep

    first, second = (collect(sweep, _plan(sweep)) for sweep in (Sweep.open(a), Sweep.open(b)))
    pairs = (comparison.by_cost if by_cost else comparison.by_name)(first, second)
    if pair:
        if not all(name.count("=") == 1 for name in pair):
            raise UserError(
                f"--pair {' '.join(pair)}: expected NAME=NAME, a model of the first sweep and one of the second"
            )
        pairs = dict(name.split("=") for name in pair)
    _console().print(comparison.comparison_table(first, second, pairs))
    if figure:
        from dis_scale.report import figures

        kind = figure.suffix.removeprefix(".")
        if kind not in figures.FORMATS:
            raise UserError(f"--figure {figure}: expected a file that ends in {' or '.join(figures.FORMATS)}")
        figure.write_bytes(figures.render(figures.both(first, second))[kind])
        _print(f"figure   {figure}")


@app.command()
def fork(
    sweep: SweepUrl,
    model: Model,
    at: Annotated[int, typer.Option(help="Images seen at a resume point of the model.", min=0)],
    new: Annotated[str, typer.Option("--as", help="The new run's name.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the new run's training, such as learning_rate=5e-5.")
    ] = None,
) -> None:
    """Start a new run from another run's resume point. To roll back, fork from an earlier point, with another learning rate."""
    from dis_scale.sweep import Sweep
    from dis_scale.training.fork import fork_run

    opened = Sweep.open(sweep)
    run = fork_run(opened, model, at, new, settings or [])
    _print(
        f"forked   {run.folder}: continues from {at} images\n"
        f"next     dis-scale resume {opened}; or give {new} the settings of {model} under models: in your recipe and run that"
    )


ablations = typer.Typer(help="Evaluate one checkpoint at several values of one sampling setting.", no_args_is_help=True)
app.add_typer(ablations, name="ablate")


@ablations.command()
def guidance(
    sweep: SweepUrl,
    model: Model,
    scales: Annotated[str, typer.Option(help="Guidance scales, separated by commas.")] = "1,1.25,1.5,2,3",
    at: At = None,
) -> None:
    """Measure the curve of guidance against distance."""
    from pipelines.ablate import GUIDANCE

    _ablate(sweep, model, at, GUIDANCE, _numbers("--scales", scales))


@ablations.command()
def ema(
    sweep: SweepUrl,
    model: Model,
    widths: Annotated[str, typer.Option(help="Relative widths, separated by commas.")] = "0.03,0.05,0.07,0.1,0.15",
    at: At = None,
) -> None:
    """Measure the curve of averaging width against distance; the averages are rebuilt after training."""
    from pipelines.ablate import WIDTH

    _ablate(sweep, model, at, WIDTH, _numbers("--widths", widths))


def _ablate(url: str, model: str, at: int | None, setting: str, values: list[float]) -> None:
    from dis_scale.sweep import Sweep
    from pipelines.ablate import run_ablation

    run_ablation(Sweep.open(url), model, at, setting, values, _console())


@app.command()
def profile(
    sweep: SweepUrl,
    model: Model,
    steps: Annotated[int, typer.Option(help="Steps that are timed.", min=1)] = 10,
    trace: Annotated[
        Path | None, typer.Option(help="Write one more step into this Chrome trace (chrome://tracing, Perfetto).")
    ] = None,
) -> None:
    """Time a few training steps on this machine: rates, memory, where the time goes. Nothing is saved."""
    from dis_scale.sweep import Sweep
    from dis_scale.training.profile import profile_training

    if trace is not None:
        _require_folder(trace, "--trace")
    profile_training(Sweep.open(sweep), model, steps, trace, _print)
    if trace is not None:
        _print(f"trace    {trace}")


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Option(help="A published folder, a .safetensors file, or a public .pt.")],
    classes: Annotated[
        str | None, typer.Option(help="Labels, for example 1,7; omit for a model without classes.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Number of images; default: one per label, 50000 with --npz.", min=1)
    ] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("grid.png"),
    npz: Annotated[
        Path | None,
        typer.Option(help="Write all images to this file instead, for ADM's evaluator; default: of all classes."),
    ] = None,
    labels: Annotated[
        Literal["balanced", "random"], typer.Option(help="With --npz: each class equally often, or random labels.")
    ] = "balanced",
    guidance: Annotated[float | None, typer.Option(min=0, help="Default: the sweep's own, or 1: none.")] = None,
    guidance_channels: Annotated[
        int | None,
        typer.Option(
            min=1, help="Guide the first channels only: 3 as in DiT's code. Default: the sweep's own, or all."
        ),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="Default: the sweep's own, or that in the checkpoint.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: as for the sampler.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Images sampled at a time; does not change them.", min=1)] = 64,
    vae: VaeOption = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, for a public DiT of unusual size.", min=1)] = None,
) -> None:
    """Sample a grid of images from one checkpoint, or a file of many for ADM's evaluator; on a GPU if there is one."""
    import numpy as np
    import torch

    from dis_scale.evaluation import adm, pictures
    from dis_scale.evaluation.sampling import grid
    from dis_scale.progress import Board

    of_classes = _labels(classes)
    _require_folder(npz or out, "--npz" if npz else "--out")
    if ":/" in str(checkpoint):
        raise UserError(
            f"--checkpoint {checkpoint}: expected a path of this machine: copy the published folder, or mount the store"
        )
    opened = pictures.open_for_sampling(checkpoint, vae, heads)
    for line in opened.notes:
        _print(line)
    images = count or (ADM_SAMPLES if npz else len(of_classes or [0]))
    if npz and of_classes is None:
        each_label = pictures.labels_of_all(opened, labels, images, seed)
    else:
        each_label = pictures.labels_in_turn(opened, of_classes, images)
    scale, channels, sampler, steps = (
        opened.scale(guidance), guidance_channels or opened.guidance_channels, sampler or opened.sampler, steps or opened.steps,
    )  # fmt: skip
    _print(
        f"sampling {sampler}, {steps} steps, guidance {scale:g}{f' on {channels} channels' if channels else ''}, fp32"
    )
    parts = pictures.sample_pictures(
        opened, each_label, images, sampler=sampler, steps=steps, guidance=scale, channels=channels, seed=seed, batch=batch,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    if npz is None:
        out.write_bytes(grid(np.concatenate(list(parts)), columns=min(10, images)))
    else:
        with Board(_console()) as board:
            adm.write_samples(npz, images, _counted(parts, lambda n: board.update("sample", n, images, "images")))
    _print(f"{images} images in {npz or out}")


def _counted(parts: "Iterable[np.ndarray]", report: "ReportDone") -> "Iterator[np.ndarray]":
    """Yield the parts; `report` gets the images so far."""
    done = 0
    for part in parts:
        yield part
        done += len(part)
        report(done)


data = typer.Typer(help="Verify, repair and describe a sweep's latents.", no_args_is_help=True)
app.add_typer(data, name="data")
Latents = Annotated[str, typer.Argument(help="A sweep's folder, or a folder of latents; local or any fsspec URL.")]


@data.command()
def verify(
    url: Latents,
    fast: Annotated[bool, typer.Option("--fast", help="Compare sizes only; read nothing back.")] = False,
) -> None:
    """Compare all shards with the manifest and name each damaged one; exit code 1 if there is any."""
    from dis_scale.data import maintenance
    from dis_scale.progress import Board

    with Board(Console()) as board:
        sweep, latents = maintenance.locate_latents(url)
        damaged = maintenance.verify(latents, fast, lambda done, total: board.update("verify", done, total, "shards"))
        for words in damaged.values():
            board.say(f"damaged  {words}")
        maintenance.require_undamaged(latents, damaged, sweep)
        board.say(f"complete {latents}{' by its sizes' if fast else ''}")


@data.command()
def repair(
    sweep: Annotated[str, typer.Argument(help="The sweep's folder; its recipe names the images and the VAE.")],
) -> None:
    """Rebuild the damaged shards, byte for byte as they were."""
    from dis_scale.data import maintenance
    from dis_scale.progress import Board, listing_words

    with Board(Console()) as board:
        repaired = maintenance.repair(
            sweep,
            lambda done, total: board.update("verify", done, total, "shards"),
            listing_words(board.say),
        )
        board.say(f"repaired {', '.join(repaired)}" if repaired else "nothing to repair: every shard is complete")


@data.command()
def show(
    url: Latents,
    out: Annotated[Path, typer.Option(help="The PNG of decoded images to write.")] = Path("latents.png"),
    vae: VaeOption = None,
) -> None:
    """Show totals, labels, statistics and identity of latents; write a grid of decoded images."""
    from dis_scale.data import maintenance
    from dis_scale.evaluation.sampling import grid

    sweep, latents = maintenance.locate_latents(url)
    for line in maintenance.describe(latents):
        _print(line)
    decoder = maintenance.load_decoder(sweep, latents, vae)
    if decoder is None:
        _print("grid     none: to decode images, give the sweep's folder or --vae")
        return
    _require_folder(out)
    out.write_bytes(grid(maintenance.decode_examples(latents, decoder), columns=10))
    _print(f"grid     {out}")


mlflow = typer.Typer(help="MLflow, a copy of what is in storage.", no_args_is_help=True)
app.add_typer(mlflow, name="mlflow")


@mlflow.command()
def sync(
    sweep: SweepUrl,
    uri: Annotated[str | None, typer.Option(help="The MLflow to fill; default: the one that tracks the sweep.")] = None,
) -> None:
    """Fill MLflow from storage: an empty one with everything, one that was away with what it missed."""
    from dis_scale.report.mlflow_copy import copy_everything
    from dis_scale.sweep import Sweep
    from dis_scale.tracking.mlflow import stored_ids

    opened = Sweep.open(sweep)
    into = uri or stored_ids(opened).get("uri")
    if into is None:
        raise UserError(f"{opened} was never tracked: name an MLflow, --uri sqlite:///mlflow.db or http://...")
    rows = copy_everything(opened, _plan(opened), into)
    _print(f"{rows:,} rows of training and all evaluations are in {into}")


def _plan(sweep: "Sweep") -> "Plan":
    """The plan of a stored sweep; UserError if it has nothing to report. A hub is asked only if the latents were deleted."""
    from dis_scale.sweep import state

    shape = state.latent_shape(sweep)
    if shape is None and not any(sweep.evaluations(model).list() for model in sweep.recipe.models):
        raise UserError(f"{sweep}: nothing to report yet: its latents are not complete (dis-scale status {sweep})")

    from dis_scale import vae
    from dis_scale.plan import price_sweep

    return price_sweep(sweep.recipe, shape or vae.latent_shape(sweep.recipe.vae, sweep.recipe.data.resolution))


def _driver_console() -> Console:
    """The console of a command that runs a sweep: as `_console`, or one JSON line for each of its lines."""
    return Console(file=JsonLines(sys.stdout), width=120) if jsonlog.wanted() else _console()


def _console() -> Console:
    """The terminal, or 120 characters if the output is not one."""
    return Console(width=None if sys.stdout.isatty() else 120)


def _print(line: str) -> None:
    """Print a line as it is: not wrapped, no colours."""
    _console().print(line, highlight=False, markup=False, soft_wrap=True)


def _require_folder(out: Path, option: str = "--out") -> None:
    if not out.absolute().parent.is_dir():
        raise UserError(f"{option} {out}: there is no folder {out.absolute().parent}")


def _labels(classes: str | None) -> list[int] | None:
    if classes is None:
        return None
    if not all(word.strip().isdigit() for word in classes.split(",")):
        raise UserError(f"--classes {classes!r}: expected labels with commas between them, for example 1,7")
    return [int(word) for word in classes.split(",")]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r}: expected numbers with commas between them, for example 1,1.5,2") from None


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error of ours becomes one line and its exit code, unless `--debug` is given anywhere."""
    words = sys.argv[1:] if arguments is None else arguments
    drives = words[:1] in (["sweep"], ["resume"])
    try:
        app([word for word in words if word != "--debug"])
    except SystemExit as end:  # by Typer
        if drives and end.code == UserError.exit_code:
            _end_own_job(UserError.exit_code)
        raise
    except DisScaleError as error:
        if "--debug" in words:
            raise
        words_of_error = f"error: {error}"
        if drives and os.environ.get(jsonlog.VARIABLE) == "json":
            words_of_error = jsonlog.entry("error", "error", message=str(error))
        print(words_of_error, file=sys.stderr, flush=True)
        if drives:
            _end_own_job(error.exit_code)
        raise SystemExit(error.exit_code) from None
    except Exception:
        if not drives:
            raise
        traceback.print_exc()
        _end_own_job(DisScaleError.exit_code)
        raise SystemExit(DisScaleError.exit_code) from None


def _end_own_job(exit_code: int) -> None:
    from pipelines.jobs import end_own_job

    end_own_job(exit_code)


if __name__ == "__main__":
    main()
