"""The report's files below `report/`: figures, the CSV, the pages."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from dis_scale.report.points import Report
from dis_scale.report.published import require_published_protocol
from dis_scale.report.tables import to_csv
from dis_scale.storage import lease
from dis_scale.sweep import Sweep
from dis_scale.tracking.rows import Row, RowReader
from dis_scale.upkeep import status

if TYPE_CHECKING:
    from dis_scale.report.page import Facts

CSV, PAGE = "gflops_fid.csv", "index.html"
SAMPLES = "samples.html"


def write(sweep: Sweep, report: Report, *, published: bool = False, running: bool = False) -> dict[str, bytes]:
    """Write the figures, the pages and, last, the CSV below `report/`, for a `running` sweep only the pages; return them by name.

    `published` adds published results to the plot; UserError if the sweep measures another quantity. The page shows real images and
    samples: of the best point, of the newest while the sweep is at work, or the first samples if none is measured yet.
    """
    if published:
        require_published_protocol(report)
    from dis_scale.report import drawing, figures, page, samples  # here: matplotlib and scipy take two seconds

    losses = _losses(sweep)
    every = figures.every(report, losses, published=published)
    kinds = ("svg",) if running else drawing.FORMATS
    rendered = {name: drawing.render(figure, name, kinds) for name, (figure, _) in every.items()}
    narrow = figures.gflops_distance(report, published=published, size=drawing.SIZE) if figures.MAIN in every else None
    narrows = {figures.MAIN: drawing.render(narrow, "narrow", ("svg",))["svg"]} if narrow else {}
    plots = [
        page.Plot(words, rendered[name]["svg"], figure.get_figwidth() > drawing.SIZE[0], narrows.get(name, b""))
        for name, (figure, words) in every.items()
    ]
    facts = _facts(sweep, report, losses)
    newest = max(report.main, key=lambda p: p.evaluation.time, default=None)
    shown = newest if facts.status.at_work else page.best_point(report) or newest
    pictures, strips = samples.real(sweep), samples.strips(sweep, report)
    unmeasured = [] if shown and shown.images_seen else samples.of_unmeasured(sweep, report)
    pictures += unmeasured or (samples.of_point(sweep, shown) if shown else [])
    files = {SAMPLES: page.render_samples(report, strips)} if strips else {}
    files[PAGE] = page.render_page(report, facts, plots, pictures, SAMPLES if strips else "")
    if not running:
        files |= {f"{name}.{ending}": data for name, each in rendered.items() for ending, data in each.items()}
        files[CSV] = to_csv(report)
    for name, data in files.items():
        sweep.report.write(name, data)
    return files


def compare_page(sweeps: tuple[Sweep, Sweep], reports: tuple[Report, Report], table: Table) -> bytes:
    """Return the page of two sweeps with the table of their differences, and the best samples of each."""
    from dis_scale.report import drawing, figures, page, samples

    wide, narrow = (drawing.render(figures.both(*reports, size), f"both{size}", ["svg"])["svg"] for size in drawing.SIZES)
    pictures = samples.real(sweeps[0])
    for sweep, report in zip(sweeps, reports, strict=True):
        if best := page.best_point(report):
            pictures += [part._replace(words=f"{report.sweep}: {part.words}") for part in samples.of_point(sweep, best)]
    return page.render_comparison(
        *reports, table, page.Plot(f"Gflops against {reports[0].quantity} of both", svg=wide, wide=True, narrow=narrow), pictures
    )


def _facts(sweep: Sweep, report: Report, losses: Mapping[str, Sequence[Row]]) -> "Facts":
    """Return the facts for the head of the page."""
    from dis_scale.report.page import Facts

    now = sweep.folder.time_s()
    times = [row.time for rows in losses.values() for row in rows]
    times += [p.evaluation.time for p in report.points if p.evaluation.time]
    found, began = status.collect(sweep, now), lease.first_taken_at(sweep.lease("sweep"))
    last = now if found.at_work else max(times, default=None)
    first = min([*times, *filter(None, [began])], default=None)
    return Facts(found, now, None if first is None or last is None else (first, last))


def _losses(sweep: Sweep) -> dict[str, list[Row]]:
    """Return the rows of the loss of each model's training."""
    return {model: RowReader(sweep.run(model).log, only="loss").new() for model in sweep.recipe.models}
