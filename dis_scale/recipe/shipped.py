"""Recipes that come with the package: `configs/` of the repository, which a wheel has below `dis_scale`."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
FOLDER = next((folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()), _PACKAGE / "configs")
EMBEDDED = FOLDER / "digits.yaml"
"""The recipe that needs no download."""


def names() -> list[str]:
    """Return the names of the shipped recipes, sorted; those of a folder begin with its name."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def resolve(recipe: str | Path) -> Path:
    """Return the file of a shipped recipe if its name is given and no file has this name; otherwise the path itself."""
    path = Path(recipe)
    return path if path.is_file() or str(recipe) not in names() else FOLDER / f"{recipe}.yaml"


def purpose(name: str) -> str:
    """Return the first sentence of a shipped recipe's comments."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    comments = [line.removeprefix("#").strip() for line in lines if line.startswith("#") and "yaml-language" not in line]
    paragraph = " ".join(comments[: comments.index("")] if "" in comments else comments)
    return paragraph.partition(". ")[0].removesuffix(".")
