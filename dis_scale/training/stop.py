"""The agreement of all ranks on the step at which they stop."""

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist


class StopAgreement:
    """All ranks stop at the same step. The all-reduce started in one step is read in the next, so no rank waits for it.

    It uses gloo (CPU), since reading a GPU tensor would wait for all queued kernels.
    """

    def __init__(self, stop_by: Callable[[], float | None]) -> None:
        """`stop_by` is that of `attempt.Attempt`."""
        self._stop_by, self._requested, self._work = stop_by, torch.zeros(1), None
        self._group = dist.new_group(backend="gloo")

    def time_left(self, seconds: float) -> bool:
        """Return whether every rank has `seconds` left before it must have stopped; true if no stop was requested. Collective."""
        stop_by = self._stop_by()
        left = torch.tensor([math.inf if stop_by is None else stop_by - time.monotonic() - seconds])
        dist.all_reduce(left, dist.ReduceOp.MIN, self._group)
        return left.item() > 0

    def stop(self) -> bool:
        """Return whether any rank had a stop request at the previous call. Every rank calls this once per step."""
        requested = self._stop_by() is not None
        if self._work is not None:
            self._work.wait()
        agreed = bool(self._requested.item())
        self._requested.fill_(float(requested))
        self._work = dist.all_reduce(self._requested, dist.ReduceOp.MAX, self._group, async_op=True)
        return agreed
