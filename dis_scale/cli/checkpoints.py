"""Commands that take public weights in, and give checkpoints to diffusers."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from dis_scale.cli.shared import (
    CHECKPOINT,
    AsJson,
    Overrides,
    RecipePath,
    VaeOption,
    load_recipe,
    require_folder,
    require_there,
    show,
    working,
)
from dis_scale.process.errors import UserError, nearest
from dis_scale.recipe.shipped import EMBEDDED

Heads = Annotated[int | None, typer.Option(help="Attention heads, for a public DiT of unusual size.", min=1)]


def export(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT)],
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must be new or empty.")],
    vae: VaeOption = None,
    heads: Heads = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a folder for diffusers, with a model card."""
    from dis_scale.weights import card

    require_folder(folder, "FOLDER")
    with working("export: reading and writing weights"):
        opened = card.export_checkpoint(checkpoint, folder, vae, heads)
    document = {"folder": str(folder), "checkpoint": str(opened.located), "notes": opened.notes}
    show(document, *opened.notes, f"exported {folder}\nnext     fill in {folder / card.CARD}: data, licence", as_json=as_json)


def import_weights(
    file: Annotated[str, typer.Argument(help="A public .pt of DiS, DiT or SiT, or a .safetensors of ours; path or URL.")],
    model: Annotated[str, typer.Option(help="The recipe's model that these weights are.")],
    images: Annotated[int, typer.Option(help="Images that the file has seen: steps x batch.", min=1)],
    recipe: RecipePath = None,
    overrides: Overrides = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Publish public weights as a model of a sweep, which evaluates and samples them."""
    from dis_scale import vae
    from dis_scale.storage.folder import open_folder
    from dis_scale.sweep import Sweep
    from dis_scale.weights import importing as public_weights

    require_there(file)
    if model not in (known := load_recipe(recipe, overrides).models):
        raise UserError(f"--model: the recipe has no {model!r}{nearest(model, known)}: it has {', '.join(known)}")
    settings = load_recipe(recipe, [*(overrides or []), seen := f"models.{model}.train.publish_images=[{images}]"])
    store = open_folder(settings.storage.root)
    storage = settings.storage.model_copy(update={"root": store.url})
    sweep = Sweep.below(store, settings.model_copy(update={"storage": storage}))
    shape = vae.planned_shape(settings.vae, settings.data.resolution)
    with working("import: reading and writing weights"):
        found = public_weights.import_weights(sweep, model, file, shape)
    stored = model in Sweep.open(sweep.folder.url).recipe.models
    given = " ".join(f"--set {quote(each)}" for each in [*(overrides or []), seen])
    again = f"dis-scale resume {sweep}" if stored else f"dis-scale sweep {recipe or EMBEDDED} {given}"
    trains = ", and trains the other models" if len(settings.models) > 1 else ""
    show(
        found._asdict() | {"folder": found.folder.url},
        *found.notes,
        f"imported {found.folder}: {found.parameters:,} weights, at {found.images_seen:,} images\n"
        f"next     {again}: evaluates it{trains}; dis-scale sample {found.folder}\n"
        f"         models.NAME.start: {{kind: sweep, url: {sweep}, model: {model}, images: {found.images_seen}}}",
        as_json=as_json,
    )
