"""The site of docs/: it builds without warnings, and its generated pages are complete."""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from dis_scale import models, vae
from dis_scale.cli.help import EXAMPLES, EXIT_CODES, INTERRUPTED
from dis_scale.data.survey import Survey
from dis_scale.planning.first_recipe import Machine, propose
from dis_scale.planning.plan import price_sweep
from dis_scale.process.errors import UNFORESEEN
from dis_scale.recipe import LatentShape, TrainedVae, reading
from dis_scale.training.memory import worker_bytes
from dis_scale.weights.export import save
from docs.reference import GENERATED, commands, errors, settings
from tests.conftest import TINY
from tests.support.pages import blocks, failures, require_command

ROOT = Path(__file__).parent.parent
PRODUCT = [path for folder in ("dis_scale", "pipelines") for path in sorted((ROOT / folder).rglob("*.py"))]
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs-material is not installed: pip install '.[dev]'"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "", "")
    return folder


@needs_mkdocs
def test_the_site_builds_without_warnings(site: Path) -> None:
    assert all((site / name).with_suffix(".html").exists() for name in ["index.md", "runbooks/disk-full.md"])


def test_the_generated_pages_are_in_the_repository(tmp_path: Path) -> None:
    """So that links work where the code is read. Another process: a test may have brought a family into this one."""
    subprocess.run([sys.executable, "-m", "docs.reference", str(tmp_path)], cwd=ROOT, check=True)
    for name in GENERATED:
        assert (ROOT / "docs" / name).read_text() == (tmp_path / name).read_text(), "write it again: make docs"


@needs_mkdocs
def test_the_site_is_searched_from_disk(site: Path) -> None:
    """There browsers load no JSON and start no worker: the index is a script, and ours replaces the worker."""
    assert (site / "search/search_index.js").read_text().startswith("var __index = {")
    assert '<script src="../iframe-worker.js">' in (site / "runbooks/disk-full.html").read_text()
    assert "window.Worker = " in (site / "iframe-worker.js").read_text()


@needs_mkdocs
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r'<(?:script|img|iframe)[^>]+src="https?:|<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="https?:')
    assert [page.name for page in site.rglob("*.html") if loaded.search(page.read_text())] == []


def test_the_severities_of_the_alerts_are_those_of_the_file() -> None:
    alerts = yaml.safe_load((ROOT / "ops" / "prometheus" / "alerts.yaml").read_text())["groups"]
    expected = {rule["alert"]: rule["labels"]["severity"] for group in alerts for rule in group["rules"] if "alert" in rule}
    page = (ROOT / "docs" / "operations.md").read_text()
    assert dict(re.findall(r"^\| `(DisScale\w+)` \| (\w+) \|", page, re.MULTILINE)) == expected


@needs_mkdocs
def test_each_page_is_in_the_navigation(site: Path) -> None:
    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.html")} - {"404.html"}
    linked = set(re.findall(r'href="([^"#:]+\.html)"', (site / "index.html").read_text()))
    assert pages - linked == set()


def test_each_setting_is_on_the_page_with_its_default() -> None:
    page = settings.page()
    sections = {
        part: page.partition(f"<a id='{part.__name__.lower()}'></a>\n")[2].partition("\n## ")[0] for _, part in settings.parts()
    }
    assert len(sections) > 30
    missing = [
        (part.__name__, name) for part, text in sections.items() for name in part.model_fields
        if name != "kind" and f"\n| `{name}` |" not in text
    ]  # fmt: skip
    assert missing == []
    lines = {line for text in sections.values() for line in text.splitlines() if line.startswith("| `")}
    assert [line for line in lines if line.endswith("|  |")] == []
    assert "| `keep_resume` | integer >= 1 | `2` | yes |" in page
    assert "| `lanes` | integer >= 1 | required | no |" in page


def test_each_command_is_on_the_page_with_an_example() -> None:
    names = dict(commands.commands()).keys()
    assert names == EXAMPLES.keys()
    assert failures(require_command, (line.split() for line in EXAMPLES.values())) == []
    page = commands.page()
    assert [name for name in names if f"\n## dis-scale {name}\n" not in page] == []


def test_each_exit_code_is_explained() -> None:
    assert EXIT_CODES.keys() == commands.exit_codes()


