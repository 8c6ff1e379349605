"""Every backend is compared here with the reference loop in float64: outputs and all gradients."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dis_scale.scan import Direction, causal_conv_silu, choose, native, selective_scan, two_way_conv_silu, two_way_scan
from dis_scale.scan.selftest import Case

BACKENDS = ["reference", "native", "chunked"]
ISAS = ["plain", "avx2", "avx512"]

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
SANITIZED = [Case(35, 140, 3), Case(35, 140, 16)]
"""Two images for compute-sanitizer. An odd number of states is computed by one lane; 16 states by eight, with so few programs."""


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


def scan_one(tensors: list[Tensor], backend: str, reverse: bool) -> list[Tensor]:
    return [selective_scan(*tensors[:7], reverse=reverse, backend=backend)]


def conv_one(tensors: list[Tensor], backend: str, reverse: bool) -> list[Tensor]:
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


def outputs_and_gradients(
    call: str, tensors: list[Tensor], backend: str, weight_dtype: torch.dtype | None = None
) -> list[Tensor]:
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


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that a backend does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    choose("native", "cpu")
    before = native.instruction_set()
    try:
        yield native.use_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    finally:
        native.use_instruction_set(before)


def rows() -> Iterator[Any]:
    """Call, sizes, backend, which varies fastest: a process computes the expected results once.

    Of the long loops, which take seconds, `make test` runs those of the call that has both directions.
    """
    for call, sizes, backend in itertools.product(CALLS, [*SIZES, WIDE], BACKENDS):
        late = sizes[1] >= 1000 and "conv" not in call and (call != "two-way scan" or backend == "reference")
        yield pytest.param(
            call, sizes, backend, marks=[pytest.mark.faults] if late else [], id=f"{call}-{sizes}-{backend}"
        )


@pytest.mark.parametrize(("call", "sizes", "backend"), rows())
def test_outputs_and_gradients_equal_the_reference(call: str, sizes: tuple[int, int, int, int], backend: str) -> None:
    if "conv" in call and sizes[3] < 4:
        pytest.skip("the four taps are columns of A, which has fewer states")
    check_results(call, sizes, torch.float32, outputs_and_gradients(call, random_tensors(sizes), backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_rounded_once(backend: str, call: str, dtype: torch.dtype) -> None:
    sizes = (2, 63, 33, 16)
    check_results(call, sizes, dtype, outputs_and_gradients(call, random_tensors(sizes, dtype), backend))


def views(sizes: tuple[int, int, int, int], device: str = "cpu") -> Iterator[list[Tensor]]:
    """The random tensors as views: as either half of a product, and with a strided last axis."""
    tensors = [x.detach().to(device) for x in random_tensors(sizes)]
    for half in (0, 1):  # as x and z, the two halves of the mixer's product
        yield [torch.cat([x, x], -1).chunk(2, -1)[half].requires_grad_() for x in tensors]
    yield [x.repeat_interleave(2, -1)[..., ::2].requires_grad_() for x in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_views_are_accepted(call: str, backend: str) -> None:
    sizes = (2, 66, 33, 16)
    for tensors in views(sizes):
        assert not tensors[0].is_contiguous()
        check_results(call, sizes, torch.float32, outputs_and_gradients(call, tensors, backend))


@pytest.mark.parametrize("call", CALLS)
def test_native_is_bit_equal_for_views_and_contiguous_tensors(call: str) -> None:
    sizes = (2, 66, 33, 16)
    expected = outputs_and_gradients(call, random_tensors(sizes), "native")
    for tensors in views(sizes):
        for x, y in zip(outputs_and_gradients(call, tensors, "native"), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("sizes", [(2, 63, 33, 16), (3, 66, 21, 5), (2, 258, 17, 16), WIDE], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_every_instruction_set(isa: str, call: str, sizes: tuple[int, int, int, int]) -> None:
    assert native.use_instruction_set(isa) == isa
    check_results(call, sizes, torch.float32, outputs_and_gradients(call, random_tensors(sizes), "native"))


def test_every_instruction_set_is_right_at_extreme_gates(isa: str) -> None:
    check_extreme_gates("native")


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
    gated, loops = (
        outputs_and_gradients("two-way scan", [*usual, x[14]], name)
        for x, name in ((got, backend), (expected, "reference"))
    )
    assert all(x.isfinite().all() for x in gated)
    torch.testing.assert_close(gated[-1], loops[-1], rtol=1e-4, atol=1e-25)  # z's gradient


@pytest.mark.parametrize("call", CALLS)
def test_native_is_bit_equal_when_repeated_and_at_any_number_of_threads(call: str) -> None:
    before, results = torch.get_num_threads(), []
    for threads in (1, 1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(outputs_and_gradients(call, random_tensors((5, 70, 403, 16)), "native"))
    torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(again, results[0], strict=True))


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_training_and_sampling_are_bit_equal(backend: str) -> None:
    tensors = random_tensors((2, 130, 33, 16))
    with torch.no_grad():
        alone = scan_both(tensors, backend)[0]
    assert torch.equal(alone, scan_both(tensors, backend)[0])


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_a_gradient_of_an_expanded_scalar(backend: str) -> None:
    """`y.sum().backward()` passes a gradient whose strides are all zero."""
    sums = [scan_both(random_tensors((2, 66, 33, 16)), name)[0].sum() for name in (backend, "reference")]
    torch.testing.assert_close(*sums)
    got, expected = random_tensors((2, 66, 33, 16)), random_tensors((2, 66, 33, 16))
    scan_both(got, backend)[0].sum().backward()
    scan_both(expected, "reference")[0].sum().backward()
    for x, y in zip(got, expected, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert (x.grad - y.grad).abs().max() <= TOLERANCE[torch.float32] * y.grad.abs().max()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("call", CALLS)
def test_gradients_are_the_outputs_derivatives(backend: str, call: str) -> None:
    """Central differences in float64 show that the reference's gradients, used by all other tests, are right."""
    tensors = [x.detach().double().requires_grad_() for x in random_tensors((1, 5, 2, 4))]
    assert torch.autograd.gradcheck(lambda *t: tuple(CALLS[call](list(t), backend)), tensors, fast_mode=True)
