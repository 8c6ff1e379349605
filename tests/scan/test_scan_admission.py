"""Every backend is compared here with the reference loop in float64: outputs and all gradients."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dis_scale.scan import choose, native_build
from tests.support.scans import (
    CALLS,
    SIZES,
    TOLERANCE,
    WIDE,
    check_extreme_gates,
    check_results,
    check_views_are_bit_equal,
    outputs_and_gradients,
    poison,
    random_tensors,
    scan_both,
    views,
)

__all__ = ["poison"]

BACKENDS = ["reference", "native", "chunked"]
ISAS = ["plain", "avx2", "avx512"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    choose("native", "cpu")
    before = native_build.instruction_set()
    try:
        yield native_build.use_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    finally:
        native_build.use_instruction_set(before)


def rows() -> Iterator[Any]:
    """Call, sizes, backend, which varies fastest: a process computes the expected results once.

    Of the long loops, which take seconds, `make test` runs those of the call that has both directions.
    """
    for call, sizes, backend in itertools.product(CALLS, [*SIZES, WIDE], BACKENDS):
        late = sizes[1] >= 1000 and "conv" not in call and (call != "two-way scan" or backend == "reference")
        yield pytest.param(call, sizes, backend, marks=[pytest.mark.slow] if late else [], id=f"{call}-{sizes}-{backend}")


@pytest.mark.parametrize(("call", "sizes", "backend"), [*rows()])
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_views_are_accepted(call: str, backend: str) -> None:
    sizes = (2, 66, 33, 16)
    for tensors in views(sizes):
        assert not tensors[0].is_contiguous()
        check_results(call, sizes, torch.float32, outputs_and_gradients(call, tensors, backend))


@pytest.mark.parametrize("call", CALLS)
def test_native_is_bit_equal_for_views_and_contiguous_tensors(call: str) -> None:
    check_views_are_bit_equal(call, (2, 66, 33, 16), "native")


@pytest.mark.parametrize("sizes", [(2, 63, 33, 16), (3, 66, 21, 5), (2, 258, 17, 16), WIDE], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_every_instruction_set(isa: str, call: str, sizes: tuple[int, int, int, int]) -> None:
    assert native_build.use_instruction_set(isa) == isa
    check_results(call, sizes, torch.float32, outputs_and_gradients(call, random_tensors(sizes), "native"))


def test_every_instruction_set_is_right_at_extreme_gates(isa: str) -> None:
    check_extreme_gates("native")


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
