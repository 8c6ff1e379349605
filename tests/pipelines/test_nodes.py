"""Nodes whose devices failed: counted over all models, kept in storage, excluded after two failures if the others are enough."""

from pathlib import Path
from typing import Any

import pytest

from dis_scale.recipe import Recipe
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from pipelines import nodes
from tests.support.events import events


def node(name: str, alive: bool = True) -> dict[str, Any]:
    """Return a node as Ray lists it; its id is `id-<name>`."""
    return {"NodeID": f"id-{name}", "NodeName": name, "Alive": alive}


@pytest.fixture
def sweep(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setattr(nodes.ray, "nodes", lambda: [node("a"), node("b"), node("c", alive=False)])
    return Sweep.below(open_folder(tmp_path), tiny)


def test_two_failures_exclude_a_node_for_all_models(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = list(sweep.recipe.models)[:2]
    nodes.record_failure(sweep, first, "id-a", "CUDA error: unknown error")
    nodes.record_failure(sweep, first, "id-b", "CUDA error: unknown error")
    assert nodes.excluded(sweep, lambda _: True) == []
    nodes.record_failure(sweep, second, "id-a", "a matrix product is wrong")
    assert nodes.excluded(sweep, lambda _: True) == ["id-a"]
    log = capsys.readouterr().out
    assert [(event["node"], event["failures"]) for event in events(log, "node_failure")] == [
        ("a", 1),
        ("b", 1),
        ("a", 2),
    ]
    assert [(event["model"], event["node"]) for event in events(log, "node_excluded")] == [(second, "a")]


def test_without_capacity_elsewhere_the_node_is_used_again(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    model = next(iter(sweep.recipe.models))
    for _ in range(2):
        nodes.record_failure(sweep, model, "id-a", "No CUDA GPUs are available")
        nodes.record_failure(sweep, model, "id-c", "No CUDA GPUs are available")
    given = []
    assert nodes.excluded(sweep, lambda ids: bool(given.append(set(ids)))) == []
    assert given == [{"id-a"}], "a node that is gone excludes nothing"
    (event,) = events(capsys.readouterr().out, "exclusion_ignored")
    assert event["nodes"] == ["a"]


def test_a_deleted_file_clears_a_node(sweep: Sweep) -> None:
    model = next(iter(sweep.recipe.models))
    for _ in range(2):
        nodes.record_failure(sweep, model, "id-a", "CUDA error: unknown error")
    sweep.run(model).folder.delete("failed_nodes.json")
    assert nodes.excluded(sweep, lambda _: True) == []
