"""The table of points, and its notes on what is missing or differs."""

import csv
import io
from pathlib import Path

from rich.console import Console

from dis_scale import report as reports
from dis_scale.recipe import Recipe, reading
from dis_scale.report import tables
from dis_scale.sweep import Sampled, Sweep
from dis_scale.sweep.documents import Metrics
from tests.conftest import TINY
from tests.support.evaluations import collect, compared, put, shown, sweep_at


def test_an_average_of_the_random_start_is_noted(tmp_path: Path) -> None:
    made = sweep_at(tmp_path, "tiny", reading.load(TINY, ["train.ema=0.99", "train.ema_ramp=null"]))
    put(made, Sampled("dit", 320), 9.0)
    assert "dit at 320 images: 82% of the average are the random start (train.ema_ramp" in shown(reports.table(collect(made)))
    ramped = sweep_at(tmp_path, "ramped", reading.load(TINY, ["train.ema=0.99"]))
    put(ramped, Sampled("dit", 320), 9.0)
    assert "random start" not in shown(reports.table(collect(ramped)))


def test_a_start_from_other_weights_is_noted_and_not_called_random(tmp_path: Path) -> None:
    start = "models.dit.start={kind: sweep, url: s3://b/sweeps/small, model: h, images: 1600}"
    made = sweep_at(tmp_path, "tiny", reading.load(TINY, ["train.ema=0.99", "train.ema_ramp=null", start]))
    put(made, Sampled("dit", 320), 9.0)
    text = shown(reports.table(collect(made)))
    assert "random start" not in text
    assert "dit: began with weights of h at 1,600 images of s3://b/sweeps/small, whose training its images and" in text


def test_the_metric_precision_is_beside_the_precision_of_sampling(sweep: Sweep) -> None:
    """One name for both lost the metric, and the CSV's header had a column more than its rows."""
    put(sweep, Sampled("dis128", 320), 9.0, precision=0.67)
    report = collect(sweep)
    header, *rows = csv.reader(io.StringIO(tables.to_csv(report).decode()))
    assert {len(header)} == {len(row) for row in rows}
    assert len(set(header)) == len(header)
    last = tables.records(report)[-1]
    assert (last["precision"], last["sampling_precision"]) == (0.67, "fp32")


def test_the_table_fits_a_terminal_of_80_characters(sweep: Sweep) -> None:
    put(sweep, Sampled("dis128", 320), 1234.5, 67.8)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(reports.table(collect(sweep)))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    for words in ("dis128", "1234 ± 68", "50.0%", "main: 60 samples, ddim, 3 steps, guidance 1.5, fp32"):
        assert any(words in line for line in lines), f"{words} is complete, on one line"
    assert "…" not in "".join(lines)


def test_missing_points_are_named(sweep: Sweep) -> None:
    text = shown(reports.table(collect(sweep)))
    assert "dit failed: a worker was lost 4 times" in text
    assert "dis at 320 images skipped: weights.safetensors: damaged" in text
    assert "9 ± 0.5" in text
    assert "main: 60 samples, ddim, 3 steps, guidance 1.5, fp32" in text
    assert text.count("not verified against published tables") == 1


def test_published_ways_of_sampling_are_named(tmp_path: Path, recipe: Recipe) -> None:
    made, plain = (sweep_at(tmp_path, name, recipe) for name in ("published", "plain"))
    for each in (made, plain):
        put(each, Sampled("dis", 160), 9.0)
    folder = made.evaluation(Sampled("dis", 160))
    stored = Metrics.read(folder)
    sampling = stored.sampling.model_copy(update={"guidance_channels": 3})
    stored.changed(labels="random", sampling=sampling).write(folder)
    text = shown(reports.table(collect(made)))
    assert "main: 60 samples, ddim, 3 steps, guidance 1.5 on 3 channels, fp32, random labels" in text
    words = compared(collect(plain), collect(made))
    assert "labels differs: balanced and random" in words
    assert "guidance_channels differs: null and 3" in words
