"""The report as one self-contained HTML page, and a second one that compares samples."""

import base64
from html import escape

from dis_scale.report import figures, tables
from dis_scale.report.points import Report
from dis_scale.report.samples import Strip

SAMPLES = "samples.html"
"""The second page."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; }
.names { margin: 1.5rem 0 0; } .names img { max-width: 100%; display: block; } .names + figure { margin-top: 0; }
figcaption, .note { color: #555; font-size: .9rem; } .missing { color: #a00; }
"""


def render_page(report: Report, plots: dict[str, bytes], grids: dict[str, bytes]) -> bytes:
    """Return the HTML of the report; `plots` are SVGs by caption, `grids` PNGs of samples by caption."""
    parts = [
        f"<h1>{escape(report.sweep)}: Gflops against {escape(report.metric)}</h1>",
        *(f"<p class='missing'>{escape(line)}</p>" for line in tables.missing(report)),
        *(_figure(caption, _picture(svg, "svg+xml")) for caption, svg in plots.items()),
        *(f"<p>{escape(line)}</p>" for line in figures.correlations(report)),
        "<h2>Every point</h2>",
        _table(report),
        *(f"<p class='note'>{escape(line)}</p>" for line in tables.notes(report)),
        "<h2>Samples at the last count</h2>" if grids else "",
        f"<p><a href='{SAMPLES}'>All models side by side, and each over its training</a></p>" if grids else "",
        *(_figure(caption, _picture(png, "png")) for caption, png in grids.items()),
    ]
    return _document(report.sweep, parts)


def render_samples(report: Report, strips: list[Strip]) -> bytes:
    """Return the HTML of the samples side by side."""
    parts = [
        f"<h1>{escape(report.sweep)}: samples side by side</h1>",
        "<p>The pictures at one position of two parts have the same label and the same noise.</p>",
    ]
    for title, names, pictures in strips:
        parts += [f"<h2>{escape(title)}</h2>", *([f"<p class='names'>{_picture(names, 'png')}</p>"] if names else [])]
        parts += [_figure(words, _picture(png, "png")) for words, png in pictures]
    return _document(f"{report.sweep}: samples", parts)


def _document(title: str, parts: list[str]) -> bytes:
    head = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>",
        f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style></head><body>",
    )
    return "\n".join([*head, *parts, "</body></html>\n"]).encode()


def _figure(caption: str, inner: str) -> str:
    return f"<figure>{inner}<figcaption>{escape(caption)}</figcaption></figure>"


def _picture(data: bytes, kind: str) -> str:
    """Embed an image as a data URL: inline SVGs in one document would share the names of their parts."""
    return f"<img alt='' src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>"


def _table(report: Report) -> str:
    columns = tables.columns(report)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = ("".join(f"<td>{escape(cell(p))}</td>" for cell in columns.values()) for p in report.means)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{cells}</tr>' for cells in rows)}</table>"
