"""Hook of the site's build (mkdocs.yml): adds the pages outside docs/, and turns the links between them."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[2]
if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://)([^)#]*)(#[^)]*)?\)")
"""A Markdown link to a file of the repository: `!` of a picture, text, path, section."""


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages outside docs/: README, runbooks, results of benchmarks and others."""
    from mkdocs.structure.files import File

    for path in outside():
        files.append(File.generated(config, site_path(path), content=path.read_text()))
    return files


def on_page_markdown(markdown: str, page: "Page", **_: Any) -> str:
    """Turn links to pages outside docs/ into links within the site, and links to other files into their paths."""
    return LINK.sub(lambda link: _turned(link, page.file.src_uri), markdown)


def outside() -> list[Path]:
    """Return the pages of the site that are outside docs/."""
    root = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
    folders = ("ops/runbooks", "benchmarks/results")
    return [*root, *(path for folder in folders for path in sorted((ROOT / folder).glob("*.md")))]


def site_path(path: Path) -> str:
    """Return the path of a page outside docs/ in the site."""
    name = "index.md" if path.name == "README.md" else path.name.lower()
    return name if path.parent == ROOT else f"{path.parent.name}/{name}"


def _turned(link: re.Match[str], page: str) -> str:
    sources = {site_path(path): path for path in outside()}
    folder = sources[page].parent if page in sources else (ROOT / "docs" / page).parent
    picture, text, path, section = link[1], link[2], link[3], link[4] or ""
    if not path:
        return link[0]
    target = (folder / path).resolve()
    if target in (each.resolve() for each in outside()):
        target_page = site_path(target)
    elif target.is_relative_to(ROOT / "docs"):
        target_page = str(target.relative_to(ROOT / "docs"))
    else:
        name = target.relative_to(ROOT).as_posix()
        return f"`{name}`" if name.endswith(text) else f"{text} (`{name}`)"
    up = "../" * page.count("/")
    return f"{picture}[{text}]({up}{target_page}{section})"
