"""What several commands share: their arguments, the terminal, JSON."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType

from dis_scale.process import jsonlog
from dis_scale.process.context import Context
from dis_scale.process.errors import DisScaleError, UserError, shown
from dis_scale.process.jsonlog import JsonLines
from dis_scale.process.progress import PLAIN_EVERY_S
from dis_scale.process.threads import repeating
from dis_scale.recipe import shipped

if TYPE_CHECKING:
    from dis_scale.recipe import Recipe


def _shipped(incomplete: str) -> list[str]:
    """Complete the name of a shipped recipe; the shell completes paths itself."""
    return [name for name in shipped.names() if name.startswith(incomplete)]


SweepUrl = Annotated[str, typer.Argument(help="A sweep's folder or URL, for example outputs/sweeps/digits.")]
Model = Annotated[str, typer.Argument(help="A model of the sweep.")]
At = Annotated[int | None, typer.Option(help="A published image count; default: the last.", min=0)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: a.b=value. Repeatable.")]

RecipePath = Annotated[
    Path | None,
    typer.Argument(
        help="A recipe, or the name of a shipped one (dis-scale recipe list); default: digits.",
        show_default=False,
        autocompletion=_shipped,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SourceImages = Annotated[
    int | None, typer.Option("--images", min=1, help="Images of the source, if it cannot be listed from here.")
]
CHECKPOINT = (
    "A published or exported folder, a run (its newest one), a .safetensors file, or a public .pt: a path or any fsspec URL."
)
NAME_THE_NUMBER = "to price it anyway, name the number of images: --images 1281167"
VaeOption = Annotated[str | None, typer.Option(help="Autoencoder: folder, hub id, or `none` for pixels; default: the sweep's own.")]


def driver_console(context: Context) -> Console:
    """The console of a command that runs a sweep: as `console`, or one JSON line for each of its lines."""
    if not jsonlog.wanted():
        return console()
    return Console(file=JsonLines(sys.stdout, context), width=120, force_terminal=False, markup=False)


def console(*, stderr: bool = False) -> Console:
    """The terminal, or 120 characters if the output is not one; on stderr beside an output for programs.

    FORCE_COLOR colours other outputs, too; what moves the cursor is for terminals only. Brackets are text: recipes have lists.
    """
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return Console(file=stream, markup=False)
    return Console(file=stream, width=120, force_interactive=False, markup=False)


def say(line: str) -> None:
    """Print a line, without control characters."""
    print(shown(line), flush=True)


def say_aside(line: str) -> None:
    """Print a line beside an output for programs: on standard error."""
    print(shown(line), file=sys.stderr, flush=True)


def show(document: Any, *words: RenderableType, as_json: bool) -> None:
    """Print a result: its document as JSON for programs, or its lines and tables for people."""
    if as_json:
        print(json.dumps(document, indent=1))
        return
    for each in words:
        say(each) if isinstance(each, str) else console().print(each)


def source_images(recipe: "Recipe", given: int | None) -> tuple[int | None, str]:
    """Return the number of the source's images, as given or by listing it, or None and why; progress is on stderr."""
    from dis_scale.data.sources import open_source
    from dis_scale.process.progress import listing_words

    if given:
        return given, ""
    try:
        return len(open_source(recipe.data, None, listing_words(say_aside))), ""
    except DisScaleError as error:
        if isinstance(error, UserError) and _is_there(recipe):
            raise  # a mistake in the recipe
        return None, f"{error}; {NAME_THE_NUMBER}"


def _is_there(recipe: "Recipe") -> bool:
    """Whether the source's folder or file can be seen from here."""
    from dis_scale.storage.folder import open_folder

    with suppress(DisScaleError):
        return open_folder(getattr(recipe.data.source, "url", "/")).exists("")
    return False


@contextmanager
def naming_misspelt(at: str | Path) -> Iterator[None]:
    """Turn a UserError about a path or URL that is not there into one that says so, with the first part that is not."""
    try:
        yield
    except UserError:
        require_there(str(at))
        raise


def require_there(at: str) -> None:
    """UserError if nothing is at a path or URL, with the first part that is not there."""
    from dis_scale.storage.folder import missing, open_folder

    if not (folder := open_folder(at)).exists(""):
        raise UserError(f"there is no {at}{missing(folder)}")


@contextmanager
def working(words: str, every_s: float = PLAIN_EVERY_S) -> Iterator[None]:
    """Say from time to time beside the output that this work continues: storage may be far, and a sweep large."""
    began_s = time.monotonic()

    def say_so() -> None:
        if (past_s := time.monotonic() - began_s) >= every_s:
            say_aside(f"{words}, {past_s:.0f} s so far")

    with repeating(say_so, every_s, "working"):
        yield


def load_recipe(recipe: str | Path | None, overrides: list[str] | None = None) -> "Recipe":
    """Return the recipe in a file, or the shipped one of this name, by default digits; UserError with the nearest name."""
    from dis_scale.recipe import reading

    path = recipe or shipped.EMBEDDED
    with nullcontext() if Path(path).name == str(path) and not Path(path).suffix else naming_misspelt(path):
        return reading.load(path, overrides)


def require_folder(out: Path, option: str) -> None:
    """UserError if the folder of a file to be written does not exist, or may not be written to."""
    if not out.absolute().parent.is_dir():
        raise UserError(f"{option} {out}: there is no folder {out.absolute().parent}")
    if not os.access(out.absolute().parent, os.W_OK):
        raise UserError(f"{option} {out}: {out.absolute().parent} may not be written to")


def require_file(out: Path, option: str = "--out") -> None:
    """UserError for a folder, or for a file that cannot be written: before the work is done."""
    require_folder(out, option)
    if out.is_dir():
        raise UserError(f"{option} {out}: this is a folder: give the name of a file")


def require_png(out: Path) -> None:
    """UserError unless --out is a PNG that can be written."""
    require_file(out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: a grid is a PNG: give a name that ends with .png")


def require_new(out: Path, option: str) -> None:
    """UserError if the file exists, or has no folder to be written to."""
    if str(out) == "-":
        raise UserError(f"{option} -: expected the name of a file")
    require_file(out, option)
    if out.exists():
        raise UserError(f"{option} {out}: the file exists: delete it, or give another name")
