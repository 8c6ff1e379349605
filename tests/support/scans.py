"""Every call of a scan backend, compared with the reference loop in float64."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dis_scale.scan import Direction, causal_conv_silu, selective_scan, two_way_conv_silu, two_way_scan
from dis_scale.scan.selftest import Case
from dis_scale.scan.triton_fill import Filling

# Largest error, relative to the largest number of a tensor. float32: states and gradients are sums of up to 1,026 steps or
# 1,500 channels and states. Each term is rounded to 6e-8 and most errors cancel; the largest error observed is 2e-6. bfloat16
# and float16: computed in float32 and rounded once, by at most half a unit in the last place (2^-8 and 2^-11 relative).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8 + 1e-5, torch.float16: 2**-11 + 1e-5}

# B, L, E, N: around a chunk of 86 steps, a vector of 4, 8 and 16 channels, a group of 192; long ones are narrow, for the loop.
SIZES = [
    (1, 1, 1, 1),
    (2, 1, 16, 16),
    (2, 63, 33, 16),
    (3, 66, 21, 5),
    (1, 87, 5, 4),
    (2, 258, 17, 16),
    (1, 1000, 3, 4),
    (1, 1026, 16, 16),
]


WIDE = (2, 3, 403, 16)

FORWARD_CYCLES = {1: 18.1, 2: 18.1, 4: 21.2, 8: 27.7}
BACKWARD_CYCLES = {1: 22.6, 2: 25.2, 4: 28.25, 8: 33.3}
"""Cycles of Triton's scan per state, step and warp by lanes of a channel: both directions forward, one backward."""

SANITIZED = [Case(35, 140, 3), Case(35, 140, 16), Case(33, 17, 16, 1)]
"""For compute-sanitizer. An odd number of states is computed by one lane; 16 states by four, with so few programs.

The third's inputs of 16 bits end with a number at the start of 32 bytes.
"""


