"""The report as self-contained HTML: the page of a sweep, running or finished, of a comparison, and of samples side by side.

Styles are in page.css, the script in page.js; both are written into the page, which loads nothing.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from dis_scale.process.errors import counted
from dis_scale.process.progress import time_words
from dis_scale.process.redaction import redact
from dis_scale.report import figures, tables
from dis_scale.report.points import Point, Report
from dis_scale.report.samples import Picture, Strip
from dis_scale.upkeep.status import Status

RELOAD_S = 60
"""Interval at which the page of a running sweep is loaded again."""


class Plot(NamedTuple):
    """A figure as SVG, `wide` if it needs the width of the page; `narrow` is the same for a phone, if any."""

    caption: str
    svg: bytes
    wide: bool = False
    narrow: bytes = b""


class Facts(NamedTuple):
    """Progress of a sweep at the time `now`, and the `times` of its first command and of its last measured value.

    The latter is `now` while the sweep is at work. All times are Unix times.
    """

    status: Status
    now: float
    times: tuple[float, float] | None


def render_page(report: Report, facts: Facts, plots: Sequence[Plot], pictures: Sequence[Picture], more: str = "") -> bytes:
    """Return the page of a sweep; `pictures` are real images and samples, `more` is the page of all samples."""
    status, found = facts.status, tables.findings(report)
    parts = [
        f"<header><h1>{escape(report.sweep)}</h1>",
        f"<p class='quiet'>{escape(_metric(report))}</p>{_list(_facts(report, facts))}</header>",
        *(f"<p class='bad'>{escape(line)}</p>" for line in [*tables.missing(report), status.stopped] if line),
        _progress(facts) if status.doing != "done" else "",
        _section("Samples", pictures),
        f"<p><a href='{more}'>All models side by side, and each over its training</a></p>" if more else "",
        _figures(plots),
        *(f"<p>{escape(line)}.</p>" for line in found.said),
        _folded("Best sizes and laws of the study", found.details),
        _table(tables.points_table(report), "Every point") if report.points else "",
        _folded("How these numbers were measured", [*figures.correlations(report), *tables.notes(report)]),
    ]
    return _document(report.sweep, parts, RELOAD_S if status.at_work else None)


def render_comparison(a: Report, b: Report, table: Table, plot: Plot, pictures: Sequence[Picture]) -> bytes:
    """Return the page of two sweeps side by side; the caption of `table` is folded."""
    facts = {report.sweep: _best(report) for report in (a, b)}
    parts = [
        f"<header><h1>{escape(a.sweep)} against {escape(b.sweep)}</h1>",
        f"<p class='quiet'>{escape(_metric(a))}</p>{_list(facts)}</header>",
        _section("Samples", pictures),
        _figures([plot]),
        _table(table, "Differences"),
        _folded("How the sweeps were compared", str(table.caption or "").splitlines()),
    ]
    return _document(f"{a.sweep} against {b.sweep}", parts)


def render_samples(report: Report, strips: list[Strip]) -> bytes:
    """Return the page of samples side by side, with a slider for those over a training."""
    parts = [
        f"<header><h1>{escape(report.sweep)}: samples</h1>",
        "<p class='quiet'>Samples at one position of two pictures have the same label and the same noise.</p></header>",
    ]
    parts += [_section(strip.title, strip.parts, strip.turning) for strip in strips]
    return _document(f"{report.sweep}: samples", parts)


def _metric(report: Report) -> str:
    """Return the definition of the metric in words."""
    settings = report.recipe.evaluate
    if not settings.extractors:
        held_out = report.recipe.data.held_out_images
        return f"{report.metric} is the loss on {held_out:,} images that training never sees: lower is better."
    features = "Inception-v3" if settings.extractor.name == "inception" else f"the extractor {settings.extractor.name}"
    floors = "".join(f" For {f.words} it is {tables.with_error(f.distance, f.error)}." for f in report.floors)
    samples = "endless" if "infinity" in report.metric else f"{settings.samples:,}"
    return (
        f"{report.metric} is the Fréchet distance of {samples} samples from the real images under the features of "
        f"{features}: lower is better.{floors}"
    )


def best_point(report: Report) -> Point | None:
    """Return the trained point with the lowest distance, of ended schedules if any has ended."""
    trained = [p for p in report.main if p.images_seen]
    return min([p for p in trained if not p.unfinished] or trained, key=report.distance, default=None)


def _best(report: Report) -> tuple[str, str]:
    if not (p := best_point(report)):
        return "none yet", "no model is measured"
    return (p.model, f"{report.metric} {tables.with_error(report.distance(p), report.error(p))} after {p.images_seen:,} images")


def _facts(report: Report, facts: Facts) -> dict[str, tuple[str, str]]:
    """Return the best model, the images, the models and the time: by title, each with a short value and more words."""
    recipe, (status, _, times) = report.recipe, facts
    source, classes = recipe.data.source, recipe.data.num_classes
    kinds = sorted({model.kind for model in recipe.models.values()})
    most = max(recipe.train_of(name).images for name in recipe.models)
    of_images = f"{redact(getattr(source, 'url', source.kind))}, {counted(classes, 'class') + ', ' if classes else ''}"
    found = {
        "Best model": _best(report),
        "Images": (
            f"{report.images:,}" if report.images else "not known" if report.points else "not counted yet",
            f"{of_images}{recipe.data.resolution} pixels wide",
        ),
        "Models": (f"{len(recipe.models)}", f"{', '.join(kinds)}; up to {most:,} images each"),
    }
    if times:
        first, last = (datetime.fromtimestamp(each, UTC) for each in times)
        span = f"{first:%H:%M} to {'' if first.date() == last.date() else f'{last:%Y-%m-%d} '}{last:%H:%M} UTC"
        found["Stopped" if status.stopped else status.doing.capitalize()] = (
            f"{time_words(times[1] - times[0])}",
            f"from the first command to {'now' if status.at_work else 'the last result'}, {first:%Y-%m-%d} {span}",
        )
    return found


def _list(facts: dict[str, tuple[str, str]]) -> str:
    rows = (
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b>{escape(more)}</dd></div>" for name, (value, more) in facts.items()
    )
    return f"<dl>{''.join(rows)}</dl>"


def _progress(facts: Facts) -> str:
    """Return the progress of a sweep and its models."""
    rows = []
    for run in facts.status.runs:
        left = "" if run.left_s is None else f"{time_words(run.left_s)} left"
        rows.append(
            f"<tr><td class='left'>{escape(run.model)}</td><td class='left'>{run.doing}</td>"
            f"<td class='bar'><progress max='{run.images}' value='{run.images_seen}'></progress></td>"
            f"<td>{run.images_seen:,} of {run.images:,} images</td><td>{left}</td></tr>"
        )
    now = f"{datetime.fromtimestamp(facts.now, UTC):%Y-%m-%d %H:%M:%S} UTC"
    stage = f"{escape(facts.status.stage)}; " if facts.status.stage else ""
    head = f"<h2>{escape(facts.status.doing.capitalize())}</h2><p class='quiet' data-at='{facts.now:.0f}'>{stage}as of {now}</p>"
    return f"{head}<div class='scroll'><table>{''.join(rows)}</table></div>"


def _figures(plots: Sequence[Plot]) -> str:
    """Return the figures with their captions."""
    figures = []
    for plot in plots:
        inner, kind = _svg(plot.svg, plot.caption), " class='wide'" if plot.wide else ""
        if plot.narrow:
            inner = f"<div class='broad'>{inner}</div><div class='narrow'>{_svg(plot.narrow, plot.caption)}</div>"
        figures.append(f"<figure{kind}>{inner}<figcaption>{escape(plot.caption)}</figcaption></figure>")
    return f"<h2>Curves</h2><div class='figures'>{''.join(figures)}</div>" if figures else ""


def _svg(svg: bytes, alt: str) -> str:
    """Return matplotlib's SVG as a part of a page: in its colours, with points to touch, without ids that other figures have."""
    text = svg.decode()[svg.decode().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[\w.]+_\d+"', "", text).replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")
    text = re.sub(
        r'<a xlink:href="#([^"]*)"[^>]*>(\s*<use [^>]*x="([^"]+)" y="([^"]+)"[^>]*>)\s*</a>',
        r'<g class="point" tabindex="0" role="img" aria-label="\1">\2<circle cx="\3" cy="\4" r="10"/></g>',
        text,
    )
    return text.replace("<svg", f"<svg role='group' aria-label='{escape(alt, quote=True)}'", 1)


