"""Packages and files of the families that are not built-in. The sweep checks that each node has them before it spends anything."""

from collections.abc import Mapping

import ray

from dis_scale.models import families
from dis_scale.process.errors import NoFamily, UserError
from dis_scale.recipe import Recipe
from pipelines import nodes


def brought(recipe: Recipe) -> dict[str, str]:
    """Return the package and version, or the hash of the file, of each kind of model that is not built-in."""
    return {model.kind: model.needed_code for model in recipe.models.values() if model.needed_code}


def require_on_nodes(recipe: Recipe) -> None:
    """Raise NoFamily if nodes of this process's cluster lack a package or a file."""
    if not (codes := brought(recipe)):
        return

    def lacking(alive: list[nodes.Node]) -> list[tuple[str, str]]:
        reasons = nodes.on_each(alive, _missing, codes, words=lambda name, why: f"node {name}: its packages are not checked: {why}")
        return [(node.name, reason) for node, reason in zip(alive, reasons, strict=True) if reason]

    if missing := nodes.of_living(lacking):
        name, reason = missing[0]
        others = f" (and {len(missing) - 1} other nodes)" if len(missing) > 1 else ""
        raise NoFamily(f"node {name}{others}: {reason}")


def require(codes: Mapping[str, str]) -> None:
    """Raise NoFamily if this machine cannot make models of these kinds."""
    for kind, code in codes.items():
        families.find(kind, code)


@ray.remote(num_cpus=0)
def _missing(codes: dict[str, str]) -> str:
    """Return why this node cannot make models of these kinds; empty if it can."""
    try:
        require(codes)
    except UserError as error:
        return str(error)
    return ""