def test_each_variable_of_ours_is_explained() -> None:
    """DIS_SCALE_JOB is set by a job's driver for its own processes."""
    ours = {name for path in PRODUCT for name in re.findall(r"\"(DIS_SCALE_\w+)\"", path.read_text())}
    explained = {name for names in commands.ENVIRONMENT for name in names.split(", ")}
    assert ours - {"DIS_SCALE_JOB"} <= explained
    source = "\n".join(path.read_text() for path in PRODUCT)
    library = {"HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "AWS_ENDPOINT_URL", "CC", "NO_COLOR", "FORCE_COLOR"}
    assert [name for name in explained - library if name not in source] == []


def test_each_kind_of_error_has_a_cause_and_a_cure() -> None:
    names = {cls.__name__ for cls in errors.classes()}
    assert names == errors.KINDS.keys()
    assert {cls.exit_code for cls in errors.classes()} == commands.exit_codes() - {0, UNFORESEEN, INTERRUPTED}
    assert f"nobody foresaw: exit code {UNFORESEEN}" in errors.page()
    assert {name for name in names if f"\n| `{name}` | " in errors.page()} == names


def rows(page: str, columns: int) -> list[list[str]]:
    """Return the cells of a page's table rows that begin with a published size and have so many columns."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| Di")]
    return [cells for cells in lines if len(cells) == columns]


def test_the_sizes_on_the_page_are_computed() -> None:
    page = (ROOT / "docs" / "sizing.md").read_text()
    recipe = reading.load(ROOT / "configs" / "imagenet256.yaml", ["models={m: {preset: DiS-S/2}}"])
    shape, offered = LatentShape(4, 32), [(mode, stage) for mode in ("none", "selective", "block") for stage in (1, 3)]
    memory, operations = rows(page, 8), rows(page, 2)
    assert len(memory) == 7
    assert [cells[0] for cells in memory] == [cells[0] for cells in operations]
    for (name, parameters, *gib), (_, exa) in zip(memory, operations, strict=True):
        priced = price_sweep(reading.parse(reading.dump(recipe), "", [f"models={{m: {{preset: {name}}}}}"]), shape)
        cost = priced.costs["m"]
        needs = [recipe.train.model_copy(update={"checkpointing": mode, "zero_stage": stage}) for mode, stage in offered]
        assert gib == [f"{worker_bytes(cost, train, 8, 16) / 2**30:.1f}" for train in needs], name
        assert parameters == f"{cost.parameters:,}"
        assert exa == f"{priced.training_flops('m') * 1e6 / 1e18:.3g}", name


def test_the_recipe_of_the_tutorial_is_what_init_writes() -> None:
    survey = Survey("/data/photos", {f"class {n}": 3000 for n in range(10)}, Counter({320: 30_000}), [], 0)
    machine = Machine(64, 2**39, gpus=4, gpu_bytes=80 * 2**30, gpu_name="NVIDIA H100 80GB HBM3")
    assert propose(survey, machine, "photos.yaml", 256) in blocks((ROOT / "docs" / "quick-start.md").read_text())


def snippets(name: str) -> list[str]:
    """Return the Python of a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.MULTILINE | re.DOTALL)


def test_the_python_of_the_pages_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = reading.load(TINY)
    model = models.build(tiny.models["dis"], LatentShape(4, 8), 10)
    save(model, tmp_path / "model.safetensors")
    vae.new(TrainedVae(kind="trained", widths=(8, 8, 8)), 32).save_pretrained(tmp_path / "vae")
    moved = {
        '"published/000000064000"': repr(str(tmp_path / "model.safetensors")), '"vae"': repr(str(tmp_path / "vae")),
        '"model.safetensors"': repr(str(tmp_path / "model.safetensors")), '"outputs"': repr(str(tmp_path)),
        '"configs/digits.yaml"': repr(str(ROOT / "configs" / "digits.yaml")),
        "20), seed=0": "20), sampling=opened.sampling_with(steps=2)",
    }  # fmt: skip
    for text in [*snippets("weights.md"), *snippets("extending.md")]:
        for old, new in moved.items():
            text = text.replace(old, new)
        names: dict[str, object] = {}
        exec(text, names)
        if "images" in names:
            assert names["images"].shape == (20, 32, 32, 3)  # type: ignore[attr-defined]
    assert capsys.readouterr().out == "False\n"
