"""MLflow's pages in a real headless Chromium: opened and clicked as docs/operations.md says, and what a person then sees.

apt-get install --no-install-recommends chromium chromium-driver

Pictures of a finished sweep, for docs/images: python -m tests.support.mlflow_pages http://127.0.0.1:5000 SWEEP FOLDER
"""

import base64
import contextlib
import io
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from scipy import ndimage
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

T = TypeVar("T")
PROGRAMS = ("chromium", "chromedriver")
PATIENCE_S = 60
CLOSE_ASSISTANT = "//*[@data-component-id='mlflow.assistant.chat_panel.close']"
RUNS = "//*[@role='row'][@row-id]//a[contains(@href, '/runs/')]"
HIDE_TOOLS = "document.head.insertAdjacentHTML('beforeend', '<style>.modebar { display: none }</style>')"
DRAWN = """
const shown = e => e.getBoundingClientRect().width > 0;
return [...document.querySelectorAll('.js-plotly-plot')].filter(shown).map(plot => ({
    title: plot.closest('[data-testid="experiment-view-compare-runs-card"]')?.innerText.trim().split('\\n')[0],
    lines: new Set([...plot.querySelectorAll('path.js-line')].filter(shown).map(e => e.style.stroke)).size,
    points: [...plot.querySelectorAll('path.point')].filter(shown).length,
    axes: [...plot.querySelectorAll('.xtitle, .ytitle')].map(e => e.textContent),
    x: plot.data[0].x, y: plot.data[0].y,
}))
"""
"""The plots that are in the window: the colours of their lines, their points, titles and values."""


def missing() -> list[str]:
    """Return the programs that this machine lacks."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextlib.contextmanager
def browser(login: tuple[str, str] | None = None) -> Iterator[webdriver.Chrome]:
    """Run a Chromium with nothing stored; `login` is the user and password that a person would type."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1300,820"):
        options.add_argument(f"--{option}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        if login:
            words = base64.b64encode(":".join(login).encode()).decode()
            driver.execute_cdp_cmd("Network.enable", {})
            driver.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {"Authorization": f"Basic {words}"}})
        yield driver
    finally:
        driver.quit()


