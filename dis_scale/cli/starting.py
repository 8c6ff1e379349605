"""Commands for new images and for a new machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dis_scale.cli.shared import AsJson, console, load_recipe, naming_misspelt, require_new, say, show, working
from dis_scale.process.errors import DisScaleError, UserError
from dis_scale.recipe.shipped import EMBEDDED

if TYPE_CHECKING:
    from dis_scale.data.survey import Survey
    from dis_scale.upkeep.doctor import Needs, Result

SHOWN = 20
"""Names of broken images that are printed; more are written to a file."""


def init(
    images: Annotated[str, typer.Argument(help="A folder of images, or of a folder of images for each class; or a URL.")],
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
    resolution: Annotated[
        int | None,
        typer.Option(
            help="Default: of 32, 64, 128, 256 and 512 the largest that most images reach; 32 without a GPU.", min=32, max=512
        ),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(help=f"Write the names of broken images to this file; default: RECIPE.broken.txt if over {SHOWN}."),
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Look at a folder of images and write a recipe that fits them and this machine."""
    from dis_scale.data import survey
    from dis_scale.planning.first_recipe import Machine, propose, require_resolution, resolution_of, why_no_distance
    from dis_scale.process.progress import Board, listing_words
    from dis_scale.recipe import reading

    require_new(out, "--out")
    try:
        images.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{images!r}: the path is not UTF-8, and a recipe is: rename the folder") from error
    if resolution:
        require_resolution(resolution)  # before all images are decoded
    if names:
        require_new(names, "--names")
        if names.absolute() == out.absolute():
            raise UserError(f"--names: {names} is the recipe's file, too: name another one")
    with naming_misspelt(images), Board(console(stderr=as_json)) as board:
        found = survey.take_survey(
            images, listing_words(board.say), lambda done, total: board.update("look", done, total, "images")
        )
        for line in [*survey.describe(found), *_broken(found, out, names)]:
            board.say(line)
    machine = Machine.here()
    text = propose(found, machine, out.name, resolution or resolution_of(found, machine))
    with out.open("x") as file:
        file.write(text)
    recipe = reading.parse(text, str(out))
    measured = [] if recipe.evaluate.extractors else [f"measures {why_no_distance(found)}"]
    show(
        {"recipe": str(out), "settings": recipe.model_dump(mode="json"), **found.to_json()},
        f"machine  {machine.words}",
        f"recipe   {out}: {', '.join(recipe.models)} at {recipe.data.resolution} pixels",
        *measured,
        f"next     dis-scale plan {out}\n         dis-scale sweep {out}",
        as_json=as_json,
    )


def doctor(
    storage: Annotated[str | None, typer.Argument(help="Storage root to try; default: the recipe's.", show_default=False)] = None,
    recipe: Annotated[Path, typer.Option(help="Try what this recipe needs: its device, extractors and autoencoder.")] = EMBEDDED,
    *,
    as_json: AsJson = False,
) -> None:
    """Try all that a sweep needs here; exit code 1 if a part is bad."""
    from dataclasses import asdict

    from dis_scale.storage.folder import open_folder
    from dis_scale.upkeep.doctor import Needs, checks, tried

    settings, findings = load_recipe(recipe), []
    needs = Needs(settings, open_folder(storage or settings.storage.root))
    for part, check in (checks() | {"ray": _ray}).items():
        with working(f"doctor: {part}"):
            findings.append(each := tried(part, check, needs))
        if not as_json:
            say(f"{each.state:<10} {each.part:<14} {each.words}")
    show([asdict(each) for each in findings], as_json=as_json)
    if bad := [each.part for each in findings if each.state == "bad"]:
        raise DisScaleError(f"{len(bad)} of {len(findings)} parts are bad: {', '.join(bad)}")


def _ray(needs: "Needs") -> "Result":
    """Start a Ray of our own, or connect to the one of RAY_ADDRESS, as a sweep does."""
    from dis_scale.upkeep.doctor import Result
    from pipelines.cluster import try_cluster

    return Result(try_cluster(needs.recipe))


def _broken(found: "Survey", out: Path, names: Path | None) -> list[str]:
    """Return the names of broken images, each with the reason; more than `SHOWN`, or if `names` is given, are in a file."""
    lines = [f"{name}: {why}" for name, why in found.broken]
    shown = [f"         {line}" for line in lines[:SHOWN]]
    if names is None and len(lines) <= SHOWN:
        return shown
    file = names or out.with_suffix(".broken.txt")
    file.write_text("".join(f"{line}\n" for line in lines))
    return [*shown, f"         all {len(lines):,} names: {file}"]
