"""Workers: which of their errors a new attempt may survive, and the stacks that they return."""

import pytest
import ray

from dis_scale.errors import StorageAway, StorageError
from pipelines.worker import Worker, may_pass


@pytest.mark.parametrize(
    ("cause", "passes"),
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (StorageAway("cannot write"), True),
        (StorageError("no space left on the device"), False),
        (ValueError("gloo"), False),
    ],
    ids=str,
)
def test_a_broken_connection_restarts_as_a_lost_worker_does(cause: Exception, passes: bool) -> None:
    assert may_pass(ray.exceptions.RayTaskError("train", "trace", cause)) == passes


def test_stacks_name_the_running_function() -> None:
    assert "test_stacks_name_the_running_function" in Worker().stacks()
