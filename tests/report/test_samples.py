"""Samples side by side: the right parts of the right grids, with their names."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from dis_scale import report as reports
from dis_scale.evaluation.sampling import grid
from dis_scale.recipe import Recipe, reading
from dis_scale.report.points import evenly
from dis_scale.report.samples import CELL, GAP, MOST_COUNTS, MOST_MODELS, strips
from dis_scale.sweep import GRID, REAL, Sampled, Sweep
from tests.conftest import TINY
from tests.support.evaluations import collect, put, sweep_at


def show(sweep: Sweep, model: str, images: int, shade: int, names: list[str]) -> None:
    """Store an evaluation whose pictures are of one grey, with another one in the last row."""
    put(sweep, Sampled(model, images), 4.5)
    size = sweep.recipe.data.resolution
    pictures = np.full((6, size, size, 3), shade, np.uint8)
    pictures[4:] = 255 - shade
    sweep.evaluation(Sampled(model, images)).write(GRID, grid(pictures, 2, names))


def greys(png: bytes) -> tuple[tuple[int, int], list[int]]:
    image = Image.open(io.BytesIO(png))
    pixels = np.asarray(image)
    assert (pixels[CELL, :, 3] == 0).all(), "a gap"
    return image.size, np.unique(pixels[pixels[:, :, 3] > 0][:, :3]).tolist()


def test_models_are_side_by_side_and_each_over_its_training(tmp_path: Path, tiny: Recipe) -> None:
    sweep = sweep_at(tmp_path, "tiny", tiny)
    for model, images, shade in [("dis", 0, 10), ("dis", 160, 20), ("dit", 160, 30)]:
        show(sweep, model, images, shade, ["cat", "dog"])
    size = sweep.recipe.data.resolution
    sweep.folder.write(REAL, grid(np.full((4, size, size, 3), 40, np.uint8), 2, ["cat", "dog"]))
    every, dis = strips(sweep, collect(sweep))
    assert (every.title, every.turning) == ("All models", 0)
    assert [part.words for part in every.parts] == [
        "real images",
        "dis, 160 images, fd_digits_80 4.5 ± 0.5",
        "dit, 160 images, fd_digits_80 4.5 ± 0.5",
    ]
    assert [greys(part.picture) for part in every.parts] == [((131, 131), [grey]) for grey in (40, 20, 30)]
    assert (dis.title, dis.turning) == ("dis over its training", 2)
    assert [greys(part.picture)[1] for part in dis.parts] == [[10], [20], [40]]
    assert [part.names for part in dis.parts] == [["cat", "dog"]] * 3


def test_the_page_of_samples_is_complete(tmp_path: Path, tiny: Recipe) -> None:
    sweep = sweep_at(tmp_path, "tiny", tiny)
    put(sweep, Sampled("dis", 160), 4.5)
    sweep.evaluation(Sampled("dis", 160)).delete(GRID)
    assert "samples.html" not in reports.write(sweep, collect(sweep)), "no grid is stored"
    show(sweep, "dis", 160, 20, [])
    files = reports.write(sweep, collect(sweep))
    assert "samples.html" in files
    page = sweep.report.read("samples.html").decode()
    assert "dis, 160 images" in page
    assert page.count("data:image/webp") == 1
    assert "type='range'" not in page, "one count has no slider"
    show(sweep, "dis", 320, 30, [])
    reports.write(sweep, collect(sweep))
    page = sweep.report.read("samples.html").decode()
    assert (page.count("type='range' max='1'"), page.count("<figure data-turn")) == (1, 2)


def test_large_pictures_are_made_smaller(tmp_path: Path, tiny: Recipe) -> None:
    data = tiny.data.model_copy(update={"resolution": 128})
    sweep = sweep_at(tmp_path, "tiny", tiny.model_copy(update={"data": data}))
    show(sweep, "dis", 160, 20, ["cat", "dog"])
    (every,) = strips(sweep, collect(sweep))
    assert greys(every.parts[0].picture) == ((2 * CELL + GAP, 2 * CELL + GAP), [20])


def test_many_counts_are_thinned_out_evenly() -> None:
    shown = evenly(range(50), MOST_COUNTS)
    assert (len(shown), shown[0], shown[-1]) == (MOST_COUNTS, 0, 49)
    assert set(np.diff(shown)) == {7}


def test_of_many_models_some_are_shown(tmp_path: Path, tiny: Recipe) -> None:
    """Of a hundred at 256 pixels the page had 200 MB."""
    text = tiny.model_dump(mode="json")
    text["models"] = {f"dis-{i}": text["models"]["dis"] | {"width": 16 + 2 * i} for i in range(MOST_MODELS + 5)}
    sweep = sweep_at(tmp_path, "tiny", Recipe.model_validate(text, strict=False))
    for model in sweep.recipe.models:
        show(sweep, model, 160, 20, [])
    (every,) = strips(sweep, collect(sweep))
    assert (every.title, len(every.parts)) == (f"{MOST_MODELS} of {MOST_MODELS + 5} models", MOST_MODELS)


def test_a_model_whose_first_seed_is_not_measured_shows_another_ones_samples(tmp_path: Path) -> None:
    sweep = sweep_at(tmp_path, "tiny", reading.load(TINY, ["models.dit.seeds=3"]))
    show(sweep, "dit-seed-1", 160, 30, [])
    show(sweep, "dit-seed-2", 160, 50, [])
    (every,) = strips(sweep, collect(sweep))
    assert [(part.words.split(",")[0], greys(part.picture)[1]) for part in every.parts] == [("dit", [30])]


def test_a_damaged_picture_is_left_out_and_costs_no_page(tmp_path: Path, tiny: Recipe) -> None:
    sweep = sweep_at(tmp_path, "tiny", tiny)
    for model in ("dis", "dit"):
        show(sweep, model, 160, 20, [])
    (whole := sweep.evaluation(Sampled("dis", 160))).write(GRID, whole.read(GRID)[:-60])
    sweep.folder.write(REAL, b"")
    (every,) = strips(sweep, collect(sweep))
    assert [part.words.split(",")[0] for part in every.parts] == ["dit"]
