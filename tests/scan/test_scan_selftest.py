"""The comparison of a backend with the reference at a worker's start: right backends pass, wrong ones are named."""

import pytest
import torch
from torch import Tensor

from dis_scale.errors import DisScaleError
from dis_scale.scan import Direction, _backend, chunked
from dis_scale.scan.backend import Backend, from_one_way
from dis_scale.scan.reference import causal_conv_silu, selective_scan
from dis_scale.scan.selftest import TOLERANCE, verify

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["reference", "native", "chunked"])
def test_a_right_backend_passes(backend: str, dtype: torch.dtype) -> None:
    """Products of one type, weights and dynamics in float32."""
    state = torch.get_rng_state()
    verify(backend, CPU, dtype)
    assert torch.equal(torch.get_rng_state(), state)


def wrong_gradient(direction: Direction, reverse: bool) -> Tensor:
    """Right outputs; in the reversed direction the gradient of A is doubled."""
    A = direction.A_EN
    return selective_scan(direction._replace(A_EN=A + (A - A.detach()) * reverse), reverse)


def without_the_last_channel(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """As a kernel that does not write the end of an incomplete group."""
    y = causal_conv_silu(x, weight, bias, reverse)
    return torch.cat([y[..., :-1], y[..., -1:] * 0], -1)


def not_a_number(direction: Direction, reverse: bool) -> Tensor:
    return selective_scan(direction, reverse) * float("nan")


WRONG: dict[str, tuple[Backend, str]] = {
    "gradient": (from_one_way(wrong_gradient, causal_conv_silu), r"gradient of backward A is off by 1\.0e\+00"),
    "conv": (from_one_way(selective_scan, without_the_last_channel), r"output of forward conv is off by \d"),
    "NaN": (from_one_way(not_a_number, causal_conv_silu), "output of scan is off by nan"),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_backend_is_an_error_that_names_another(
    monkeypatch: pytest.MonkeyPatch, wrong: str, dtype: torch.dtype
) -> None:
    backend, message = WRONG[wrong]
    monkeypatch.setattr(chunked, "backend", backend)
    _backend.cache_clear()
    verify.cache_clear()
    try:
        with pytest.raises(
            DisScaleError, match=f"the chunked scan is wrong on cpu: {message}.*: set the backend to reference"
        ):
            verify("chunked", CPU, dtype)
    finally:
        _backend.cache_clear()
        verify.cache_clear()
