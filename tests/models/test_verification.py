"""The self-test of a block in bfloat16: a right one passes, and each part of a scan that is missing or wrong is seen."""

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from dis_scale.models.dis import s6, ssd
from dis_scale.models.dis.network import DiSBlock
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dis.verification import verify_block
from dis_scale.process.errors import WrongKernel
from dis_scale.scan import Direction, duality, two_way_scan
from dis_scale.scan.duality import Way
from dis_scale.scan.selftest import Case, largest_error

Fault = Callable[[Direction], Direction]
RIGHT_SSD = duality.ssd


def without_gradient(name: str) -> Fault:
    return lambda x: x._replace(**{name: getattr(x, name).detach() + 0 * getattr(x, name)})


FAULTS: dict[str, Fault] = {
    "right": lambda x: x,
    "no recurrence": lambda x: x._replace(B_BLN=0 * x.B_BLN),
    "A doubled": lambda x: x._replace(A_EN=2 * x.A_EN),
    "no gradient of A": without_gradient("A_EN"),
    "no gradient of the bias": without_gradient("delta_bias_E"),
    "no gradient of C": without_gradient("C_BLN"),
}


def verify(settings: Dis, gradients: bool) -> None:
    case = Case(66, gradients=gradients)
    cpu = torch.device("cpu")
    verify_block(lambda scan: DiSBlock(settings, scan, skip=False), settings.width, "reference", cpu, torch.bfloat16, case)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_direction_of_the_selective_scan_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(front: Direction, back: Direction, z_BLE: Tensor, backend: str) -> Tensor:
        back = FAULTS[fault](back) if backend == "reference" else back
        return two_way_scan(front, back, z_BLE, backend="chunked")

    monkeypatch.setattr(s6, "two_way_scan", wrong)
    settings = Dis(kind="dis", width=96, depth=12, patch=2)
    for gradients in (True, False):
        if fault == "right" or (not gradients and "gradient" in fault):
            verify(settings, gradients)
        else:
            with pytest.raises(WrongKernel, match="reference scan is wrong on cpu"):
                verify(settings, gradients)


@pytest.mark.parametrize("fault", ["right", "no recurrence", "no later tokens"])
@pytest.mark.parametrize("combine", ["sum", "hydra"])
def test_a_wrong_state_space_duality_is_seen(combine: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, own: Tensor, earlier: Way | None, later: Way | None, exclusive: bool, backend: str) -> Tensor:
        if backend == "reference" and fault == "no recurrence":
            earlier, later = (way and way._replace(B_BLN=0 * way.B_BLN) for way in (earlier, later))
        if backend == "reference" and fault == "no later tokens" and later is not None:
            later = later._replace(B_BLN=0 * later.B_BLN)
        return RIGHT_SSD(x, own, earlier, later, exclusive, "chunked")

    monkeypatch.setattr(ssd, "ssd", wrong)
    settings = Dis.model_validate({"kind": "dis", "width": 96, "depth": 12, "patch": 2, "mixer": "ssd", "combine": combine})
    for gradients in (True, False):
        if fault == "right":
            verify(settings, gradients)
        else:
            with pytest.raises(WrongKernel, match="reference scan is wrong on cpu"):
                verify(settings, gradients)


@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize("combine", ["sum", "hydra"])
def test_gradients_that_are_exactly_zero_are_compared(L: int, combine: Literal["sum", "hydra"]) -> None:
    """Of one token, nothing decays: the gradient of the time step is 0, of which no share can be taken."""
    settings = Dis(kind="dis", width=64, depth=2, patch=8, state_size=4, mixer="ssd", combine=combine)
    case = Case(L=L, images=2)
    verify_block(lambda scan: DiSBlock(settings, scan, skip=False), 64, "chunked", torch.device("cpu"), torch.float32, case)
    assert largest_error(torch.full((2,), 1e-9), torch.zeros(2)) > 1
    assert math.isnan(largest_error(torch.full((2,), math.nan), torch.zeros(2)))
