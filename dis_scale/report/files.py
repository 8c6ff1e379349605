"""The report's files below `report/`: figures, the CSV, the pages."""

from dis_scale.report.points import Report
from dis_scale.report.published import published_differences, require_published_protocol
from dis_scale.report.tables import to_csv
from dis_scale.sweep import GRID, Sampled, Sweep

CSV, PAGE = "gflops_fid.csv", "index.html"


def write(sweep: Sweep, report: Report, published: bool = False) -> dict[str, bytes]:
    """Write the figures, the pages and, last, the CSV below `report/`; return them by name.

    `published` adds published results to the plot; UserError if the sweep measures another quantity.
    """
    if published:
        require_published_protocol(report)
    from dis_scale.report import (
        figures,
    )  # here: matplotlib and scipy take two seconds, and most processes write no report
    from dis_scale.report.page import SAMPLES, render_page, render_samples
    from dis_scale.report.samples import strips

    loss = "Training compute against the loss on images that training never saw"
    by_sampling = "Time of a sample against distance, under each sampling setting"
    at_counts = "Gflops against distance at each image count" + (published_differences(report) if published else "")
    every = figures.of_study(report) | {
        "gflops_fid": (figures.gflops_distance(report, published), at_counts),
        "compute_fid": (figures.compute_distance(report), "Training compute against distance, with its lower hull"),
        "fid_images": (figures.distance_images(report), "Distance over images seen"),
        "compute_loss": (figures.compute_loss(report), loss),
        "hours_fid": (figures.hours_distance(report), "Training time against distance"),
        "sample_ms_fid": (figures.sample_distance(report), by_sampling),
        "memory_fid": (figures.memory_distance(report), "Peak memory of training against distance"),
    }
    plots = {name: (figure, caption) for name, (figure, caption) in every.items() if figure}
    rendered = {name: figures.render(figure) for name, (figure, _) in plots.items()}
    files = {f"{name}.{ending}": data for name, kinds in rendered.items() for ending, data in kinds.items()}
    captions = {caption: rendered[name]["svg"] for name, (_, caption) in plots.items()}
    if side_by_side := strips(sweep, report):
        files[SAMPLES] = render_samples(report, side_by_side)
    files |= {PAGE: render_page(report, captions, _grids(sweep, report)), CSV: to_csv(report)}
    for name, data in files.items():
        sweep.report.write(name, data)
    return files


def _grids(sweep: Sweep, report: Report) -> dict[str, bytes]:
    """Return the sample grids of each model at its last evaluated count, by caption."""
    last = {p.model: p for p in report.main}
    folders = {model: sweep.evaluation(Sampled(model, p.images_seen)) for model, p in last.items()}
    return {
        f"{model} after {last[model].images_seen:,} images": folder.read(GRID)
        for model, folder in folders.items()
        if folder.exists(GRID)
    }
