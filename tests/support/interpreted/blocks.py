"""A mixer whose parts are one function, the norm behind its gate, and the self-test of a device."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from dis_scale.models.dis.network import DiSBlock
from dis_scale.models.dis.orders import Orders
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dis.verification import verify_block
from dis_scale.scan.norms import by_definition, gated_rms_norm
from dis_scale.scan.selftest import Case, verify


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_the_self_test_passes(dtype: torch.dtype) -> None:
    """Products of one type, weights and dynamics in float32, and every tensor with the strides that a mixer passes."""
    verify("triton", torch.device("cpu"), dtype, Case(L=5, E=3, N=2))


@pytest.mark.parametrize("changes", [{"keeping": True}, {"directions": 1}, {"gradients": False}], ids=str)
def test_the_self_test_passes_for_other_kernels(changes: dict[str, Any]) -> None:
    """Those of a recomputed block, of one direction, and of sampling."""
    verify("triton", torch.device("cpu"), torch.float32, Case(L=5, E=3, N=1, images=1, **changes))


def verified(settings: Dis, L: int, dtype: torch.dtype, orders: Orders = Orders(), **changes: Any) -> None:
    """Compare a block by Triton with itself by PyTorch's operations."""
    device = torch.device("cpu")
    verify_block(
        lambda scan: DiSBlock(settings, scan, skip=False, orders=orders),
        settings.width,
        "triton",
        device,
        dtype,
        Case(L, **changes),
    )


@pytest.mark.parametrize("changes", [{"images": 3}, {"keeping": True}, {"gradients": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_whose_mixer_is_one_function(changes: dict[str, Any], dtype: torch.dtype, taken: list[bool]) -> None:
    """Two chunks of steps; both directions' products in one, gradients in halves of one tensor, the norm with the sum."""
    verified(Dis(kind="dis", width=12, depth=2, patch=2, state_size=3), 18, dtype, **changes)
    assert taken == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_in_an_order_of_its_own(dtype: torch.dtype) -> None:
    """Its norm reads the branch before it in one order and writes in another; more rows than a program of the backward pass has."""
    orders = Orders(*np.random.default_rng(0).permuted([range(9)] * 2, axis=1))
    verified(Dis(kind="dis", width=12, depth=2, patch=2, state_size=3), 9, dtype, orders, images=3)


def test_a_mixer_of_another_width_has_a_function_for_each_part() -> None:
    """Its halves would not be aligned."""
    verified(Dis(kind="dis", width=5, depth=2, patch=2, state_size=2), 4, torch.float32)


def test_the_norm_behind_a_gate() -> None:
    """Rows for two programs of the backward pass, of which the second is incomplete; z is a view of a product."""
    torch.manual_seed(0)
    y, product, weight = torch.randn(3, 7, 20), torch.randn(3, 7, 50), torch.randn(20)
    results = []
    for dtype, norm in ((torch.float64, by_definition), (torch.float32, partial(gated_rms_norm, backend="triton"))):
        leaves = [x.to(dtype).requires_grad_() for x in (y, product, weight)]
        out = norm(leaves[0], leaves[1][..., 10:30], leaves[2])
        results.append([out, *torch.autograd.grad(out, leaves, y.flip(0).to(dtype))])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max()
