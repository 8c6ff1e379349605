"""S4D compared with published values, its own recurrence, and the definition of its initialisations, in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from dis_scale.models.diffussm.s4d import S4D, convolve, initial_modes
from dis_scale.models.diffussm.settings import DiffuSsm
from tests.support.allocated import Allocated

TAPS = [
    [0.0300017582, 0.0299981509, 0.0299838687, 0.0299589352, 0.0299233845],
    [-0.0687291434, -0.0646750726, -0.0585321375, -0.0505706167, -0.0410919670],
]


def settings(**options: Any) -> DiffuSsm:
    return DiffuSsm(kind="diffussm", **{"width": 2, "depth": 1, "state_size": 4} | options)


@pytest.fixture
def published() -> S4D:
    """H = 2, dt = [0.01, 0.05], A_n = -1/2 + i pi n, B = 1."""
    layer = S4D(2, settings()).double()
    with torch.no_grad():
        layer.log_dt.copy_(torch.tensor([0.01, 0.05], dtype=torch.float64).log())
        layer.log_neg_re.fill_(math.log(0.5))
        layer.im.copy_(math.pi * torch.arange(2, dtype=torch.float64))
        layer.C.copy_(torch.tensor([[[1, 0], [0.5, -0.25]], [[0.3, 0.7], [-1, 0]]], dtype=torch.float64))
        layer.B.copy_(torch.tensor([1.0, 0.0]))
    return layer


def test_published_kernel_values(published: S4D) -> None:
    assert np.abs(published.kernel(5).detach().numpy() - np.array(TAPS)).max() < 1e-9


@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
@pytest.mark.parametrize("length", [1, 2, 63, 128])
def test_convolution_equals_recurrence_in_both_directions(init: str, length: int) -> None:
    torch.manual_seed(0)
    layer = S4D(5, settings(init=init, state_size=16)).double()
    u_BLH = torch.randn(3, length, 5, dtype=torch.float64)
    spectrum, skip = layer(length)
    spectrum, skip = spectrum.detach(), skip.detach()
    forward = layer.recurrence(u_BLH).detach()
    assert float((convolve(u_BLH, spectrum, skip) - forward).abs().max()) < 1e-9
    backward = layer.recurrence(u_BLH.flip(1)).flip(1).detach()
    assert float((convolve(u_BLH, spectrum.conj(), skip) - backward).abs().max()) < 1e-9


def test_backward_is_inclusive(published: S4D) -> None:
    """The last output of the backward direction depends on its own input, through tap 0."""
    u_BLH = torch.zeros(1, 6, 2, dtype=torch.float64)
    u_BLH[:, -1] = 1
    spectrum, skip = published(6)
    y_BLH = convolve(u_BLH, spectrum.conj(), skip)
    assert torch.allclose(y_BLH[0, -1], published.kernel(6)[:, 0] + published.D)
    assert torch.allclose(y_BLH[0].flip(0) - (u_BLH * published.D)[0].flip(0), published.kernel(6).T)


def test_chunked_kernel_and_its_gradients_are_the_same(published: S4D) -> None:
    gradients = []
    for published.chunk in (2**24, 1):
        published.zero_grad()
        kernel = published.kernel(40)
        kernel.square().sum().backward()
        gradients.append([kernel.detach(), *(p.grad for p in published.parameters() if p.grad is not None)])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*gradients, strict=True))


def test_a_kernel_in_chunks_takes_the_memory_of_few() -> None:
    """All modes of 128 channels and 4,096 taps are 128 MB, each of the 32 chunks 4 MB."""
    model = S4D(128, DiffuSsm(kind="diffussm", width=128, depth=1, state_size=64))
    model.chunk = 128 * 4096
    with Allocated() as allocated:
        model.kernel(4096).square().sum().backward()
    assert allocated.peak < 32 * 2**20


def test_float32_kernel_agrees_with_float64() -> None:
    torch.manual_seed(0)
    layer = S4D(8, settings(state_size=64))
    single = layer.kernel(1024).detach()
    double = layer.double().kernel(1024).detach()
    assert float((single - double).abs().max() / double.abs().max()) < 1e-4


def test_initial_modes() -> None:
    A, B = initial_modes("lin", 8)
    assert torch.allclose(A.imag, math.pi * torch.arange(4, dtype=torch.float64))
    A_inv, _ = initial_modes("inv", 8)
    assert A_inv.imag.tolist() == pytest.approx([8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)])
    assert torch.equal(A.real, torch.full((4,), -0.5, dtype=torch.float64))
    assert torch.equal(A_inv.real, A.real)
    assert torch.equal(B, torch.ones(4) + 0j)


def test_legs_are_the_eigenvalues_of_hippos_normal_part() -> None:
    N = 16
    hippo = np.array(
        [[-((2 * n + 1) ** 0.5) * (2 * k + 1) ** 0.5 if n > k else -(n + 1) * (n == k) for k in range(N)] for n in range(N)]
    )
    root = np.sqrt(np.arange(N) + 0.5)
    eigenvalues = np.linalg.eigvals(hippo + np.outer(root, root))
    expected = np.sort_complex(eigenvalues[eigenvalues.imag > 0])
    got = initial_modes("legs", N)[0].numpy()
    assert np.allclose(np.sort(got.imag), np.sort(expected.imag))
    assert np.allclose(got.real, -0.5)
    vectors = np.linalg.eig(hippo + np.outer(root, root))
    order = [i for i in np.argsort(vectors.eigenvalues.imag) if vectors.eigenvalues[i].imag > 0]
    weights = np.abs(vectors.eigenvectors[:, order].conj().T @ np.sqrt(2 * np.arange(N) + 1))
    assert np.allclose(initial_modes("legs", N)[1].numpy(), weights)


@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
def test_a_layer_begins_with_the_modes_of_its_setting(init: str) -> None:
    layer = S4D(2, settings(init=init, state_size=16))
    assert np.allclose(layer.im[1].detach().numpy(), initial_modes(init, 16)[0].imag.numpy(), rtol=1e-6)
