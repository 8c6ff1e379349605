"""The storage root of a sweep that runs on a cluster."""

from pathlib import Path

import pytest

from dis_scale.errors import UserError
from dis_scale.recipe import reading
from pipelines import cluster
from tests.conftest import TINY


def root(monkeypatch: pytest.MonkeyPatch, given: str, in_job: bool, one_node: bool = True) -> str:
    monkeypatch.setattr(cluster, "in_ray_job", lambda: in_job)
    if in_job or not one_node:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "_one_node", lambda: one_node)
    return cluster.require_root(reading.load(TINY, [f"storage.root={given}"]))


@pytest.mark.parametrize("in_job", [True, False])
def test_a_root_of_one_node_is_refused_on_several(monkeypatch: pytest.MonkeyPatch, in_job: bool) -> None:
    with pytest.raises(
        UserError, match=r"storage.root: 'outputs' is a folder of one node, and this cluster has several: .*s3://"
    ):
        root(monkeypatch, "outputs", in_job=in_job, one_node=False)


def test_in_a_job_on_one_node_a_relative_root_is_below_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    assert root(monkeypatch, "outputs", in_job=True) == str(Path.home() / "dis-scale/outputs")


@pytest.mark.parametrize(
    ("given", "in_job"), [("outputs", False), ("s3://bucket/prefix", True), ("/shared/disk", True)]
)
def test_any_other_root_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch, given: str, in_job: bool) -> None:
    assert root(monkeypatch, given, in_job) == given
