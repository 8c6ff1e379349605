"""The `dis-scale` command. Exit code 0, 2 for the user's mistake, 1 for a failure, 75 when stopped as asked."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dis_scale.errors import DisScaleError, UserError

EMBEDDED = Path(__file__).parent.parent / "configs" / "digits.yaml"
app = typer.Typer(
    help="Scaling sweeps of diffusion models with a state-space backbone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[
    Path | None, typer.Argument(help="A recipe; configs/digits.yaml where none is given.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: a.b=value. May be given often.")
]
SweepUrl = Annotated[str, typer.Argument(help="A sweep's folder or URL, for example outputs/sweeps/digits.")]
Model = Annotated[str, typer.Argument(help="A model of the sweep.")]
At = Annotated[int | None, typer.Option(help="The published image count; the last where it is not given.", min=0)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def sweep(recipe: RecipePath = None, overrides: Overrides = None, debug: Debug = False) -> None:
    """Train, evaluate and report a sweep; given again, do what is left."""
    from dis_scale import sweep as sweeps
    from dis_scale.recipe import reading

    console = _console()
    with _errors(debug):
        if recipe is None:
            console.print(f"recipe   {EMBEDDED.name} (none was given: the embedded example)", highlight=False)
        sweeps.run(reading.load(recipe or EMBEDDED, overrides), console)


@app.command()
def plan(recipe: RecipePath = None, overrides: Overrides = None, debug: Debug = False) -> None:
    """Show what a sweep will cost, and start nothing."""
    from dis_scale import plan as plans
    from dis_scale import vae
    from dis_scale.recipe import reading

    with _errors(debug):
        found = reading.load(recipe or EMBEDDED, overrides)
        Console().print(plans.table(plans.plan(found, vae.latent_shape(found.vae, found.data.resolution))))


@app.command()
def stop(
    sweep: SweepUrl,
    address: Annotated[
        str | None, typer.Option(help="Ray's dashboard, http://HOST:8265; found by itself where it can be.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Ask a running sweep to save and stop, wherever it runs; the same sweep command goes on later."""
    from dis_scale.sweep import open_sweep
    from dis_scale.sweep import stop as stop_sweep

    with _errors(debug):
        folder, _ = open_sweep(sweep)
        stopped = stop_sweep(folder, address)
        _console().print(f"asked to stop: {', '.join(stopped)}" if stopped else "nothing to stop: no job of it runs")


