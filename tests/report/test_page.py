"""The pages of a finished sweep, a running one and two that are compared: what they show, to all eyes, without a network."""

import http.client
import itertools
import re
import socket
import threading
from collections import Counter
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from queue import Queue

import numpy as np
import pytest

from dis_scale import report as reports
from dis_scale.cli import results
from dis_scale.evaluation.sampling import grid
from dis_scale.recipe import Recipe
from dis_scale.report import drawing, figures
from dis_scale.report.serving import serve
from dis_scale.storage import lease
from dis_scale.sweep import GRID, Sampled, Sweep, command_lease
from dis_scale.sweep.documents import Metrics
from dis_scale.tracking.rows import RowWriter
from dis_scale.upkeep import retention
from tests.support.commands import invoke
from tests.support.documents import put_published
from tests.support.evaluations import collect, put, sweep_at, two_with_seeds
from tests.support.waiting import wait_until

PROTAN = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
DEUTAN = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
"""Linear RGB as people without red and without green cones see it (Machado, Oliveira and Fernandes 2009, table 1, severity 1)."""
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


class Page(HTMLParser):
    """A page's elements, as (tag, attributes), and its words."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(data.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def linear(colour: str) -> np.ndarray:
    """Return linear RGB of a colour in hexadecimal."""
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Return CIELAB of linear RGB."""
    t = TO_XYZ @ rgb.clip(0, 1) / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", [np.eye(3), PROTAN, DEUTAN])
def test_colours_of_models_are_apart_for_all_eyes_and_visible_on_both_papers(eyes: np.ndarray) -> None:
    """A difference of 2 in CIELAB is just seen. Graphics need a contrast of 3 (WCAG 2.1, 1.4.11)."""
    kinds = [
        (drawing.COLOURS[:6], 30),
        (drawing.COLOURS, 19),
        (drawing.shades(7), 13),
        (drawing.shades(12), 6),
        (drawing.shades(13), 5),
    ]
    for colours, apart in kinds:
        seen = [lab(np.array(eyes) @ linear(colour)) for colour in colours]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > apart
    luminances = [(TO_XYZ @ linear(colour))[1] for colour in (*drawing.COLOURS, *drawing.shades(7), *drawing.shades(20))]
    dark = (TO_XYZ @ linear("#14171a"))[1]
    assert min(1.05 / (luminance + 0.05) for luminance in luminances) > 2.9
    assert min((luminance + 0.05) / (dark + 0.05) for luminance in luminances) > 2.9


def test_a_model_has_one_colour_in_all_figures(sweep: Sweep) -> None:
    report = collect(sweep)
    colours = drawing.colours_of(report.recipe)
    for figure, _ in figures.every(report, {}).values():
        texts = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
        assert {"dis", "dis32", "dis64", "dis128"} <= texts.keys()
        assert all(texts[model] == colours[model] for model in ("dis", "dis32", "dis64", "dis128"))


def test_the_page_of_a_sweep_tells_what_was_found_and_loads_nothing(sweep: Sweep) -> None:
    text = reports.write(sweep, collect(sweep))[reports.PAGE]
    page = Page(text)
    assert "Best model" in page.words
    assert "fd_digits_80 4.5 ± 0.5 after 160 images" in page.words
    assert "digits, 10 classes, 32 pixels wide" in page.words
    assert "the Fréchet distance of 80 samples from the real images under the features of the extractor digits" in page.words
    assert all(image["alt"] for image in page.of("img"))
    assert all(svg["aria-label"] for svg in page.of("svg"))
    assert [points["aria-label"] for points in page.of("g") if points.get("class") == "point"].count(
        "dis64, 160 images: fd_digits_80 5 ± 0.5"
    ) == 4, "in three figures, and in the narrow one"
    ids = Counter(attributes["id"] for _, attributes in page.elements if attributes.get("id"))
    assert [name for name, times in ids.items() if times > 1] == []
    assert all(f"#{name}" not in text.decode() or ids[name] for name in re.findall(r"url\(#([^)]+)\)", text.decode()))
    loaded = [
        value
        for tag, key in (("img", "src"), ("script", "src"), ("link", "href"))
        for each in page.of(tag)
        if (value := each.get(key))
    ]
    assert all(value.startswith("data:") for value in loaded)
    assert not re.search(r"@import|url\(['\"]?https?:|fetch\(|XMLHttpRequest|<iframe", text.decode())
    assert "prefers-color-scheme: dark" in text.decode()
    assert page.of("details"), "the notes are folded"
    assert all(each in text.decode() for each in ("@media print", '"beforeprint"')), "on paper nothing is folded"
    assert not [meta for meta in page.of("meta") if meta.get("http-equiv") == "refresh"], "no command runs"
    shown = [image["alt"] for image in page.of("img")]
    assert "dis128 after 160 images" in shown, "the best, as nothing newer comes"


def test_a_running_sweep_has_a_page_before_anything_is_evaluated(tmp_path: Path, tiny: Recipe) -> None:
    running = sweep_at(tmp_path, "tiny", tiny)
    rows = RowWriter(running.run("dis").log, attempt=1)
    for images in (16, 32, 48):
        rows.add(images, {"loss": 1 / images, "images_per_s": 4.0})
    rows.close()
    with lease.hold(command_lease(running.folder), "a cluster"), lease.hold(running.run("dis").lease, "a cluster"):
        reports.write(running, collect(running), running=True)
    page = Page(running.report.read(reports.PAGE))
    assert running.report.list() == [reports.PAGE]
    assert [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "refresh"] == ["60"]
    assert [(each["value"], each["max"]) for each in page.of("progress")] == [("48", "320"), ("0", "320")]
    assert "48 of 320 images" in page.words
    assert "68 s left" in page.words
    assert "Training loss over images seen" in page.words
    assert "no model is measured" in page.words
    assert "from the first command to now" in page.words


