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
from dis_scale.process.settings import FORMAT
from dis_scale.recipe import Model, Recipe, shipped
from dis_scale.recipe.models import model_classes
from dis_scale.recipe.train import Cooldowns

TEXT, INTEGER, FLOAT = "tag:yaml.org,2002:str", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Numbers as people write them, where PyYAML has YAML 1.1's: `1e-4` was a text, `010` eight and `1:30` ninety, which are texts
    here. Names are there once, and are texts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002  # PyYAML's
        """YAMLError for a name that is there twice, of which one would be lost, or that means yes, no or nothing."""
        names = set[str]()
        for key, _ in node.value:
            at = f"line {key.start_mark.line + 1}: {key.value!r}"
            if key.tag in (INTEGER, FLOAT):
                key.tag = TEXT
            if key.tag not in (TEXT, "tag:yaml.org,2002:merge"):
                raise yaml.YAMLError(f"{at} is no name: put it in quotes")
            if key.value in names:
                raise yaml.YAMLError(f"{at} is there twice")
            names.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    """Return a number with a point or an exponent; an integer for one such as 1e6, as counts are written."""
    number = loader.construct_yaml_float(node)
    return int(number) if "e" in node.value.lower() and number.is_integer() and abs(number) < 2**53 else number


_DIGITS = list("-+.0123456789")
_WHOLE = re.compile(r"[-+]?(0|[1-9]\d*(_\d+)*)$")
_REAL = re.compile(r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF|nan|NaN|NAN))$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in each if tag not in (INTEGER, FLOAT)]
    for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(INTEGER, _WHOLE, _DIGITS)
_Loader.add_implicit_resolver(FLOAT, _REAL, _DIGITS)
_Loader.add_constructor(INTEGER, lambda _, node: int(node.value))
_Loader.add_constructor(FLOAT, _number)


class _Dumper(yaml.SafeDumper):
    """Puts texts such as `1e5` in quotes, too, which `_Loader` would read as numbers."""


