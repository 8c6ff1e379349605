"""Recipes as YAML: read with `--set a.b=value` overrides, write, and one clear line for each mistake."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dis_scale.models.families import preset
from dis_scale.process.errors import UserError, nearest
from dis_scale.recipe import FORMAT, Model, Recipe, shipped
from dis_scale.recipe.models import model_classes


class _Loader(yaml.SafeLoader):
    """PyYAML reads `1e-4` as a string (YAML 1.1); this one reads it as a number (YAML 1.2)."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Return the recipe at `path`, or the shipped one of this name, with `a.b=value` overrides.

    UserError names file, key, got and expected.
    """
    path = shipped.resolve(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        known = f"{nearest(str(path), shipped.names())}; names of shipped recipes: dis-scale recipe list"
        hint = "" if path.suffix else known
        raise UserError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}{hint}") from error
    return parse(text, str(path), overrides)


def parse(text: str, where: str, overrides: list[str] | None = None, *, stored: bool = False) -> Recipe:
    """Return the recipe in YAML text that came from `where`; errors as in `load`.

    A `stored` recipe runs no other file than the one that its sweep began with (models/families.py).
    """
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a mapping of settings, got {type(data).__name__}")
    for override in overrides or []:
        _set(data, override)
    if data.get("format", FORMAT) != FORMAT:
        raise UserError(f"{where}: this version reads recipes of format {FORMAT}, got format {data['format']}")
    if data.get("isoflop") is not None and isinstance(train := data.get("train"), dict):
        train.setdefault("publish_images", [])
    if isinstance(models := data.get("models"), dict):
        models = dict(_written_out(models, data.get("seed", 0), where))
        data["models"] = models | dict(_cooldowns(models, data.get("train"), where))
    try:
        return Recipe.model_validate_json(json.dumps(data, default=str), context={"stored": True} if stored else None)
    except ValidationError as error:
        given = {override.partition("=")[0] for override in overrides or []}
        lines = [f"--set {line}" if line.partition(":")[0] in given else f"{where}: {line}" for line in _lines(error, data)]
        raise UserError("\n".join(lines)) from None


def _written_out(models: dict[str, Any], seed: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield each model with its preset's settings in place of the name, and one model more for each further seed."""
    for name, model in models.items():
        if not isinstance(model, dict):
            yield name, model
            continue
        own = {key: value for key, value in model.items() if key not in ("preset", "seeds")}
        written = (preset(str(model["preset"])) if "preset" in model else {}) | own
        yield name, written
        seeds = model.get("seeds", 1)
        if not isinstance(seeds, int) or seeds < 1 or ("seeds" in model and model.get("seed") is not None):
            raise UserError(f"{where}: models.{name}.seeds: got {seeds!r}, expected: a number of trainings, without seed")
        for further in range(1, seeds):
            yield f"{name}-seed-{further}", written | {"seed": seed + further}


def _cooldowns(models: dict[str, Any], train: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield a branch of each model for each count of `train.cooldowns`: the last `share` of its images at a falling rate."""
    if not isinstance(train, dict) or (wanted := train.pop("cooldowns", None)) is None:
        return
    try:
        counts, share, batch = (list(map(int, wanted["images"])), float(wanted.get("share", 0.2)), int(train["batch_images"]))
    except (TypeError, ValueError, KeyError, AttributeError):
        raise UserError(
            f"{where}: train.cooldowns: got {wanted!r}, expected image counts and a share, such as {{images: [51200], share: 0.2}}"
        ) from None
    for name, model in models.items():
        for images in counts:
            if isinstance(model, dict) and not model.get("branch") and f"{name}-at-{images}" not in models:
                own_batch = (model.get("train") or {}).get("batch_images") or batch
                yield cooldown(name, model, images, share, own_batch)


def cooldown(name: str, model: dict[str, Any], images: int, share: float, batch_images: int) -> tuple[str, dict[str, Any]]:
    """Return name and settings of a branch that ends at `images`: their last `share`, in complete steps, at a falling rate."""
    trunk = {key: value for key, value in model.items() if key != "start"}
    begin = int((1 - share) * images) // batch_images * batch_images
    schedule = {"publish_images": [images], "decay": "linear", "decay_from": begin / images}
    own = (model.get("train") or {}) | schedule
    return f"{name}-at-{images}", trunk | {"branch": {"of": name, "at": begin}, "train": own}


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML that `parse` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def with_model(recipe: Recipe, name: str, model: Model, settings: Sequence[str] = ()) -> Recipe:
    """Return the recipe with one more model and `a=value` settings of its training; UserError if the name or one is invalid."""
    data = recipe.model_dump(mode="json")
    data["models"][name] = model.model_dump(mode="json")
    own = [f"models.{name}.train.{setting}" for setting in settings]
    return parse(yaml.safe_dump(data, sort_keys=False), f"a model named {name}", own)


def _set(data: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not all(key.split(".")):
        raise UserError(f"--set {override!r}: expected a.b=value, for example --set train.workers=4")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {override!r}: {parent!r} is not a group of settings")
    try:
        data[last] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: not YAML: {' '.join(str(error).split())}") from error


def _lines(error: ValidationError, data: Any) -> Iterator[str]:
    """One line for each mistake: where, got, expected."""
    for mistake in error.errors():
        path, missing = [str(part) for part in mistake["loc"]], mistake["type"] == "missing"
        key = ".".join([*_as_written(path[:-1] if missing else path, data), *path[-1:] * missing])
        got = repr(mistake["input"])[:60]
        if mistake["type"] == "extra_forbidden":
            yield f"{key}: unknown key{nearest(path[-1], _keys_beside(path))}"
        elif missing:
            yield f"{key}: missing, and there is no default"
        elif mistake["type"] == "union_tag_not_found":
            yield f"{key}: has no kind{nearest(path[-1], _names_beside(path, data))}"
        elif mistake["type"] == "union_tag_invalid":
            tag, known = mistake["ctx"]["tag"], re.findall(r"'([^']+)'", mistake["ctx"]["expected_tags"])
            yield f"{key}.kind: got {tag!r}, expected one of {', '.join(known)}{nearest(tag, known)}"
        elif mistake["type"] == "value_error":
            yield f"{key}: {mistake['ctx']['error']}" if key else str(mistake["ctx"]["error"])
        else:
            yield f"{key}: got {got}, expected: {mistake['msg'].removeprefix('Input should be ')}"


def _as_written(path: list[str], data: Any) -> Iterator[str]:
    """The part of the path that is in the data: pydantic's union tags are not (`models.a.dis.width` for `models.a.width`)."""
    for part in path:
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif isinstance(data, list) and part.isdigit() and int(part) < len(data):
            data = data[int(part)]
        else:
            continue
        yield part


def _names_beside(path: list[str], data: Any) -> set[str]:
    """Names in the recipe next to a new one: models and variants are named by their users."""
    for part in path[:-1]:
        data = data.get(part) if isinstance(data, dict) else None
    return set(data or ()) - {path[-1]}


def _keys_beside(path: list[str]) -> set[str]:
    """Known keys next to an unknown one, by field names and union tags from the recipe down."""
    known: set[type[BaseModel]] = {Recipe}
    for part in path[:-1]:
        inner = {c for cls in known if part in cls.model_fields for c in _classes(cls.model_fields[part].annotation)}
        tagged = {c for c in known if "kind" in c.model_fields and part in repr(c.model_fields["kind"].annotation)}
        known = inner or tagged or known
    return {name for cls in known for name in cls.model_fields}


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if annotation is Model:
        yield from model_classes()
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _classes(inner)
