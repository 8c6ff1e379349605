"""The site of docs/: it builds without warnings, and its generated pages are complete."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dis_scale.errors import UserError
from dis_scale.recipe import reading
from docs.reference import GENERATED, commands, errors, settings
from tests.test_words import failures, require_command

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
    assert all(
        (site / name).with_suffix(".html").exists() for name in ["index.md", "runbooks/disk-full.md", *GENERATED]
    )


@needs_mkdocs
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(
        r'<(?:script|img|iframe)[^>]+src="https?:|<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="https?:'
    )
    assert [page.name for page in site.rglob("*.html") if loaded.search(page.read_text())] == []


@needs_mkdocs
def test_each_page_is_in_the_navigation(site: Path) -> None:
    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.html")} - {"404.html"}
    linked = set(re.findall(r'href="([^"#:]+\.html)"', (site / "index.html").read_text()))
    assert pages - linked == set()


def test_each_setting_is_on_the_page_with_its_default() -> None:
    page = settings.page()
    sections = {
        part: page.partition(f"{{#{part.__name__.lower()}}}\n")[2].partition("\n## ")[0] for _, part in settings.parts()
    }
    assert len(sections) > 30
    missing = [
        (part.__name__, name) for part, text in sections.items() for name in part.model_fields
        if name != "kind" and f"\n| `{name}` |" not in text
    ]  # fmt: skip
    assert missing == []
    assert "| `keep_resume` | integer >= 1 | `2` | yes |" in page
    assert "| `lanes` | integer >= 1 | required | no |" in page


def test_each_command_is_on_the_page_with_an_example() -> None:
    names = dict(commands.commands()).keys()
    assert names == commands.EXAMPLES.keys()
    assert failures(require_command, (line.split() for line in commands.EXAMPLES.values())) == []
    page = commands.page()
    assert [name for name in names if f"\n## dis-scale {name}\n" not in page] == []


def test_each_exit_code_is_explained() -> None:
    assert commands.EXIT_CODES.keys() == commands.exit_codes()


def test_each_variable_of_ours_is_explained() -> None:
    """DIS_SCALE_JOB is set by a job's driver for its own processes."""
    ours = {name for path in PRODUCT for name in re.findall(r"\"(DIS_SCALE_\w+)\"", path.read_text())}
    explained = {name for names in commands.ENVIRONMENT for name in names.split(", ")}
    assert ours - {"DIS_SCALE_JOB"} <= explained
    source = "\n".join(path.read_text() for path in PRODUCT)
    library = {"HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "AWS_ENDPOINT_URL", "CC"}
    assert [name for name in explained - library if name not in source] == []


def test_each_kind_of_error_has_a_cause_and_a_cure() -> None:
    assert {error.name for error in errors.kinds()} == errors.KINDS.keys()
    assert {error.exit_code for error in errors.kinds()} == commands.exit_codes() - {0}


def raised(path: Path) -> set[str]:
    """Return the longest constant part of each message that a module raises."""
    names = {error.name for error in errors.kinds()}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and getattr(node.exc.func, "id", "") in names:
            words = [c.value for c in ast.walk(node.exc) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
            found.add(max(words, key=len, default=""))
    return found


def test_the_messages_of_the_code_are_on_the_page() -> None:
    page = " ".join(errors.page().replace("\\|", "|").split())
    words = {text for path in PRODUCT for text in raised(path)}
    missing = [text for text in words if " ".join(text.split()) not in page]
    assert len(words) > 200
    assert missing == []


def is_of(text: str, message: str) -> bool:
    """Whether a message has the constant parts of a text, of more than a few characters, in their order."""
    at, parts = 0, [part.strip() for part in text.split("...") if part.strip()]
    for part in parts:
        at = message.find(part, at) + 1
        if not at:
            return False
    return sum(map(len, parts)) > 12


@pytest.mark.parametrize("change", ["train.lanes=3", "train.lane=2", "evaluate.samples=10", "data.num_classes=9"])
def test_an_error_that_a_user_gets_is_on_the_page(change: str) -> None:
    with pytest.raises(UserError) as caught:
        reading.load(ROOT / "configs" / "digits.yaml", [change])
    texts = [message.text for message in errors.messages() if message.kind == "UserError"]
    assert [text for text in texts if is_of(text, str(caught.value))]
