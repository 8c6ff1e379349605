"""The agreement of all ranks on the step at which they stop."""

import time

import torch
import torch.distributed as dist


class StopAgreement:
    """All ranks stop at the same step. The all-reduce started in one step is read in the next, so no rank waits for it.

    On gloo (CPU): reading a GPU tensor would wait for all queued kernels.
    """

    def __init__(self) -> None:
        self._requested, self._work, self._group = torch.zeros(1), None, dist.new_group(backend="gloo")
        self._requested_s = float("inf")

    def time_left(self, seconds: float, grace_s: float) -> bool:
        """Whether every rank has `seconds` of its grace period left; always true if no stop was requested. Collective."""
        left = torch.tensor([self._requested_s + grace_s - time.monotonic() - seconds])
        dist.all_reduce(left, dist.ReduceOp.MIN, self._group)
        return left.item() > 0

    def stop(self, requested: bool) -> bool:
        """Whether any rank had a stop request one call ago; called once per step on every rank."""
        if requested:
            self._requested_s = min(self._requested_s, time.monotonic())
        if self._work is not None:
            self._work.wait()
        agreed = bool(self._requested.item())
        self._requested.fill_(float(requested))
        self._work = dist.all_reduce(self._requested, dist.ReduceOp.MAX, self._group, async_op=True)
        return agreed
