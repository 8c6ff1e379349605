"""Registry of the families of backbones, by the `kind` of their settings. The built-in families are listed only here.

Another package adds a family by an entry point of the group `dis_scale.families`, whose name is the kind. For a trial, the kind
`file.py:FAMILY` names a variable in a file below the working folder; the file's sha256 serves as the version. A recipe from
storage never selects a file other than the one with which its sweep began.
"""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType, new_class
from typing import Any, Literal

from dis_scale.models import diffussm, dis, dit
from dis_scale.models.family import Family
from dis_scale.models.settings import FamilySettings
from dis_scale.process.errors import NoFamily, UserError, nearest

GROUP = "dis_scale.families"


@cache
def known() -> dict[str, Family]:
    """Return all families by kind, the default family first. A family from a file is included after its first use."""
    families: dict[str, Family] = {}
    packaged = (_packaged(entry) for entry in metadata.entry_points(group=GROUP))
    for family in (dis.FAMILY, diffussm.FAMILY, dit.FAMILY, *packaged):
        for other in families.values():
            if family.kind == other.kind or (shared := family.presets.keys() & other.presets.keys()):
                what = f"kind {family.kind!r}" if family.kind == other.kind else f"preset {min(shared)!r}"
                raise UserError(f"the package {family.code} brings {what}, as {other.code or 'dis-scale'} does: uninstall one")
        families[family.kind] = family
    return families


def default() -> Family:
    """Return the family that a first recipe trains."""
    return next(iter(known().values()))


def of_curve(curve: str) -> Family:
    """Return the family of a curve's name (`FamilySettings.curve`)."""
    return find(curve.partition(" + ")[0])


def find(kind: str, code: str = "") -> Family:
    """Return the family of a kind. NoFamily if it is not on this machine, or if its package version or file hash is not `code`.

    UserError with the nearest name for an unknown kind.
    """
    here = code_of(kind)
    if here is None and code:
        raise NoFamily(f"models of kind {kind} need {code}, which is not installed on this machine: pip install it")
    if here is None:
        raise UserError(f"unknown kind of model {kind!r}{nearest(kind, known())}; known: {', '.join(known())}")
    if code and code != here:
        raise NoFamily(f"models of kind {kind} need {code}, and this machine has {here}: restore the former")
    if is_file(kind) and (kind not in known() or known()[kind].code != here):
        known()[kind] = _from_file(kind, here)
    return known()[kind]


def is_file(kind: str) -> bool:
    """Return whether a kind names a file and a variable in it."""
    return ".py:" in kind


def code_of(kind: str) -> str | None:
    """Return the origin of a family: its package and version, or the hash of its file; empty for a built-in family.

    None for an unknown kind. NoFamily for a file that is unreadable or not below the working folder. Does not run the file.
    """
    if not is_file(kind):
        return known()[kind].code if kind in known() else None
    path = Path(kind.rpartition(":")[0])
    if path.is_absolute() or ".." in path.parts:
        raise NoFamily(f"models of kind {kind}: expected a path below the working folder, which jobs get a copy of")
    try:
        return _hash(path.read_bytes())
    except OSError as error:
        raise NoFamily(f"models of kind {kind}: cannot read {path} in {Path.cwd()}: {error.strerror}") from error


def presets() -> dict[str, dict[str, Any]]:
    """Return the settings of each published size, `kind` included."""
    return {name: {"kind": kind, **sizes} for kind, family in known().items() for name, sizes in family.presets.items()}


def preset(name: str) -> dict[str, Any]:
    """Return the settings of a published size; UserError with the nearest name for an unknown one."""
    sizes = presets()
    if name not in sizes:
        raise UserError(f"unknown preset {name!r}{nearest(name, sizes)}; known: {', '.join(sizes)}")
    return sizes[name]


def _packaged(entry: metadata.EntryPoint) -> Family:
    """Load the family of a package. UserError names a package whose family cannot be loaded."""
    code = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
    try:
        family = _family(entry.load(), entry.value)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the package {code} brings models of kind {entry.name}, which cannot be loaded: {reason}") from error
    if family.kind != entry.name or entry.name in (dis.FAMILY.kind, diffussm.FAMILY.kind, dit.FAMILY.kind):
        raise UserError(
            f"the package {code} brings models of kind {family.kind!r} as {entry.name!r}: expected one name, of its own"
        )
    return replace(family, code=code)


def _from_file(kind: str, code: str) -> Family:
    """Run a file and return its family, renamed to `kind`."""
    path, _, variable = kind.rpartition(":")
    try:
        family = _family(getattr(_run(path, code), variable), kind)
    except Exception as error:
        raise UserError(
            f"models of kind {kind}: cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    return replace(family, settings=_renamed(family.settings, kind), code=code)


def _run(path: str, code: str) -> ModuleType:
    name = f"dis_scale_family_{code.removeprefix('sha256:')[:16]}"
    source = Path(path).read_bytes()
    if _hash(source) != code:
        raise NoFamily(f"{path} has changed meanwhile")
    sys.modules[name] = module = ModuleType(name)
    module.__file__ = path
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def _hash(source: bytes) -> str:
    return f"sha256:{hashlib.sha256(source).hexdigest()}"


def _renamed(settings: type[FamilySettings], kind: str) -> type[FamilySettings]:
    """Return a subclass of the settings with another kind."""
    names: Mapping[str, Any] = {
        "__module__": settings.__module__, "__doc__": settings.__doc__, "__annotations__": {"kind": Literal[kind]},
    }  # fmt: skip
    renamed: Any = new_class(settings.__name__, (settings,), exec_body=lambda namespace: namespace.update(names))
    return renamed  # type: ignore[no-any-return]


def _family(value: Any, where: str) -> Family:
    if not isinstance(value, Family):
        raise TypeError(f"{where} is a {type(value).__name__}, expected a dis_scale.models.family.Family")
    return value