def _section(title: str, pictures: Sequence[Picture], turning: int = 0) -> str:
    """Return pictures with the names of their columns; a slider shows one of the first `turning` at a time."""
    figures = []
    for i, each in enumerate(pictures):
        words, names = escape(each.words), "".join(f"<span>{escape(name)}</span>" for name in each.names)
        head = f"<div class='names' aria-hidden='true'>{names}</div>" if names else ""
        turn = " data-turn" if i < turning else ""
        image = f"<img alt='{words}' src='data:image/webp;base64,{base64.b64encode(each.picture).decode()}'>"
        figures.append(f"<figure{turn}>{head}{image}<figcaption>{words}</figcaption></figure>")
    last = turning - 1
    slider = f"<input type='range' max='{last}' value='{last}' aria-label='images seen'>" if turning else ""
    inner = f"<h2>{escape(title)}</h2>{slider}<div class='figures'>{''.join(figures)}</div>"
    return f"<section>{inner}</section>" if figures else ""


def _table(table: Table, title: str) -> str:
    """Return a terminal's table; columns of words are on the left, and a row of a style has its name as a class."""
    side = [" class='left'" if column.justify == "left" else "" for column in table.columns]
    head = "".join(f"<th{left}>{escape(str(column.header))}</th>" for left, column in zip(side, table.columns, strict=True))
    cells = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join(
        f"<tr class='{row.style or ''}'>"
        f"{''.join(f'<td{left}>{escape(str(cell))}</td>' for left, cell in zip(side, each, strict=True))}</tr>"
        for row, each in zip(table.rows, cells, strict=True)
    )
    return f"<h2>{escape(title)}</h2><div class='scroll'><table><tr>{head}</tr>{body}</table></div>"


def _folded(title: str, lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details><summary>{escape(title)}</summary><ul>{items}</ul></details>" if items else ""


def _document(title: str, parts: list[str], reload_s: int | None = None) -> bytes:
    style, script = (Path(__file__).with_name(f"page.{ending}").read_text() for ending in ("css", "js"))
    again = f"<meta http-equiv='refresh' content='{reload_s}'>" if reload_s else ""
    head = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>{again}",
        f"<meta name='viewport' content='width=device-width'><style>{style}</style></head><body>",
    )
    return "\n".join(
        [*head, *parts, f"<div id='tip' role='status' hidden></div><script>{script}</script></body></html>\n"]
    ).encode()
