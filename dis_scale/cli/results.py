"""Commands that show what was evaluated, and evaluate one checkpoint at other settings."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from dis_scale.cli.shared import AsJson, At, Model, SweepUrl, console, require_file, require_there, say, say_aside, show, working
from dis_scale.process.errors import Held, UserError, nearest

if TYPE_CHECKING:
    from dis_scale.sweep import Sampled

MLFLOWS = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "file")
"""Schemes of the servers and databases that keep MLflow's runs."""


def report(
    sweep: SweepUrl,
    *,
    published: Annotated[
        bool, typer.Option("--published", help="Show published points of DiT, SiT and DiG, those of the sweep's sampler.")
    ] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show the stored page at an address of this machine; rebuild only a missing one.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Rebuild a sweep's table, figures and page from what was evaluated."""
    from dis_scale.report import PAGE, collect, plan_of, table, to_json, write
    from dis_scale.sweep import Sweep

    opened = Sweep.open(sweep)
    if serve:
        if published or as_json:
            raise UserError("--serve shows the stored page: without --published and --json")
        from dis_scale.report.serving import serve as serve_folder

        if not opened.report.exists(PAGE):  # as while a sweep runs: the sweep itself leaves the CSV at its end
            with working("report: reading and drawing"):
                write(opened, collect(opened, plan_of(opened)), running=True)
        return serve_folder(opened.report, say)
    with working("report: reading and drawing"):
        points = collect(opened, plan_of(opened))
        write(opened, points, published=published)
    page = f"{opened.report}/{PAGE}"
    show(to_json(points) | {"page": page}, table(points), f"page     {page}", as_json=as_json)


def compare(
    a: SweepUrl,
    b: Annotated[str | None, typer.Argument(help="The second sweep.", metavar="SWEEP")] = None,
    families: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Compare one family of backbones with the curve of another, in one sweep: dis dit.", metavar="A B"),
    ] = None,
    pair: Annotated[list[str] | None, typer.Option(help="Compare a model of the first with one of the second: NAME=NAME.")] = None,
    *,
    by_cost: Annotated[bool, typer.Option("--by-cost", help="Compare models of about one cost instead of one name.")] = False,
    page: Annotated[Path | None, typer.Option(help="Write a page of two sweeps to this file, such as comparison.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show two sweeps, or two families of one sweep, side by side, with the errors of their differences."""
    from dis_scale.report import collect, compare_page, plan_of
    from dis_scale.report import compare as comparison
    from dis_scale.sweep import Sweep

    if families:
        if b or pair or by_cost or page:
            raise UserError("--families compares within one sweep, without --pair, --by-cost and --page")
        from dis_scale.report import families as within

        with working("compare: reading"):
            measured = collect(opened := Sweep.open(a), plan_of(opened))
        compared = within.comparisons(measured, *families)
        lines = within.left_out(measured, *families)
        document = {"comparisons": [each.to_json() for each in compared], "not_compared": lines}
        show(document, within.table(measured.sweep, compared), *lines, as_json=as_json)
        return
    if b is None:
        raise UserError("compare: expected two sweeps, or one with --families A B")
    named = _pairs(pair or [], by_cost=by_cost)
    if page:
        require_file(page, "--page")
    opened_both = Sweep.open(a), Sweep.open(b)
    with working("compare: reading"):
        first, second = (collect(sweep, plan_of(sweep)) for sweep in opened_both)
    if first.sweep == second.sweep:  # of two storage roots
        first, second = (replace(each, sweep=str(sweep)) for each, sweep in zip((first, second), opened_both, strict=True))
    if pair:
        pairs = {first.groups.get(x, x): second.groups.get(y, y) for x, y in named}
        if len(pairs) < len(named):
            raise UserError("--pair: a model is compared with one at a time, its seeds together: run the command for each")
    else:
        pairs = (comparison.by_cost if by_cost else comparison.by_name)(first, second)
    found = comparison.differences(first, second, pairs)
    table = comparison.comparison_table(first, second, found)
    if page:
        with working("compare: drawing"):
            page.write_bytes(compare_page(opened_both, (first, second), table))
    show([each.to_json() for each in found], table, *([f"page     {page}"] if page else []), as_json=as_json)


def _pairs(pair: list[str], *, by_cost: bool) -> list[list[str]]:
    """Return the two names of each --pair."""
    named = [name.split("=") for name in pair]
    if not all(len(names) == 2 for names in named):
        raise UserError(f"--pair {' '.join(pair)}: expected NAME=NAME, a model of the first sweep and one of the second")
    if pair and by_cost:
        raise UserError("--by-cost chooses the pairs itself: leave out --pair, or --by-cost")
    return named


def measure(
    samples: Annotated[str, typer.Argument(help="An .npz with `arr_0`, a folder of images or a .tar.")],
    reference: Annotated[str, typer.Argument(help="One of these, or an .npz with ADM's statistics; a path or URL.")],
    weights: Annotated[str | None, typer.Option(help="Inception's weights; default: torch-fidelity's download.")] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Measure any samples: FID, sFID, Inception Scores, precision and recall, with errors, as ADM's evaluator does."""
    for pictures in (samples, reference):
        require_there(pictures)
    import torch

    from dis_scale.evaluation import inception, outside
    from dis_scale.evaluation.features import Extractor
    from dis_scale.process.progress import Board
    from dis_scale.recipe.evaluate import INCEPTION_SHA256
    from dis_scale.report import tables
    from dis_scale.training.devices import torch_device

    device = torch_device("cuda" if torch.cuda.is_available() else "cpu")

    def load() -> Extractor:
        return Extractor("inception", INCEPTION_SHA256, inception.load(weights).to(device), device)

    with Board(console(stderr=True)) as board, board.working("measure"):
        found = outside.measured(
            samples, reference, load, lambda done, total: board.update("measure", done, total, "images"), say_aside
        ).values
    names = [name for name in found if not name.endswith("_error")]
    lines = (f"{name:16} {tables.with_error(found[name], found.get(f'{name}_error'), '.5g')}" for name in names)
    show(found, *lines, as_json=as_json)


def guidance(
    sweep: SweepUrl,
    model: Model,
    scales: Annotated[str, typer.Option(help="Guidance scales, separated by commas.")] = "1,1.25,1.5,2,3",
    at: At = None,
    by: Annotated[
        str | None,
        typer.Option(help="Guide by another published model, MODEL@IMAGES, such as dis-s@16000; default: without labels."),
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Measure the curve of guidance against distance."""
    from dis_scale.sweep import Sampled
    from pipelines.ablate import GUIDANCE

    name, _, images = (by or "").rpartition("@")
    if by and not (name and images.isdecimal()):
        raise UserError(f"--by: got {by!r}, expected MODEL@IMAGES, such as dis-s@16000")
    _ablate(
        sweep, model, at, GUIDANCE, _numbers("--scales", scales), as_json=as_json, by=Sampled(name, int(images)) if by else None
    )


def ema(
    sweep: SweepUrl,
    model: Model,
    widths: Annotated[str, typer.Option(help="Relative widths, separated by commas.")] = "0.03,0.05,0.07,0.1,0.15",
    at: At = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Measure the curve of averaging width against distance; the averages are rebuilt after training."""
    from pipelines.ablate import WIDTH

    _ablate(sweep, model, at, WIDTH, _numbers("--widths", widths), as_json=as_json)


def _ablate(
    url: str, model: str, at: int | None, setting: str, values: list[float], *, as_json: bool, by: "Sampled | None" = None
) -> None:
    from dis_scale.sweep import Sweep
    from pipelines.ablate import run_ablation

    found = run_ablation(Sweep.open(url), model, at, setting, values, console(stderr=as_json), by)
    show([{setting: value, "values": metrics} for value, metrics in found.items()], as_json=as_json)


def sync(
    sweep: SweepUrl,
    uri: Annotated[str | None, typer.Option(help="The MLflow to fill; default: the one that tracks the sweep.")] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Fill MLflow from storage: an empty one with everything, one that was away with what it missed."""
    from dis_scale.report import plan_of
    from dis_scale.sweep import Sweep
    from dis_scale.sweep.documents import TrackingIds
    from dis_scale.tracking.mlflow import SQLITE
    from dis_scale.tracking.mlflow_copy import copy_everything
    from dis_scale.upkeep.removal import require_stopped

    opened = Sweep.open(sweep)
    tracking = TrackingIds.find_intact(opened.folder)
    into = uri or (tracking.uri if tracking else None)
    if into is None:
        raise UserError(f"{opened} was never tracked: name an MLflow, --uri sqlite:///mlflow.db or http://...")
    if (scheme := urlsplit(into).scheme.partition("+")[0]) and scheme not in MLFLOWS:  # MLflow says so after a minute, at length
        raise UserError(f"--uri {into}: expected a URL of {', '.join(MLFLOWS)}{nearest(scheme, MLFLOWS)}")
    another = tracking is not None and into != tracking.uri
    if tracking and into.startswith(SQLITE) and (another or not Path(into.removeprefix(SQLITE)).exists()):
        try:
            require_stopped(opened)
        except Held as error:
            there = "its jobs would go on there, in a file of this machine: leave --uri out, or wait"
            why = there if another else "it is gone, and its jobs would open a part: wait"
            raise Held(f"--uri {into}: {why}: {error}") from None
    with working(f"mlflow sync: copying to {into}"):
        rows = copy_everything(opened, plan_of(opened).parameters(), into)
    show({"uri": into, "rows": rows}, f"{rows:,} rows of training and all evaluations are in {into}", as_json=as_json)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r}: expected numbers with commas between them, for example 1,1.5,2") from None