def test_a_running_sweep_shows_its_first_samples_before_they_are_measured(tmp_path: Path, tiny: Recipe) -> None:
    """At a sixtieth of a busy CPU, or with 50,000 samples, the metrics come minutes later."""
    sweep = sweep_at(tmp_path, "tiny", tiny)
    sampled, size = Sampled("dit", 320), sweep.recipe.data.resolution
    sweep.evaluation(sampled).write(GRID, grid(np.zeros((4, size, size, 3), np.uint8), 2, []))
    put_published(sweep.run("dit").published_at(320))
    with lease.hold(command_lease(sweep.folder), "a cluster"):
        reports.write(sweep, collect(sweep), running=True)
    assert "dit after 320 images, not measured yet" in Page(sweep.report.read(reports.PAGE)).words


def test_untrained_weights_alone_are_in_the_table_and_in_no_figure(tmp_path: Path, recipe: Recipe) -> None:
    begun = sweep_at(tmp_path, "begun", recipe)
    put(begun, Sampled("dis32", 0), 90.0)
    page = Page(reports.write(begun, collect(begun))[reports.PAGE])
    assert ("90 ± 0.5" in page.words, page.of("svg")) == (True, [])


def test_the_time_of_a_sweep_begins_with_its_first_command(sweep: Sweep) -> None:
    for _ in range(2):
        with lease.hold(sweep.lease("sweep")):
            pass
    first = lease.first_taken_at(sweep.lease("sweep"))
    assert first is not None
    folder = sweep.evaluation(Sampled("dis64", 160))
    Metrics.read(folder).changed(time=first + 7200).write(folder)
    page = Page(reports.write(sweep, collect(sweep))[reports.PAGE])
    assert f"2.0 hfrom the first command to the last result, {datetime.fromtimestamp(first, UTC):%Y-%m-%d %H:%M} to" in page.words
    with lease.hold(sweep.lease("sweep")):
        pass
    retention.delete(retention.find_unneeded(sweep))
    assert lease.first_taken_at(sweep.lease("sweep")) == first, "also after gc"


def test_the_row_that_the_note_calls_bold_is_bold_on_the_page(tmp_path: Path) -> None:
    code, output = invoke("compare", *map(str, two_with_seeds(tmp_path)), "--page", str(tmp_path / "both.html"))
    assert code == 0, output
    rows = Page((tmp_path / "both.html").read_bytes()).of("tr")
    assert [row.get("class") for row in rows] == [None, "", "bold"]


def test_two_sweeps_have_a_page_with_the_samples_of_both(sweep: Sweep, tmp_path: Path, recipe: Recipe) -> None:
    other = sweep_at(tmp_path / "other", "other", recipe)
    put(other, Sampled("dis32", 160), 7.5)
    for each in (sweep, other):
        each.save_recipe()
    code, output = invoke("compare", str(sweep), str(other), "--page", str(tmp_path / "both.html"))
    assert (code, f"page     {tmp_path}/both.html" in output) == (0, True)
    page = Page((tmp_path / "both.html").read_bytes())
    assert "tiny against other" in page.words
    assert "+1.5 ± 0.71" in page.words
    assert [image["alt"] for image in page.of("img")] == ["tiny: dis128 after 160 images", "other: dis32 after 160 images"]


def test_a_page_that_is_missing_is_built_to_be_served_without_the_report_of_a_finished_sweep(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.save_recipe()
    threading.Thread(target=results.report, args=(str(sweep),), kwargs={"serve": True}, daemon=True).start()
    wait_until(lambda: "serving  http://" in capsys.readouterr().out)
    assert sorted(sweep.report.list()) == [reports.PAGE, "samples.html"]


def test_the_report_is_served_from_storage_to_this_machine_only(sweep: Sweep) -> None:
    sweep.report.write(reports.PAGE, b"first")
    said = Queue[str]()
    threading.Thread(target=serve, args=(sweep.report, said.put), daemon=True).start()
    address = re.search(r"http://127\.0\.0\.1:(\d+)", said.get(timeout=10))
    assert address

    def get(path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=10)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        sizes[path] = answer.headers["Content-Length"]
        return answer.status, answer.read()

    sizes: dict[str, str] = {}
    assert get("/") == (200, b"first")
    with pytest.raises(ConnectionRefusedError):  # another address of this machine
        socket.create_connection(("127.0.0.2", int(address[1])), timeout=10)
    assert get("/", Host="example.org")[0] == 421, "a name that was pointed here"
    assert (get("/index.html", "HEAD"), get("/none", "HEAD")) == ((200, b""), (404, b""))
    assert sizes["/index.html"] == "5", "of the page, which is not sent"
    sweep.report.write(reports.PAGE, b"second")
    assert get("/index.html") == (200, b"second"), "as it is now"
    sweep.folder.write("secret", b"")
    assert [get(path)[0] for path in ("/../secret", "/%2e%2e/secret", "/none")] == [404, 404, 404]
