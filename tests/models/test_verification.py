"""The self-test of a block in bfloat16: a right one passes, and each part of a scan that is missing or wrong is seen."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from dis_scale.models.dis.network import DiSBlock
from dis_scale.models.dis.s6 import Mixer
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dis.ssd import SsdMixer
from dis_scale.models.dis.verification import verify_block
from dis_scale.process.errors import WrongKernel
from dis_scale.scan import Direction
from dis_scale.scan.duality import Way
from dis_scale.scan.selftest import Case, largest_error

Fault = Callable[[Direction], Direction]
WRONG = "reference"
"""The backend that is made wrong; a block is compared with itself by another one."""


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


def verify(settings: Dis, wrong: nn.Module, gradients: bool, *, seen: bool) -> None:
    """Compare a block whose mixer is wrong with a right one; require that it is seen, or that it is not."""

    def make(scan: str) -> DiSBlock:
        block = DiSBlock(settings, scan, skip=False)
        block.mixer = wrong if scan == WRONG else block.mixer
        return block

    case = Case(66, gradients=gradients)
    words = rf"{WRONG} scan is wrong on cpu: .* is off by .* \(torch.bfloat16, 2 images, L66"
    with pytest.raises(WrongKernel, match=words) if seen else nullcontext():
        verify_block(make, settings.width, WRONG, torch.device("cpu"), torch.bfloat16, case)


class WrongMixer(Mixer):
    fault: Fault

    def directions(self, dynamics: Tensor, *u_of: Tensor) -> list[Direction]:
        front, back = super().directions(dynamics, *u_of)
        return [front, self.fault(back)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_direction_of_the_selective_scan_is_seen(fault: str) -> None:
    settings = Dis(kind="dis", width=96, depth=12, patch=2)
    wrong = WrongMixer(settings, WRONG)
    wrong.fault = FAULTS[fault]
    for gradients in (True, False):
        verify(settings, wrong, gradients, seen=fault != "right" and (gradients or "gradient" not in fault))


class WrongSsdMixer(SsdMixer):
    fault = ""

    def _mix(self, x_BLE: Tensor, own_BLH: Tensor, earlier: Way | None, later: Way | None) -> Tensor:
        if self.fault == "no recurrence":
            earlier = earlier and earlier._replace(B_BLN=0 * earlier.B_BLN)
        if self.fault:
            later = later and later._replace(B_BLN=0 * later.B_BLN)
        return super()._mix(x_BLE, own_BLH, earlier, later)


@pytest.mark.parametrize("fault", ["", "no recurrence", "no later tokens"])
@pytest.mark.parametrize("combine", ["sum", "hydra"])
def test_a_wrong_state_space_duality_is_seen(combine: str, fault: str) -> None:
    settings = Dis.model_validate({"kind": "dis", "width": 96, "depth": 12, "patch": 2, "mixer": "ssd", "combine": combine})
    wrong = WrongSsdMixer(settings, WRONG)
    wrong.fault = fault
    for gradients in (True, False):
        verify(settings, wrong, gradients, seen=bool(fault))


@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize("combine", ["sum", "hydra"])
def test_gradients_that_are_exactly_zero_are_compared(L: int, combine: Literal["sum", "hydra"]) -> None:
    """Of one token, nothing decays: the gradient of the time step is 0, of which no share can be taken."""
    settings = Dis(kind="dis", width=64, depth=2, patch=8, state_size=4, mixer="ssd", combine=combine)
    case = Case(L=L, images=2)
    verify_block(lambda scan: DiSBlock(settings, scan, skip=False), 64, "chunked", torch.device("cpu"), torch.float32, case)
    assert largest_error(torch.full((2,), 1e-9), torch.zeros(2)) > 1
    assert math.isnan(largest_error(torch.full((2,), math.nan), torch.zeros(2)))
