"""What the probe of a shared folder says of a node on which it failed. The probe itself: tests/e2e/test_shared_folder.py."""

import pytest
from ray.exceptions import GetTimeoutError, RayTaskError

from dis_scale.process.errors import StorageAway, UserError
from pipelines import nodes
from pipelines.nodes import LostNode, Node
from pipelines.shared_folder import failure_on

REFUSED = RayTaskError("_create", "Traceback ...", PermissionError("read-only file system"), pid=1, ip="192.0.2.1")


AWAY = RayTaskError("_list", "Traceback ...", StorageAway("stale file handle"), pid=1, ip="192.0.2.1")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (REFUSED, UserError, "/nfs cannot be used on a-node: read-only file system; or give an object store"),
        (AWAY, LostNode, "/nfs cannot be used on a-node: stale file handle"),
        (GetTimeoutError("timed out"), LostNode, "/nfs cannot be used on a-node: timed out"),
    ],
    ids=["read-only", "away", "hangs"],
)
def test_a_folder_that_refuses_is_a_mistake_and_one_that_is_away_or_slow_is_asked_again(
    error: Exception, kind: type[Exception], words: str
) -> None:
    """A mistake has exit code 2, which a RayJob never repeats."""
    raised = failure_on("/nfs", "a-node", error)
    assert type(raised) is kind
    assert words in str(raised)


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
