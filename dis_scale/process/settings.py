"""Base class of all settings: frozen and strict. Each field has a role, which tells whether it may change under one name."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_serializer

from dis_scale.process.errors import UserError
from dis_scale.process.redaction import has_credentials

FORMAT: Literal[1] = 1
"""Version of each recipe, stored document and listing that this code writes and reads."""
NARROWEST_EMA, WIDEST_EMA = 0.005, 0.28
"""Relative widths that a power-function average can have; 0.289 would be the plain mean over all of training."""

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "bf16"]
InferencePrecision = Literal["fp32", "tf32", "bf16"]
"""Of products outside training: exact, rounded to TF32 (GPUs; elsewhere exact), or in bfloat16."""
Width = Annotated[float, Field(ge=NARROWEST_EMA, le=WIDEST_EMA)]
"""Relative width of a power-function average, see weights/ema.py."""
CHECKPOINTING = re.compile(r"none|block|selective|every_([2-9]|[1-9]\d+)")
"""Modes of activation checkpointing."""


class LatentShape(NamedTuple):
    """Input of the backbone: `channels` maps of `size` x `size`."""

    channels: int
    size: int


def absolute(url: str) -> str:
    """Return a URL or path without a slash at its end; a local path is made absolute, without `..`, and begins at the home folder
    for `~`. ValueError for a user without one."""
    text = url.rstrip("/") or "/"
    if text.startswith("file://") or "://" not in text:
        try:
            path = Path(text.removeprefix("file://")).expanduser().absolute()
        except RuntimeError as error:  # no home folder, or no such user
            raise ValueError(f"{text}: {error}") from error
        while ".." in path.parts:  # of a link, the folder above what it leads to
            end = path.parts.index("..") + 1
            path = Path(Path(*path.parts[:end]).resolve(), *path.parts[end:])
        return str(path)
    return text


def runtime(default: Any, **limits: Any) -> Any:
    """Declare a field that may change freely between two starts of a sweep."""
    return Field(default, json_schema_extra={"role": "runtime"}, **limits)


def pin(**limits: Any) -> Any:
    """Declare a field that may be added to a sweep, and may not change after that."""
    return Field(None, json_schema_extra={"role": "pin"}, **limits)


def extent(**limits: Any) -> Any:
    """Declare a field that may grow between two starts of a sweep."""
    return Field(json_schema_extra={"role": "extent"}, **limits)


def require_no_credentials(url: str, what: str) -> None:
    """UserError for a URL that a command would store or print with its credentials."""
    if has_credentials(url):
        raise UserError(f"{what}: a URL with credentials: download the file, or set them in the environment and leave them out")


class Settings(BaseModel):
    """Frozen, strict, no unknown keys. A field without a role belongs to the sweep's identity and may not change."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _no_credentials(cls, value: Any) -> Any:
        """A recipe is stored, printed and copied to MLflow."""
        if isinstance(value, str) and has_credentials(value):
            raise ValueError(
                "a URL with credentials, and a recipe is stored and printed: leave them out, and set them in the environment: "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, PGPASSWORD, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or what the store's client reads"
            )
        return value


class Changes(Settings):
    """Settings that are as elsewhere unless they are given: each is None by default."""

    @property
    def changes(self) -> dict[str, Any]:
        """What is given."""
        return {name: value for name, value in self if value is not None}

    @field_validator("*")
    @classmethod
    def _is_given(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and not info.context:  # which stored recipes have
            raise ValueError("null is no value here, and would be as if it was left out: leave it out, or name another value")
        return value

    @model_serializer
    def _without_what_is_left_out(self) -> dict[str, Any]:
        return self.changes
