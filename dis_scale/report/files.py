"""The report's files below `report/`: figures, the CSV, the pages."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from dis_scale.report.points import Report
from dis_scale.report.published import require_published_protocol
from dis_scale.report.tables import to_csv
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.documents import LatentsManifest
from dis_scale.tracking.rows import Row, RowReader
from dis_scale.upkeep import status

CSV, PAGE = "gflops_fid.csv", "index.html"
SAMPLES = "samples.html"


def write(sweep: Sweep, report: Report, published: bool = False) -> dict[str, bytes]:
    """Write the figures, the pages and, last, the CSV below `report/`; return them by name.

    `published` adds published results to the plot; UserError if the sweep measures another quantity.
    """
    if published:
        require_published_protocol(report)
    from dis_scale.report import drawing, figures  # here: matplotlib and scipy take two seconds

    losses = _losses(sweep)
    every = figures.every(report, losses, published)
    rendered = {name: drawing.render(figure, name) for name, (figure, _) in every.items()}
    files = {f"{name}.{ending}": data for name, kinds in rendered.items() for ending, data in kinds.items()}
    svgs = {name: (kinds["svg"], every[name][1]) for name, kinds in rendered.items()}
    files |= _pages(sweep, report, svgs, losses, published) | {CSV: to_csv(report)}
    for name, data in files.items():
        sweep.report.write(name, data)
    return files


def write_page(sweep: Sweep, report: Report) -> None:
    """Write the page of a running sweep."""
    from dis_scale.report import drawing, figures

    losses = _losses(sweep)
    svgs = {
        name: (drawing.render(figure, name, ["svg"])["svg"], caption)
        for name, (figure, caption) in figures.every(report, losses).items()
    }
    for name, data in _pages(sweep, report, svgs, losses).items():
        sweep.report.write(name, data)


def compare_page(sweeps: tuple[Sweep, Sweep], reports: tuple[Report, Report], table: Table) -> bytes:
    """Return the page of two sweeps with the table of their differences, and the best samples of each."""
    from dis_scale.report import drawing, figures, page, samples

    wide, narrow = (
        drawing.render(figures.both(*reports, size), f"both{size}", ["svg"])["svg"] for size in drawing.SIZES
    )
    pictures = samples.real(sweeps[0])
    for sweep, report in zip(sweeps, reports, strict=True):
        if best := page.best_point(report):
            pictures += [part._replace(words=f"{report.sweep}: {part.words}") for part in samples.of_point(sweep, best)]
    return page.render_comparison(*reports, table, page.Plot("Gflops against distance of both", wide, narrow), pictures)


def _pages(
    sweep: Sweep,
    report: Report,
    svgs: Mapping[str, tuple[bytes, str]],
    losses: Mapping[str, Sequence[Row]],
    published: bool = False,
) -> dict[str, bytes]:
    """Return the pages by name. Beside the real images are samples of the best point, of the newest while the sweep runs."""
    from dis_scale.report import drawing, figures, page, samples

    narrow = drawing.render(figures.gflops_distance(report, published, drawing.SIZE), "narrow", ["svg"])["svg"]
    plots = [page.Plot(caption, svg, narrow if name == figures.MAIN else b"") for name, (svg, caption) in svgs.items()]
    now_s = sweep.folder.time_s()
    now, strips = status.collect(sweep, now_s), samples.strips(sweep, report)
    newest = max(report.main, key=lambda p: p.evaluation.time, default=None)
    shown = page.best_point(report) if now.doing == "done" else newest
    pictures = samples.real(sweep) + (samples.of_point(sweep, shown) if shown else [])
    times = [row.time for rows in losses.values() for row in rows] + [p.evaluation.time for p in report.points]
    latents = state.find_latents(sweep.folder)
    facts = page.Facts(
        now,
        now_s,
        images=LatentsManifest.require(latents).count if latents else None,
        times=(min(times), max(times)) if any(times) else None,
    )
    pages = {SAMPLES: page.render_samples(report, strips)} if strips else {}
    return pages | {PAGE: page.render_page(report, facts, plots, pictures, SAMPLES if strips else "")}


def _losses(sweep: Sweep) -> dict[str, list[Row]]:
    """Return the rows of the loss of each model's training."""
    readers = {model: RowReader(sweep.run(model).log) for model in sweep.recipe.models}
    return {model: [row for row in reader.new() if row.name == "loss"] for model, reader in readers.items()}
