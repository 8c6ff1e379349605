"""What the probe of a shared folder says of a node on which it failed. The probe itself: tests/e2e/test_shared_folder.py."""

import pytest
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayTaskError

from dis_scale.process.errors import DisScaleError, UserError
from pipelines.shared_folder import failure_on

REFUSED = RayTaskError("_create", "Traceback ...", PermissionError("read-only file system"), pid=1, ip="192.0.2.1")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (REFUSED, UserError, "/nfs cannot be used on a-node: read-only file system"),
        (GetTimeoutError("timed out"), UserError, "/nfs cannot be used on a-node: timed out"),
        (OutOfMemoryError("killed"), DisScaleError, "not tried on a-node, run the command again: killed"),
    ],
    ids=["read-only", "hangs", "no memory for the probe"],
)
def test_only_the_folders_own_failure_is_a_mistake(error: Exception, kind: type, words: str) -> None:
    """A user's mistake, exit code 2, is never repeated by a RayJob; a node that ran out of memory may be."""
    failure = failure_on("/nfs", "a-node", error)
    assert type(failure) is kind
    assert words in str(failure)
