"""Workers that wait: what they say, and what is exported. tests/e2e/test_gpu_places.py has it on a real Ray."""

import contextlib

import pytest

from dis_scale.process.errors import Preempted
from pipelines.ray_private import Resources
from pipelines.waiting import Wait, words

HEAD, NODE = {"CPU": 8.0, "prepare": 1.0}, {"CPU": 8.0, "GPU": 8.0, "memory": 5e9, "node:10.0.0.1": 1.0}
REQUEST: Resources = {"CPU": 1, "GPU": 1, "prepare": 1}


def test_what_waits_says_for_what_what_the_cluster_has_and_what_to_do() -> None:
    text = words(1, REQUEST, [NODE, HEAD], {"CPU": 16.0, "GPU": 8.0, "prepare": 1.0})
    assert text.startswith(
        "waiting for capacity for 1 worker, each with 1 CPU, 1 GPU, 1 prepare; free in the cluster: 16 CPU, 8 GPU, 1 prepare; "
        "nodes: 1 with 8 CPU, 8 GPU; 1 with 8 CPU, 1 prepare; no node has all of that together"
    )
    busy = words(2, {"CPU": 1, "GPU": 1}, [NODE, NODE], {"CPU": 8.0})
    assert busy.endswith("free in the cluster: 8 CPU, 0 GPU; nodes: 2 with 8 CPU, 8 GPU")
    small = words(1, {"CPU": 1, "memory": 3.5 * 2**30}, [NODE], {"CPU": 8.0, "memory": 2.0**30})
    assert "each with 1 CPU, 3.5 GiB of memory; free in the cluster: 8 CPU, 1.0 GiB of memory; nodes" in small
    few = words(9, {"GPU": 1}, [NODE, HEAD], {}, together=9)
    assert "; the nodes hold 8 of them, so they wait until one joins: start such a node" in few


def test_workers_no_longer_count_as_waiting_after_the_wait() -> None:
    """Also if it ended in an error, or while some still waited."""
    exported: list[float] = []
    with contextlib.suppress(Preempted), Wait(lambda _, value: exported.append(value)) as wait:
        wait.poll(2, {"CPU": 1.0})
        raise Preempted("stopped")
    assert exported == [2, 0]


def test_workers_that_wait_are_exported_once_and_so_is_the_end() -> None:
    exported: list[tuple[str, float]] = []
    wait, request = Wait(lambda *gauge: exported.append(gauge)), {"GPU": 1.0}
    for count in (3, 3, 2, 0, 0):
        assert wait.poll(count, request) is None
    assert exported == [("waiting_workers", 3), ("waiting_workers", 2), ("waiting_workers", 0)]


def test_a_wait_for_something_else_is_news() -> None:
    """Otherwise the last line asks for a node that is there already."""
    wait = Wait(lambda *_: None, logged_after_s=0.0, nodes=list, free=dict)
    said = [wait.poll(1, {name: 1.0}) for name in ("precompute", "precompute", "evaluate")]
    assert [line and line.partition(";")[0].rpartition(" ")[2] for line in said] == ["precompute", None, "evaluate"]


@pytest.mark.parametrize(
    ("long_s", "expected"),
    [(0.0, ["waiting_workers", "waiting_workers", "waited_timestamp_seconds"]), (60.0, 2 * ["waiting_workers"])],
)
def test_the_end_of_a_long_wait_is_exported_as_a_time(long_s: float, expected: list[str]) -> None:
    """Nothing was saved meanwhile, and that is no reason for an alert."""
    exported: list[str] = []
    with Wait(lambda name, _: exported.append(name), long_s=long_s) as wait:
        wait.poll(2, {"CPU": 1.0})
    assert exported == expected


def test_workers_that_ask_for_nothing_wait_for_their_processes_only() -> None:
    wait = Wait(lambda *_: None, logged_after_s=0.0)
    assert [wait.poll(2, {}) for _ in range(2)] == [None, None]


@pytest.mark.parametrize(("cpus", "logged_at_s"), [(1.0, 15), (0.0, 5)])
def test_a_worker_that_the_nodes_hold_may_only_have_to_start(cpus: float, logged_at_s: int) -> None:
    clock = iter(range(1, 100))
    wait = Wait(lambda *_: None, nodes=lambda: [{"CPU": cpus}], free=dict, now_s=lambda: float(next(clock)))
    polls = 1
    while wait.poll(1, {"CPU": 1.0}) is None:
        polls += 1
    assert polls == logged_at_s