_Dumper.add_implicit_resolver(FLOAT, _REAL, _DIGITS)


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
        data = plain(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a mapping of settings, got {type(data).__name__}")
    data = json.loads(_as_json(data, where))  # what an alias (*) names is a value of its own from here on
    short = _write_out_none(data)
    for override in overrides or []:
        _set(data, override)
        short = _write_out_none(data) or short
    if short and data["evaluate"] is short:
        _choose_sampler(short, data.get("diffusion"))
    if data.get("format", FORMAT) != FORMAT:
        raise UserError(f"{where}: this version reads recipes of format {FORMAT}, got format {data['format']}")
    if data.get("isoflop") is not None and isinstance(train := data.get("train"), dict):
        train.setdefault("publish_images", [])
    if isinstance(models := data.get("models"), dict):
        models = _all_of(_written_out(models, data.get("seed", 0), where), where)
        data["models"] = models | dict(_cooldowns(models, data.get("train"), where))
    text = _as_json(data, where)
    try:
        return Recipe.model_validate_json(text, context={"stored": True} if stored else None)
    except ValidationError as error:
        given = {override.partition("=")[0] for override in overrides or []}
        lines = [f"--set {line}" if line.partition(":")[0] in given else f"{where}: {line}" for line in _lines(error, data)]
        raise UserError("\n".join(lines)) from None


def _write_out_none(data: dict[str, Any]) -> dict[str, Any] | None:
    """Write out `evaluate: none`, if it is there: samples to look at, and the held-out loss as the curve."""
    if data.get("evaluate") != "none":
        return None
    data["evaluate"] = short = {"samples": 40, "steps": 25, "extractor": {"kind": "none"}}
    return short


def _choose_sampler(evaluate: dict[str, Any], diffusion: Any) -> None:
    """Choose the sampler of `evaluate: none`, unless one is set, by the process, which an override may have set."""
    gaussian = isinstance(diffusion, dict) and diffusion.get("kind") == "gaussian"
    evaluate.setdefault("sampler", "dpm_solver" if gaussian else "heun")


def _as_json(data: Any, where: str) -> str:
    try:
        return json.dumps(data, default=str)
    except ValueError as error:
        raise UserError(f"{where}: a value contains itself, by an alias (*)") from error


def _all_of(models: Iterator[tuple[str, Any]], where: str) -> dict[str, Any]:
    """Return the models by name; UserError for one that `seeds` of another would replace."""
    every = dict[str, Any]()
    for name, model in models:
        if every.get(name, model) != model:  # a stored recipe has its seeds written out
            raise UserError(f"{where}: models.{name}: it is also a seed of another model: give one of them another name")
        every[name] = model
    return every


def _written_out(models: dict[str, Any], seed: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield each model with its preset's settings in place of the name, and one model more for each further seed."""
    for name, model in models.items():
        if not isinstance(model, dict):
            yield name, model
            continue
        own = {key: value for key, value in model.items() if key not in ("preset", "seeds")}
        try:
            written = (preset(str(model["preset"])) if "preset" in model else {}) | own
        except UserError as error:
            raise UserError(f"{where}: models.{name}.preset: {error}") from error
        yield name, written
        seeds = model.get("seeds", 1)
        if not _is_count(seeds) or ("seeds" in model and model.get("seed") is not None):
            raise UserError(f"{where}: models.{name}.seeds: got {seeds!r}, expected: a number of trainings, without seed")
        for further in range(1, seeds if isinstance(seed, int) else 1):
            yield f"{name}-seed-{further}", written | {"seed": seed + further}


def _cooldowns(models: dict[str, Any], train: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield a branch of each model for each count of `train.cooldowns`: the last `share` of its images at a falling rate."""
    if not isinstance(train, dict) or (wanted := train.pop("cooldowns", None)) is None:
        return
    try:
        cooldowns = Cooldowns.model_validate_json(json.dumps(wanted, default=str))
    except ValueError:
        raise UserError(
            f"{where}: train.cooldowns: got {wanted!r}, expected image counts and a share, such as {{images: [51200], share: 0.2}}"
        ) from None
    for name, model in models.items():
        own = model.get("train", {}) if isinstance(model, dict) else None
        batch: Any = own.get("batch_images", train.get("batch_images")) if isinstance(own, dict) else None
        for images in cooldowns.images if _is_count(batch) and not model.get("branch") else ():  # else reading it names the mistake
            branch, settings = cooldown(name, model, images, cooldowns.share, batch)
            there = models.get(branch)
            if there is None:
                yield branch, settings
            elif _begins(there) != _begins(settings):  # a stored recipe has its cooldowns written out
                raise UserError(f"{where}: train.cooldowns: {branch} is there and begins at other images: give its own share")


def _begins(model: Any) -> Any:
    """Return the images at which a branch begins; None of what is no branch, which reading it names."""
    branch = model.get("branch") if isinstance(model, dict) else None
    return branch.get("at") if isinstance(branch, dict) else None


def cooldown(name: str, model: dict[str, Any], images: int, share: float, batch_images: int) -> tuple[str, dict[str, Any]]:
    """Return name and settings of a branch that ends at `images`: their last `share`, in complete steps, at a falling rate."""
    trunk = {key: value for key, value in model.items() if key != "start"}
    begin = int(round((1 - share) * images / batch_images, 6)) * batch_images
    schedule = {"publish_images": [images], "decay": "linear", "decay_from": begin / images}
    own = (model.get("train") or {}) | schedule
    return f"{name}-at-{images}", trunk | {"branch": {"of": name, "at": begin}, "train": own}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML that `parse` reads back to an equal one."""
    return written(recipe.model_dump(mode="json"))


def plain(text: str) -> Any:
    """Return the values in YAML text; YAMLError for other text."""
    return yaml.load(text, _Loader)


def written(data: dict[str, Any]) -> str:
    """Return plain settings as YAML that `parse` reads back as they are."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120)


def with_model(recipe: Recipe, name: str, model: Model, settings: Sequence[str] = ()) -> Recipe:
    """Return the recipe with one more model and `a=value` settings of its training; UserError if the name or one is invalid."""
    data = recipe.model_dump(mode="json")
    data["models"][name] = model.model_dump(mode="json")
    own = [f"models.{name}.train.{setting}" for setting in settings]
    return parse(written(data), f"a model named {name}", own)


def _set(data: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not all(key.split(".")):
        raise UserError(f"--set {override!r}: expected a.b=value, for example --set train.workers=4")
    *parents, last = _names(data, key)
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {override!r}: {parent!r} is not a group of settings")
    try:
        data[last] = plain(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: not YAML: {' '.join(str(error).split())}") from error


def _names(data: Any, key: str) -> list[str]:
    """Return the names of a key; one that is in the data may have dots, as a variant's may."""
    names, parts = list[str](), key.split(".")
    while parts:
        inside = data if isinstance(data, dict) else {}
        count = next((count for count in range(len(parts), 1, -1) if ".".join(parts[:count]) in inside), 1)
        names.append(".".join(parts[:count]))
        data, parts = inside.get(names[-1]), parts[count:]
    return names


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
            quotes = ", in quotes" * (mistake["type"] == "string_type" and isinstance(mistake["input"], int | float))
            yield f"{key}: got {got}, expected: {mistake['msg'].removeprefix('Input should be ')}{quotes}"


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
