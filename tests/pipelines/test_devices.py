"""The check of a worker's device: it finds a wrong product, and takes no time that an attempt would notice."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dis_scale.errors import BrokenDevice
from pipelines import devices

CPU = torch.device("cpu")


class WrongProducts(TorchFunctionMode):
    """A device that gets one element of each matrix product wrong."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.matmul or function is torch.Tensor.__matmul__:
            result[3, 4] += 1
        return result


def test_a_wrong_product_is_found() -> None:
    with WrongProducts(), pytest.raises(BrokenDevice, match="cpu: 1 of 4096 elements of a matrix product are wrong"):
        devices.check_device(CPU)


def test_a_right_one_takes_milliseconds() -> None:
    devices.check_device(CPU)
    took_s = []
    for _ in range(5):
        began_s = time.perf_counter()
        devices.check_device(CPU)
        took_s.append(time.perf_counter() - began_s)
    assert min(took_s) < 0.02