@app.command()
def report(
    sweep: SweepUrl,
    published: Annotated[
        bool, typer.Option("--published", help="Draw published points of DiT, SiT and DiG beside.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Make a sweep's table, figures and page anew from what was evaluated."""
    from dis_scale import report as reports
    from dis_scale.sweep import open_sweep

    with _errors(debug):
        folder, plan = open_sweep(sweep)
        found = reports.collect(folder, plan)
        reports.write(folder, found, published)
        _console().print(reports.table(found))
        _console().print(f"page     {folder}/report/{reports.PAGE}", highlight=False, soft_wrap=True)


@app.command()
def compare(a: SweepUrl, b: SweepUrl, debug: Debug = False) -> None:
    """Show two sweeps side by side, with the errors of their differences."""
    from dis_scale import report as reports
    from dis_scale.report import compare as comparing
    from dis_scale.sweep import open_sweep

    with _errors(debug):
        _console().print(comparing.table(*(reports.collect(*open_sweep(url)) for url in (a, b))))


@app.command()
def fork(
    sweep: SweepUrl,
    model: Model,
    at: Annotated[int, typer.Option(help="Images seen at a resume point of the model.", min=0)],
    new: Annotated[str, typer.Option("--as", help="The new run's name.")],
    debug: Debug = False,
) -> None:
    """Start a new run from another's resume point; to roll back is to fork from before."""
    from dis_scale.sweep import open_sweep
    from dis_scale.training.fork import fork as fork_run

    with _errors(debug):
        folder, _ = open_sweep(sweep)
        made = fork_run(folder, model, at, new)
        _console().print(f"forked   {made}: goes on from {at} images", highlight=False, soft_wrap=True)
        _console().print(
            f"next     give {new} the settings of {model} under models: in your recipe, and run it again; or\n"
            f"         python -m dis_scale.sweep {folder}/recipe.yaml",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def sweep_guidance(
    sweep: SweepUrl,
    model: Model,
    scales: Annotated[str, typer.Option(help="Guidance scales with commas between them.")] = "1,1.25,1.5,2,3",
    at: At = None,
    debug: Debug = False,
) -> None:
    """Draw one checkpoint at several guidance scales: the curve of guidance against distance."""
    from dis_scale.vary import GUIDANCE

    with _errors(debug):
        _vary(sweep, model, at, GUIDANCE, _numbers("--scales", scales))


@app.command()
def sweep_ema(
    sweep: SweepUrl,
    model: Model,
    widths: Annotated[str, typer.Option(help="Relative widths with commas between them.")] = "0.03,0.05,0.07,0.1,0.15",
    at: At = None,
    debug: Debug = False,
) -> None:
    """Draw one checkpoint from averages of several widths, rebuilt after training: the curve of width against distance."""
    from dis_scale.vary import WIDTH

    with _errors(debug):
        _vary(sweep, model, at, WIDTH, _numbers("--widths", widths))


def _vary(url: str, model: str, at: int | None, setting: str, values: list[float]) -> None:
    from dis_scale.sweep import open_sweep
    from dis_scale.vary import vary

    vary(*open_sweep(url), model, at, setting, values, _console())


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r}: expected numbers with commas between them, for example 1,1.5,2") from None


@app.command()
def train(
    sweep: SweepUrl,
    model: Model,
    steps: Annotated[int, typer.Option(help="Steps that count.", min=1)] = 10,
    profile: Annotated[
        Path | None, typer.Option(help="Write one step more into this Chrome trace (chrome://tracing, Perfetto).")
    ] = None,
    debug: Debug = False,
) -> None:
    """Try training steps on this machine: rates, memory, a profile. Nothing is kept; it is `sweep` that trains."""
    from dis_scale.sweep import open_sweep
    from dis_scale.training.profile import trial

    with _errors(debug):
        if profile is not None:
            _require_folder(profile, "--profile")
        folder, plan = open_sweep(sweep)
        console = Console(soft_wrap=True)
        trial(
            folder, plan.recipe, model, steps, profile, lambda line: console.print(line, highlight=False, markup=False)
        )
        if profile is not None:
            console.print(f"profile  {profile}", highlight=False)


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Option(help="A published folder, a .safetensors file, or a public .pt.")],
    classes: Annotated[
        str | None, typer.Option(help="Labels, for example 1,7; none for a model without classes.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Images; one a label where it is not given.", min=1)] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("grid.png"),
    guidance: Annotated[float, typer.Option(min=0)] = 1.5,
    sampler: Annotated[str | None, typer.Option(help="As the sweep evaluates with, or 250 steps of ddpm.")] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Images drawn at once; changes nothing in them.", min=1)] = 64,
    vae: Annotated[str | None, typer.Option(help="AutoencoderKL folder or hub id; a sweep's own by default.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, for a public DiT of unusual size.", min=1)] = None,
    debug: Debug = False,
) -> None:
    """Draw a grid of images from one checkpoint."""
    from dis_scale.evaluation.pictures import open_for_sampling, sample_pictures
    from dis_scale.evaluation.sampling import grid

    with _errors(debug):
        labels = _labels(classes)
        _require_folder(out)
        opened = open_for_sampling(checkpoint, vae, heads)
        wanted = count or len(labels or [0])
        how = {"sampler": sampler or opened.sampler, "steps": steps or opened.steps}
        images = sample_pictures(opened, labels, wanted, **how, guidance=guidance, seed=seed, batch=batch)  # type: ignore[arg-type]
        out.write_bytes(grid(images, columns=min(10, wanted)))
        Console().print(f"{wanted} images in {out}", highlight=False)


def _console() -> Console:
    """The terminal, or 120 characters where there is none."""
    return Console(width=None if sys.stdout.isatty() else 120)


data = typer.Typer(help="Look after a sweep's latents.", no_args_is_help=True)
app.add_typer(data, name="data")
Latents = Annotated[str, typer.Argument(help="A sweep's folder, or a folder of latents; local or any fsspec URL.")]


@data.command()
def verify(
    url: Latents,
    fast: Annotated[bool, typer.Option("--fast", help="Compare sizes alone, and read nothing back.")] = False,
    debug: Debug = False,
) -> None:
    """Read all shards back against the manifest and name each damaged one; exit code 1 where there is one."""
    from dis_scale.data import maintenance
    from dis_scale.progress import Board

    with _errors(debug), Board(Console()) as board:
        sweep, latents = maintenance.locate_latents(url)
        found = maintenance.verify(latents, fast, lambda done, total: board.update("verify", done, total, "shards"))
        for words in found.values():
            board.say(f"damaged  {words}")
        maintenance.require_undamaged(latents, found, sweep)
        board.say(f"whole    {latents}{' by its sizes' if fast else ''}")


@data.command()
def repair(
    sweep: Annotated[str, typer.Argument(help="The sweep's folder: its recipe says where images and VAE are.")],
    debug: Debug = False,
) -> None:
    """Make exactly the damaged shards anew, byte for byte as they were."""
    from dis_scale.data import maintenance
    from dis_scale.progress import Board, listing_words

    with _errors(debug), Board(Console()) as board:
        made = maintenance.repair(
            sweep,
            lambda done, total: board.update("verify", done, total, "shards"),
            listing_words(board.say),
        )
        board.say(f"repaired {', '.join(made)}" if made else "nothing to repair: every shard is whole")


@data.command()
def show(
    url: Latents,
    out: Annotated[Path, typer.Option(help="The PNG of decoded images to write.")] = Path("latents.png"),
    vae: Annotated[str | None, typer.Option(help="AutoencoderKL folder or hub id; a sweep's own by default.")] = None,
    debug: Debug = False,
) -> None:
    """Show totals, labels, statistics and identity of latents, and write a grid of decoded images."""
    from dis_scale.data import maintenance
    from dis_scale.evaluation.sampling import grid

    with _errors(debug):
        sweep, latents = maintenance.locate_latents(url)
        for line in maintenance.describe(latents):
            Console(soft_wrap=True).print(line, highlight=False, markup=False)
        decoder = maintenance.load_decoder(sweep, latents, vae)
        if decoder is None:
            Console().print("grid     none: give the sweep's folder, or --vae, which decodes them", highlight=False)
            return
        _require_folder(out)
        out.write_bytes(grid(maintenance.decode_examples(latents, decoder), columns=10))
        Console().print(f"grid     {out}", highlight=False, soft_wrap=True)


def _require_folder(out: Path, option: str = "--out") -> None:
    if not out.absolute().parent.is_dir():
        raise UserError(f"{option} {out}: there is no folder {out.absolute().parent}")


mlflow = typer.Typer(help="MLflow, the mirror of what storage holds.", no_args_is_help=True)
app.add_typer(mlflow, name="mlflow")


@mlflow.command()
def sync(
    sweep: SweepUrl,
    uri: Annotated[str | None, typer.Option(help="Of the MLflow to fill; the one it is tracked in by default.")] = None,
    debug: Debug = False,
) -> None:
    """Fill MLflow from storage: an empty one gets all, one that was away what it missed."""
    from dis_scale import mirror, tracking
    from dis_scale.sweep import open_sweep

    with _errors(debug):
        folder, plan = open_sweep(sweep)
        into = uri or (folder.read_json(tracking.FILE)["uri"] if folder.exists(tracking.FILE) else None)
        if into is None:
            raise UserError(f"{folder} was never tracked: say where to, --uri sqlite:///mlflow.db or http://...")
        rows = mirror.everything(folder, plan, into)
        _console().print(
            f"{rows:,} rows of training and all evaluations are in {into}", highlight=False, soft_wrap=True
        )


def _labels(classes: str | None) -> list[int] | None:
    if classes is None:
        return None
    if not all(word.strip().isdigit() for word in classes.split(",")):
        raise UserError(f"--classes {classes!r}: expected labels with commas between them, for example 1,7")
    return [int(word) for word in classes.split(",")]


@contextlib.contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Turns the error family into one line and its exit code."""
    try:
        yield
    except DisScaleError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; `python -m dis_scale.sweep` comes here too."""
    app(arguments)


if __name__ == "__main__":
    main()
