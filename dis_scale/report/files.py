"""The report's files below `report/`: figures, the CSV, the page."""

from dis_scale.errors import UserError
from dis_scale.evaluation import results
from dis_scale.evaluation.results import Drawn
from dis_scale.report import figures
from dis_scale.report.collect import Report
from dis_scale.report.page import page
from dis_scale.report.tables import to_csv
from dis_scale.storage.folder import Folder

CSV, PAGE = "gflops_fid.csv", "index.html"


def write(sweep: Folder, report: Report, published: bool = False) -> dict[str, bytes]:
    """Puts the figures, the page and, last, the CSV below `report/`; returns them by name.

    `published` draws others' points beside ours; UserError where ours are not FID on the same images.
    """
    if published and (report.metric, report.resolution, report.num_classes) != ("fid", 256, 1000):
        raise UserError(
            f"--published: others' points are FID of 50,000 samples on ImageNet 256 x 256, {report.sweep} has {report.metric} at "
            f"{report.resolution} pixels and {report.num_classes} classes"
        )
    drawn = {
        "gflops_fid": (figures.gflops_distance(report, published), "Gflops against distance at each image count"),
        "compute_fid": (figures.compute_distance(report), "Training compute against distance, with its lower hull"),
        "fid_images": (figures.distance_images(report), "Distance over images seen"),
    }
    rendered = {name: figures.render(drawing) for name, (drawing, _) in drawn.items()}
    files = {f"{name}.{ending}": data for name, kinds in rendered.items() for ending, data in kinds.items()}
    captions = {caption: rendered[name]["svg"] for name, (_, caption) in drawn.items()}
    files |= {PAGE: page(report, captions, _grids(sweep, report)), CSV: to_csv(report)}
    for name, data in files.items():
        (sweep / "report").write(name, data)
    return files


def _grids(sweep: Folder, report: Report) -> dict[str, bytes]:
    """Each model's samples at its last evaluated count, by caption."""
    last = {p.model: p for p in report.main}
    places = {model: results.folder(sweep, Drawn(model, p.images)) for model, p in last.items()}
    return {
        f"{model} after {last[model].images:,} images": place.read(results.GRID)
        for model, place in places.items()
        if place.exists(results.GRID)
    }
