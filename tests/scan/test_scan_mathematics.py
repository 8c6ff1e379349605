"""Mathematical properties of a scan: closed forms, symmetries, extremes."""

import pytest
import torch
import torch.nn.functional as F

from dis_scale.scan import Direction, causal_conv_silu, selective_scan, two_way_scan

BACKENDS = ["reference", "native", "chunked"]


def random_direction(B: int, L: int, E: int, N: int) -> Direction:
    torch.manual_seed(0)
    A_EN = -torch.exp(torch.randn(E, N))
    rows = [torch.randn(B, L, X) for X in (E, E, N, N)]
    return Direction(rows[0], rows[1], A_EN, rows[2], rows[3], torch.randn(E), torch.randn(E))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_input_gives_a_geometric_series(backend: str) -> None:
    """With u = B = C = 1 and D = 0: y_t = delta (1 - g^t) / (1 - g) for each state, g = exp(delta A)."""
    L, N, delta = 200, 3, 0.25
    A = torch.tensor([-0.1, -1.0, -40.0], dtype=torch.float64)
    raw = torch.log(torch.expm1(torch.tensor(delta)))
    ones, zero = torch.ones(1, L, 1), torch.zeros(1)
    y_BLE = selective_scan(
        ones, ones * raw, A.float()[None], ones.expand(1, L, N), ones.expand(1, L, N), zero, zero, backend=backend
    )
    g, t = torch.exp(delta * A), torch.arange(1, L + 1, dtype=torch.float64)
    expected = (delta * (1 - g ** t[:, None]) / (1 - g)).sum(-1)
    assert (y_BLE[0, :, 0] / expected - 1).abs().max() <= 5e-6  # 200 steps, each rounded to 6e-8, of which about a fifth accumulate


@pytest.mark.parametrize("backend", BACKENDS)
def test_reversed_is_flip_scan_flip(backend: str) -> None:
    direction = random_direction(2, 130, 19, 16)
    u, delta, A, B, C, D, bias = direction
    flipped = selective_scan(u.flip(1), delta.flip(1), A, B.flip(1), C.flip(1), D, bias, backend=backend).flip(1)
    assert (selective_scan(*direction, reverse=True, backend=backend) - flipped).abs().max() <= 1e-6 * flipped.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_way_scan_is_the_gated_sum_of_both_directions(backend: str) -> None:
    direction, z = random_direction(2, 66, 19, 16), torch.randn(2, 66, 19)
    both = selective_scan(*direction, backend=backend) + selective_scan(*direction, reverse=True, backend=backend)
    torch.testing.assert_close(two_way_scan(direction, direction, z, backend=backend), both * F.silu(z))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
def test_the_convolution_is_pytorchs(backend: str, taps: int) -> None:
    x, weight, bias = torch.randn(2, 9, 21), torch.randn(21, taps), torch.randn(21)
    expected = F.conv1d(F.pad(x.mT, (taps - 1, 0)), weight[:, None], bias, groups=21)
    torch.testing.assert_close(causal_conv_silu(x, weight, bias, backend=backend), F.silu(expected).mT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_steps_stay_finite(backend: str) -> None:
    """Steps of 100 forget the state, steps of e^-100 change nothing. Neither gives a NaN, forward or backward."""
    direction = random_direction(1, 150, 5, 16)
    raw = torch.where(torch.arange(150)[:, None] % 2 == 0, 100.0, -100.0).expand(1, 150, 5).clone().requires_grad_()
    y = selective_scan(*direction._replace(delta_BLE=raw), backend=backend)
    y.sum().backward()
    assert y.isfinite().all()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("field", Direction._fields)
def test_a_nan_is_propagated(backend: str, field: str) -> None:
    """A diverging run must be visible: a NaN in any input reaches the output."""
    direction = random_direction(1, 70, 16, 16)
    damaged = getattr(direction, field).clone()
    damaged.view(-1)[0] = float("nan")
    y = selective_scan(*direction._replace(**{field: damaged}), backend=backend)
    assert y.isnan().any()
