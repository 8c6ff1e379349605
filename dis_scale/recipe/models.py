"""Settings of a model: its family's (dis_scale/models/), and the training settings that it may have of its own."""

import json
from functools import cache
from types import new_class
from typing import Annotated, Any, Literal, Union, cast

from pydantic import Field, GetJsonSchemaHandler, SerializeAsAny, TypeAdapter, ValidationInfo, WrapValidator

from dis_scale.models import families
from dis_scale.models.family import Family
from dis_scale.models.settings import FamilySettings
from dis_scale.process.errors import NoFamily
from dis_scale.process.settings import Changes, Count, Fraction, Precision, Settings, runtime
from dis_scale.recipe.train import ImageCounts


class ModelTrain(Changes):
    """Training settings of one model; what is left out is as in the recipe's `train`."""

    publish_images: Annotated[ImageCounts, Field(min_length=1)] | None = Field(None, json_schema_extra={"role": "extent"})
    batch_images: Count | None = None
    """A multiple of the recipe's lanes."""
    learning_rate: float | None = Field(None, gt=0)
    base_width: Count | None = None
    weight_decay: float | None = Field(None, ge=0)
    warmup_images: int | None = Field(None, ge=0)
    decay: Literal["none", "linear", "cosine"] | None = None
    decay_from: Fraction | None = None
    clip: float | None = Field(None, ge=0)
    ema: Fraction | None = None
    precision: Precision | None = None


class Branch(Settings):
    """Where a model's training leaves that of another model of the same sizes, to go on with settings of its own."""

    of: str
    """Name of the other model, the trunk."""
    at: Count
    """Images seen, of which the trunk keeps a resume point."""
    budget: float | None = None
    """Compute budget of a study (`isoflop`) that the branch ends at; written out by it."""


class FileStart(Settings):
    """Weights from a file: a public `.pt` of DiT, SiT or DiS, or a `.safetensors` of ours."""

    kind: Literal["file"]
    path: str = runtime(...)
    """Path or URL of the file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the file, checked when it is read."""

    @property
    def words(self) -> str:
        return self.path


class SweepStart(Settings):
    """Averaged weights that a model of another sweep has published."""

    kind: Literal["sweep"]
    url: str
    """Folder of the sweep, below any storage root."""
    model: str
    """Name of the model there."""
    images: int = Field(ge=0)
    """Published image count."""

    @property
    def words(self) -> str:
        return f"{self.model} at {self.images:,} images of {self.url}"


class Model(FamilySettings):
    """What each model of a recipe has. `model_class` adds the settings of its family."""

    train: ModelTrain = ModelTrain()
    """Training settings of this model, where they differ from the recipe's."""
    seed: int | None = Field(None, ge=0)
    """Seed of the initial weights and of all that training draws, the order of images included; default: the recipe's.
    `seeds: 3` is short for three models: this one, and `<name>-seed-1` and `<name>-seed-2` with the next seeds."""
    branch: Branch | None = None
    """The training begins at another model's resume point instead of at random weights."""
    start: Annotated[FileStart | SweepStart, Field(discriminator="kind")] | None = None
    """The training begins at 0 images with these weights, and with new moments, instead of at random weights."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by kind: no module has a composed class."""
        return _empty, (self.kind, self.needed_code), self.__getstate__()


class BroughtModel(Model):
    """A model of a family that another package or a file brings."""

    code: str = ""
    """Package and version, or hash of the file, that the family is from. Added when the recipe is read."""


def _empty(kind: str, code: str) -> Model:
    cls = model_class(families.find(kind, code))
    return cls.__new__(cls)


@cache
def model_class(family: Family) -> type[Model]:
    """Return the settings of a model of this family: the family's own, and those of its training."""
    own, base = family.settings, BroughtModel if family.code else Model
    names = {"__module__": __name__, "__doc__": own.__doc__, "beside": own.beside | Model.model_fields.keys()}
    composed: Any = new_class(own.__name__, (own, base), exec_body=lambda namespace: namespace.update(names))
    return cast(type[Model], composed)


def model_classes() -> list[type[Model]]:
    """Return the settings of a model of each known family."""
    return [model_class(family) for family in families.known().values()]


def _validated(value: Any, _: Any, info: ValidationInfo) -> Any:
    """Validate a model as one of the family that its `kind` names."""
    if isinstance(value, Model):
        return value
    if isinstance(value, dict) and isinstance(kind := value.get("kind"), str):
        value = value | _code(kind, value.get("code"), stored=bool(info.context))
    adapter = _any_of(*model_classes())
    return adapter.validate_json(json.dumps(value)) if info.mode == "json" else adapter.validate_python(value)


class _InSchema:
    """The JSON schema of a model: that of any known family."""

    def __get_pydantic_json_schema__(self, _: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(_any_of(*model_classes()).core_schema)


def _code(kind: str, code: Any, *, stored: bool) -> dict[str, str]:
    """Return the code that a model's family is from, unless it is built-in. NoFamily if it is not here.

    A recipe may name another version of a package, which is compared with this one; of a file it selects that content alone.
    """
    if families.is_file(kind):
        if stored and not code:
            raise NoFamily(f"models of kind {kind}: a stored recipe names a file without its hash: dis-scale wrote none")
        return {"code": families.find(kind, code or "").code}
    here = families.code_of(kind)
    if here is None and code:
        families.find(kind, code)
    return {"code": code or here} if here else {}


def from_sizes(sizes: dict[str, Any]) -> FamilySettings:
    """Return the settings with these sizes, from a file that was exported."""
    family = families.find(sizes["kind"], _code(sizes["kind"], sizes.get("code"), stored=True).get("code", ""))
    cls = model_class(family) if family.code else family.settings
    return cls.model_validate_json(json.dumps(sizes))


@cache
def _any_of(*classes: type[Model]) -> TypeAdapter[Any]:
    union: Any = Annotated[Union[classes], Field(discriminator="kind")]  # noqa: UP007
    return TypeAdapter(union)


AnyModel = Annotated[SerializeAsAny[Model], WrapValidator(_validated), _InSchema()]
