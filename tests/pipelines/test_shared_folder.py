"""What the probe of a shared folder says of a node on which it failed. The probe itself: tests/e2e/test_shared_folder.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayTaskError

from dis_scale.process.errors import DisScaleError, UserError
from pipelines import shared_folder

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
def test_only_the_folders_own_failure_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type, words: str
) -> None:
    """A user's mistake, exit code 2, is never repeated by a RayJob; a node that ran out of memory may be."""

    def get(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "get", get)
    work = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: None))
    with pytest.raises(DisScaleError, match=words) as raised:
        shared_folder._on_each({ray.NodeID.from_random().hex(): "a-node"}, work, "/nfs/.probe-1")
    assert type(raised.value) is kind
