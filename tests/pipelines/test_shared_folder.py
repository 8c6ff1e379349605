"""Nodes that are asked: which failures are asked again. The probe of a shared folder itself: tests/e2e/test_shared_folder.py."""

import pytest
from ray.exceptions import GetTimeoutError, NodeDiedError, RayTaskError

from dis_scale.process.errors import StorageAway, UserError
from pipelines import nodes
from pipelines.nodes import LostNode, Node

REFUSED = RayTaskError("_create", "Traceback ...", PermissionError("read-only file system"), pid=1, ip="192.0.2.1")


AWAY = RayTaskError("_list", "Traceback ...", StorageAway("stale file handle"), pid=1, ip="192.0.2.1")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (REFUSED, UserError, "a-node: no: read-only file system"),
        (AWAY, LostNode, "a-node: no: stale file handle; run the command again"),
        (GetTimeoutError("timed out"), LostNode, "a-node: no: timed out; run the command again"),
        (NodeDiedError("it is gone"), LostNode, "a-node: no: it is gone; run the command again"),
    ],
    ids=["read-only", "away", "hangs", "gone"],
)
def test_a_task_that_fails_is_a_mistake_and_a_node_or_storage_that_is_away_or_slow_is_asked_again(
    error: Exception, kind: type[Exception], words: str
) -> None:
    """A mistake has exit code 2, which a RayJob never repeats."""
    raised = nodes.error_on("a-node", error, "{}: no: {}".format)
    assert type(raised) is kind
    assert str(raised) == words


def test_a_node_that_dies_while_it_is_asked_is_left_out() -> None:
    """Ray still lists it for a while: the first two questions go to it."""
    a, b = (Node(name, name, {}) for name in "ab")
    listed, pauses = [[a, b], [a, b], [a]], list[float]()

    def ask(alive: list[Node]) -> list[Node]:
        if b in alive:
            raise LostNode("b")
        return alive

    assert nodes.of_living(ask, lambda: listed.pop(0), pauses.append) == [a]
    assert pauses == [nodes.ASK_AGAIN_S] * 2
    with pytest.raises(LostNode) as lost:
        nodes.of_living(ask, lambda: [a, b], pauses.append)
    assert lost.value.exit_code == StorageAway.exit_code, "KubeRay and Slurm try it again"