def random_tensors(sizes: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random inputs of two directions, and z. delta and A as in a trained mixer: some decays are near 1, some near 0."""
    B, L, E, N = sizes
    torch.manual_seed(L + E)
    shapes = [(B, L, E), (B, L, E), (E, N), (B, L, N), (B, L, N), (E,), (E,)]
    tensors = [torch.randn(shape) for shape in [*shapes, *shapes, (B, L, E)]]
    for first in (0, 7):
        tensors[first + 2] = -torch.exp(tensors[first + 2])
        tensors[first + 6] -= 3
    return [x.to(dtype).requires_grad_() for x in tensors]


def scan_both(tensors: list[Tensor], backend: str) -> list[Tensor]:
    return [two_way_scan(Direction(*tensors[:7]), Direction(*tensors[7:14]), tensors[14], backend=backend)]


def scan_sum(tensors: list[Tensor], backend: str) -> list[Tensor]:
    return [two_way_scan(Direction(*tensors[:7]), Direction(*tensors[7:14]), None, backend=backend)]


def scan_one(tensors: list[Tensor], backend: str, *, reverse: bool) -> list[Tensor]:
    return [selective_scan(*Direction(*tensors[:7]), reverse=reverse, backend=backend)]


def conv_one(tensors: list[Tensor], backend: str, *, reverse: bool) -> list[Tensor]:
    return [causal_conv_silu(tensors[0], tensors[2][:, :4], tensors[5], reverse=reverse, backend=backend)]


def conv_both(tensors: list[Tensor], backend: str) -> list[Tensor]:
    weights = tensors[2][:, :4], tensors[5], tensors[9][:, :4], tensors[12]
    return list(two_way_conv_silu(tensors[0], *weights, backend=backend))


CALLS: dict[str, Callable[[list[Tensor], str], list[Tensor]]] = {
    "scan": functools.partial(scan_one, reverse=False),
    "reversed scan": functools.partial(scan_one, reverse=True),
    "two-way scan": scan_both,
    "two-way sum": scan_sum,
    "conv": functools.partial(conv_one, reverse=False),
    "reversed conv": functools.partial(conv_one, reverse=True),
    "two-way conv": conv_both,
}


def outputs_and_gradients(call: str, tensors: list[Tensor], backend: str, weight_dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs, then the gradients of their sum with fixed random weights, for every tensor that the call uses.

    The weights are rounded to `weight_dtype`, by default the outputs' dtype.
    """
    outputs = CALLS[call](tensors, backend)
    torch.manual_seed(1)
    weights = [torch.randn(y.shape).to(weight_dtype or y.dtype).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, tensors, weights, allow_unused=True)
    return [y.detach() for y in outputs] + [g for g in gradients if g is not None]


@functools.cache
def expected_results(call: str, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """The same by the reference loop in float64, from inputs rounded to `dtype`."""
    tensors = [x.detach().double().requires_grad_() for x in random_tensors(sizes, dtype)]
    return outputs_and_gradients(call, tensors, "reference", dtype)


def check_results(
    call: str,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    got: list[Tensor],
    tolerance: dict[torch.dtype, float] = TOLERANCE,
) -> None:
    """Assert that the results `got` agree with the reference within the tolerance."""
    assert {x.dtype for x in got} == {dtype}
    compare(got, expected_results(call, sizes, dtype), tolerance[dtype])


def compare(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Assert that each tensor agrees within the tolerance, relative to its largest number."""
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        error, largest = (x.double() - y).abs().max(), y.abs().max()
        assert error <= tolerance * largest, f"tensor {i} is off by {error:.1e}, its largest number is {largest}"


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton sees the multiprocessors of an H200."""
    pytest.importorskip("triton", reason="Triton comes only with PyTorch's builds for Linux")
    monkeypatch.setattr("dis_scale.scan.triton_launch.multiprocessors", lambda _: 132)


def fill_by(fill: Filling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Triton scan fill a GPU so, whatever its programs are."""
    monkeypatch.setattr("dis_scale.scan.triton._filling", lambda _: fill)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that a backend does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def views(sizes: tuple[int, int, int, int], device: str = "cpu") -> Iterator[list[Tensor]]:
    """The random tensors as views: as either half of a product, and with a strided last axis."""
    tensors = [x.detach().to(device) for x in random_tensors(sizes)]
    for half in (0, 1):  # as x and z, the two halves of the mixer's product
        yield [torch.cat([x, x], -1).chunk(2, -1)[half].requires_grad_() for x in tensors]
    yield [x.repeat_interleave(2, -1)[..., ::2].requires_grad_() for x in tensors]


def check_views_are_bit_equal(call: str, sizes: tuple[int, int, int, int], backend: str) -> None:
    """Compare a call on views of the random tensors with the same call on contiguous ones."""
    expected = outputs_and_gradients(call, random_tensors(sizes), backend)
    for tensors in views(sizes):
        for x, y in zip(outputs_and_gradients(call, tensors, backend), expected, strict=True):
            assert torch.equal(x, y)


def check_extreme_gates(backend: str, device: str = "cpu") -> None:
    """SiLU at inputs where it equals its input, where it vanishes, and where its exponential overflows.

    A gate of 0 makes the output 0, but its gradient still needs y.
    """
    sizes = (1, 9, 17, 4)
    on_cpu = random_tensors(sizes)
    with torch.no_grad():
        for x in (on_cpu[0], on_cpu[14]):
            x[0] = torch.tensor([-1e4, -300, -128, -100, 0, 88, 100, 300, 1e4])[:, None]
    got, expected = ([x.detach().to(device).requires_grad_() for x in on_cpu] for _ in range(2))
    for call in ("two-way scan", "conv", "two-way conv"):
        for y, loops in zip(CALLS[call](got, backend), CALLS[call](expected, "reference"), strict=True):
            torch.testing.assert_close(y, loops, rtol=1e-4, atol=1e-25)
    usual = [x.detach().to(device).requires_grad_() for x in random_tensors(sizes)[:14]]
    gated, by_loops = (
        outputs_and_gradients("two-way scan", [*usual, x[14]], name) for x, name in ((got, backend), (expected, "reference"))
    )
    assert all(x.isfinite().all() for x in gated)
    torch.testing.assert_close(gated[-1], by_loops[-1], rtol=1e-4, atol=1e-25)  # z's gradient
