"""The count of a forward pass: products without a rule are refused, and what is computed from uninitialised memory is no index."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale.models.counter import CountedPass
from dis_scale.process.errors import UserError
from dis_scale.scan.counts import reporting

X, W = torch.ones(2, 8, 16, 16), torch.ones(8, 16, 4, 4)


def counted(function: Callable[[], object]) -> float:
    """Return the multiply-adds of a function."""
    with torch.no_grad(), CountedPass([]) as counter:
        function()
    return sum(each.macs for each in counter.operations.values())


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda: torch.mv(X[0, 0], X[0, 0, 0]), "aten.mv"),
        (lambda: torch.fft.fft2(X), "aten._fft_c2c"),
        (lambda: F.conv_transpose2d(X, W, stride=2), "transposed aten.convolution"),
        (lambda: nn.LSTM(16, 16)(X[0]), "aten."),
        (lambda: nn.Bilinear(16, 16, 4)(X, X), "aten._trilinear"),
    ],
)
def test_products_without_a_rule_are_refused_by_name(function: Callable[[], Tensor], name: str) -> None:
    with pytest.raises(UserError, match=f"nobody counts the multiply-adds of {name}"):
        counted(function)


def test_reported_ones_are_allowed_and_keep_their_shape() -> None:
    def function() -> None:
        with reporting("upsampling", 7.0):
            assert F.conv_transpose2d(X, W, stride=2, padding=1).shape == (2, 16, 32, 32)

    assert counted(function) == 7


def test_a_complex_product_is_four_real_ones() -> None:
    x = torch.ones(3, 4, 4)
    assert counted(lambda: x.to(torch.complex64) @ x.to(torch.complex64)) == 4 * counted(lambda: x @ x)


def test_a_computed_index_is_valid() -> None:
    table = torch.ones(5, 4)
    for _ in range(20):
        counted(lambda: F.embedding(torch.arange(64) * 3 % 5, table))
        counted(lambda: table[(torch.arange(64).float() * 3).long() % 5])
