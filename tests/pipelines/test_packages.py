"""A node that lacks a family's package or file is named before anything is spent."""

import shutil
from pathlib import Path

import pytest
import ray

from dis_scale.process.errors import NoFamily
from dis_scale.recipe import Recipe, reading
from pipelines import packages
from tests.conftest import TINY
from tests.support.clusters import RayNodes, wait_for_nodes
from tests.support.wheels import GATED_CONV


def test_a_recipe_of_built_in_families_asks_no_node(tiny: Recipe) -> None:
    assert packages.brought(tiny) == {}
    packages.require_on_nodes(tiny)


def test_each_node_is_asked_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(GATED_CONV.parents[2]))
    file = tmp_path / "gated_conv.py"
    shutil.copy(GATED_CONV / file.name, file)
    recipe = reading.load(TINY, ["models.own={kind: 'gated_conv.py:FAMILY', width: 16, depth: 1, patch: 4}"])
    (kind,) = packages.brought(recipe)
    nodes = RayNodes(1, folder=tmp_path)
    try:
        wait_for_nodes(nodes, 2, nodes.node(1))
        ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
        packages.require_on_nodes(recipe)
        file.unlink()
        with pytest.raises(NoFamily, match=rf"^node \S+.*: models of kind {kind}: cannot read gated_conv\.py in"):
            packages.require_on_nodes(recipe)
    finally:
        ray.shutdown()
        nodes.stop()
