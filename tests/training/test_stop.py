"""How long the ranks have to save before they stop: as long as the reason for the stop allows."""

import math
import time

import torch

from dis_scale.training.profile import process_group
from dis_scale.training.stop import StopAgreement

NEEDED_S = 60.0
"""Time for a resume point of a large model."""


def test_each_reason_to_stop_has_its_own_time() -> None:
    """No request and growth have all of it, a drained node its notice, a stop request `grace_s`, also one after growth."""
    stop_by: list[float | None] = [None]
    with process_group(torch.device("cpu")):
        agreement, left = StopAgreement(lambda: stop_by[-1]), []
        for reason_s in (None, math.inf, 150.0, 30.0):
            stop_by.append(None if reason_s is None else time.monotonic() + reason_s)
            left.append(agreement.time_left(NEEDED_S))
        assert left == [True, True, True, False]
        stop_by.append(None)
        assert [agreement.stop(), agreement.stop()] == [False, False]
        stop_by.append(math.inf)
        assert [agreement.stop(), agreement.stop()] == [False, True], "agreed in one step, obeyed in the next"