@dataclass(frozen=True)
class Pages:
    """The pages of a sweep on an MLflow; `pictures` receives a PNG of each."""

    driver: webdriver.Chrome
    url: str
    sweep: str
    pictures: Path

    def enter(self) -> "Pages":
        """Open MLflow for the first time: select model training, close the assistant."""
        self.driver.get(f"{self.url}/#/experiments")
        self._click("//*[text()='Model training']")
        self._click(CLOSE_ASSISTANT)
        return self

    def open_runs(self) -> list[str]:
        """Open the sweep's experiment and unfold its run; return the names of the runs from above."""
        self.driver.get("about:blank")
        self.driver.get(f"{self.url}/#/experiments")
        self._click(f"//a[normalize-space()='dis-scale {self.sweep}']")
        if len(self.until(lambda: self._shown(RUNS))) == 1:
            self._click(f"//a[normalize-space()='{self.sweep}']/ancestor::*[@role='gridcell']//button")
        found = self.until(lambda: rows if len(rows := self._shown(RUNS)) > 1 else None)
        return [row.text for row in sorted(found, key=lambda row: row.location["y"])]

    def charts(self, metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Open the charts of these metrics; return what is drawn in each."""
        self._click("//input[@value='CHART']/ancestor::label")
        field = self.until(lambda: self._shown("//input[@placeholder='Search metric charts']"))[0]
        field.send_keys(f"^({'|'.join(metrics)})$")
        self.until(lambda: {plot["title"] for plot in self._plots() if plot["lines"]} == set(metrics))
        self._picture("charts")
        return {plot["title"]: plot for plot in self._plots()}

    def scatter(self, models: Sequence[str], x: str, y: str) -> dict[str, Any]:
        """Compare the models by their names in a scatter plot; return what is drawn."""
        for model in models:
            row = self.until(lambda model=model: self._shown(f"//a[normalize-space()='{model}']/ancestor::*[@row-id]"))[
                0
            ]
            self._click(f"//*[@row-id='{row.get_attribute('row-id')}']//input[@type='checkbox']/..")
        self._click("//button[normalize-space()='Compare']")
        self._click("//*[@role='tab'][normalize-space()='Scatter Plot']")
        for axis, name in (("x", x), ("y", y)):
            self._click(f"//*[@id='{axis}-axis-selector']")
            self._click(f"//*[@role='option'][normalize-space()='{name}']")
        self.until(lambda: [plot for plot in self._plots() if {x, y} == set(plot["axes"])])
        self._picture("scatter")
        (plot,) = self._plots()
        element = self.driver.find_element(By.CSS_SELECTOR, ".nsewdrag")
        return plot | {"points": coloured_spots(element.screenshot_as_png)}

    def open_artifact(self, run: str, folder: str, file: str) -> None:
        """Open a run by its name, and one of its files."""
        self.open_runs()
        self._click(f"//a[normalize-space()='{run}']")
        self._click("//*[@role='tab'][normalize-space()='Artifacts']")
        self._click(f"//*[normalize-space(text())='{folder}']")
        self._click(f"//*[normalize-space(text())='{file}']")
        self.until(lambda: self._shown(f"//*[normalize-space()='{folder}/{file}']"))

    def picture_size(self) -> tuple[int, int]:
        """Return the width and height of the largest picture on the page, as its file has them."""
        size = self.until(lambda: max(self.picture_sizes(), default=(0, 0))[0] > 0 and max(self.picture_sizes()))
        self._picture("samples")
        return size

    def picture_sizes(self) -> list[tuple[int, int]]:
        """Return the widths and heights of the pictures that are loaded."""
        return [tuple(size) for size in self.driver.execute_script(
            "return [...document.images].filter(e => e.complete).map(e => [e.naturalWidth, e.naturalHeight])"
        )]  # fmt: skip

    def report(self) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of the page within the page, and the sizes of its pictures."""
        frame = self.until(lambda: self._shown("//iframe"))[0]
        self.driver.switch_to.frame(frame)
        text = self.until(lambda: self.driver.find_element(By.TAG_NAME, "body").text)
        sizes = self.picture_sizes()
        self.driver.switch_to.default_content()
        self._picture("report")
        return text, sizes

    def until(self, answer: Callable[[], T]) -> T:
        """Ask until the answer is true; the page may change meanwhile."""
        wait = WebDriverWait(self.driver, PATIENCE_S, 0.3, ignored_exceptions=[WebDriverException])
        return wait.until(lambda _: answer())

    def _shown(self, path: str) -> list[WebElement]:
        return [each for each in self.driver.find_elements(By.XPATH, path) if each.is_displayed()]

    def _click(self, path: str) -> None:
        self.until(lambda: [each.click() for each in self._shown(path)[:1]])

    def _plots(self) -> list[dict[str, Any]]:
        return self.driver.execute_script(DRAWN)

    def _picture(self, name: str) -> None:
        """Write a picture of the page, without the tools that a plot shows only under a mouse."""
        self.driver.execute_script(HIDE_TOOLS)
        page = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        page.quantize(256, dither=Image.Dither.NONE).save(self.pictures / f"mlflow_{name}.png", optimize=True)


def coloured_spots(png: bytes) -> int:
    """Return the number of separate areas of a colour: this plot draws its points on a canvas, which has no elements."""
    colours = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return ndimage.label(colours.max(axis=2) - colours.min(axis=2) > 60)[1]


def main(url: str, sweep: str, folder: str) -> None:
    """Write the pictures of the pages of a sweep with several models."""
    from dis_scale.sweep import Sweep, images_name

    recipe = Sweep.open(sweep).recipe
    with browser() as driver:
        pages = Pages(driver, url, recipe.name, Path(folder)).enter()
        pages.open_runs()
        pages.charts(["loss", "class_accuracy", recipe.evaluate.metric])
        pages.scatter(list(recipe.models), "gmacs_forward", recipe.evaluate.metric)
        model = list(recipe.models)[-1]
        pages.open_artifact(model, "samples", f"samples-{images_name(recipe.train_of(model).images)}.png")
        pages.picture_size()
        pages.open_artifact(recipe.name, "report", "index.html")
        pages.report()


if __name__ == "__main__":
    main(*sys.argv[1:])
