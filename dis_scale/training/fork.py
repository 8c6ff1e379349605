"""A new run that starts from another's resume point: rolling back is a fork.

The sweep's stored recipe gains the model under the new name; the run it came from stays as it is.
"""

from typing import Any

from dis_scale.errors import UserError, nearest
from dis_scale.recipe import Recipe, reading
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder
from dis_scale.training import checkpoint
from dis_scale.training.checkpoint import Stored, images_name

ORIGIN = "origin.json"
"""In a forked run's folder: which run, images and attempt it came from."""
ATTEMPT = 0
"""In the name of a copied resume point: no attempt of the new run wrote it."""


def fork(sweep: Folder, model: str, images: int, new: str) -> Folder:
    """Starts the run `new` of a sweep where `model` had seen so many images; returns its folder.

    Published weights up to there are copied, too. Given again it does what is left; UserError where it cannot be done.
    """
    recipe = reading.parse(sweep.read(reading.FILE).decode(), f"{sweep}/{reading.FILE}")
    origin = {"model": model, "images": images}
    _require_known(recipe, model)
    _require_new(sweep, recipe, origin, new)
    run, made = sweep / "runs" / model, sweep / "runs" / new
    stored = _resume_point(run, model, images)
    stored.verify()
    with_new = reading.with_model(recipe, new, recipe.models[model])
    made.write_json(ORIGIN, {"format": manifest.FORMAT, **origin, "resume_point": stored.folder.name})
    for count in [n for n in checkpoint.published(run) if n <= images]:
        _copy(run / "published" / images_name(count), made / "published" / images_name(count), new)
    _copy(stored.folder, made / "resume" / f"{images_name(images)}-{ATTEMPT:04d}", new)
    sweep.write(reading.FILE, reading.dump(with_new).encode())
    return made


def _require_known(recipe: Recipe, model: str) -> None:
    if model not in recipe.models:
        raise UserError(
            f"no model {model!r} in this sweep{nearest(model, recipe.models)}: it has {', '.join(recipe.models)}"
        )


def _require_new(sweep: Folder, recipe: Recipe, origin: dict[str, Any], new: str) -> None:
    """The name is free, or was begun by the same fork before."""
    made = sweep / "runs" / new
    if made.exists(ORIGIN) and origin.items() <= made.read_json(ORIGIN).items() and not (made / "lease").list():
        return
    if new in recipe.models or made.list():
        raise UserError(f"--as {new}: this sweep has a run of that name: give another")


def _resume_point(run: Folder, model: str, images: int) -> Stored:
    """The newest attempt's whole resume point at this image count; UserError names the counts that there are."""
    whole = list(checkpoint.whole_points(run, (run / "resume").list()))
    names = [name for name in whole if int(name.split("-")[0]) == images]
    found = manifest.find(run / "resume" / names[-1]) if names else None
    if found is None:
        counts = ", ".join(str(n) for n in sorted({int(name.split("-")[0]) for name in whole})) or "none"
        raise UserError(
            f"--at {images}: {model} has no resume point there; it has {counts} (train.keep_resume says how many stay)"
        )
    return Stored(run / "resume" / names[-1], found)


def _copy(source: Folder, target: Folder, model: str) -> None:
    """Copies a thing with its manifest, which comes last and names the new run's model."""
    facts = manifest.require(source)
    for name in facts["files"]:
        target.write(name, manifest.read(source, name, facts))
    target.write_json(manifest.NAME, facts | {"model": model})
