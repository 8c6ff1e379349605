"""Nodes whose devices failed: counted over all models, kept in storage, excluded after two failures if the others are enough."""

from collections.abc import Collection
from pathlib import Path

import pytest

from dis_scale.process.errors import UserError
from dis_scale.recipe import Recipe
from dis_scale.sweep import state
from pipelines import metrics, nodes
from pipelines.nodes import Node
from tests.support.stage_jobs import RecordedJob, job_of

LIVING = [Node("id-a", "a", {}), Node("id-b", "b", {})]


@pytest.fixture
def job(tiny: Recipe, tmp_path: Path) -> RecordedJob:
    return job_of(tiny, tmp_path)


def test_two_failures_exclude_a_node_for_all_models(job: RecordedJob) -> None:
    """Each job keeps its own: several write at the same time."""
    for stage, model, node in (("train", "dis", "a"), ("train", "dit", "b"), ("precompute", None, "a")):
        assert nodes.excluded(job, LIVING, lambda _: True) == []
        job.context.stage, job.context.model = stage, model
        nodes.record_failure(job, node, "CUDA error: unknown error")
    assert nodes.excluded(job, LIVING, lambda _: True) == ["id-a"]
    assert {*job.sweep.all_failed_nodes.list()} == {"train-dis", "train-dit", "precompute"}
    failures = job.events_named("node_failure")
    assert [(event["node"], event["failures"]) for event in failures] == [("a", 1), ("b", 1), ("a", 2)]
    assert job.events_named("node_excluded") == [{"event": "node_excluded", "node": "a"}]


def test_without_capacity_elsewhere_the_node_is_used_again(job: RecordedJob) -> None:
    for _ in range(2):
        nodes.record_failure(job, "a", "No CUDA GPUs are available")
        nodes.record_failure(job, "c", "No CUDA GPUs are available")
    given: list[set[str]] = []

    def none_has_capacity(ids: Collection[str]) -> bool:
        given.append(set(ids))
        return False

    assert nodes.excluded(job, LIVING, none_has_capacity) == []
    assert given == [{"id-a"}], "a node that is gone excludes nothing"
    assert job.events_named("exclusion_ignored") == [{"event": "exclusion_ignored", "nodes": ["a"]}]
    assert job.reuses_excluded
    nodes.excluded(job, LIVING, lambda _: True)
    assert not job.reuses_excluded


def test_of_several_pods_on_a_machine_that_is_needed_only_the_one_that_failed_is_avoided(job: RecordedJob) -> None:
    """As the evaluators of the files for Kubernetes: one of four on one machine would end each attempt for all."""
    pods = [Node("id-1", "a", {}), Node("id-2", "a", {})]
    job.failed_ids.add("id-1")
    for _ in range(2):
        nodes.record_failure(job, "a", "uncorrectable ECC error")
    assert nodes.excluded(job, pods, lambda avoided: "id-2" not in avoided) == ["id-1"]
    assert job.reuses_excluded
    assert nodes.excluded(job, pods, lambda _: False) == []


def test_a_node_that_is_forgiven_is_used_again_and_no_other(job: RecordedJob) -> None:
    """The gauge behind the alert DisScaleNodeExcluded falls with it."""
    for job.context.stage in ("evaluate", "precompute"):
        nodes.record_failure(job, "a", "CUDA error: unknown error")
        nodes.record_failure(job, "b", "CUDA error: unknown error")
    shown: dict[str, float] = {}
    assert state.excluded_nodes(job.sweep) == ["a", "b"]
    assert state.forgive_node(job.sweep, "a") == 2
    assert nodes.excluded(job, LIVING, lambda _: True) == ["id-b"]
    metrics.show_run(job.sweep, next(iter(job.recipe.models)), shown.__setitem__)
    assert shown["failed_nodes"] == 1
    with pytest.raises(UserError, match="node 'a' has no failures of its devices: expected one of: b"):
        state.forgive_node(job.sweep, "a")
