"""The Triton kernels under Triton's interpreter, which must be asked for before Triton is imported: a process of its own.

`TRITON_INTERPRET=1 python -m pytest tests/support/interpreted_triton.py`; test_scan_triton.py runs it so.
"""

import pytest
import torch

from dis_scale.scan import choose
from tests.scan.test_scan_admission import CALLS, TOLERANCE, admit, draw, outputs_and_gradients, poison, views

__all__ = ["poison"]

# B, L, E, N: two chunks of 16 steps, the second one torn; two warps of 32 channels, likewise; states that fill no power of 2.
ODD = (1, 18, 33, 3)
# The interpreter cuts float32 to bfloat16 where a GPU rounds: a whole unit in the last place instead of half of one.
TOLERANCE_HERE = TOLERANCE | {torch.bfloat16: 2**-7 + 1e-5}


def test_it_is_chosen_by_name_on_a_cpu_under_the_interpreter_alone() -> None:
    assert str(choose("triton", "cpu")) == "triton (as asked)"
    assert choose("auto", "cpu").name != "triton"


@pytest.mark.parametrize("call", CALLS)
def test_outputs_and_gradients_are_the_loops(call: str) -> None:
    admit(call, ODD, torch.float32, outputs_and_gradients(call, draw(ODD), "triton"))


@pytest.mark.parametrize("call", ["two-way scan", "two-way conv"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 4), (2, 16, 2, 2), (1, 33, 3, 1), (1, 17, 1, 17), (1, 2, 130, 2)], ids=str)
def test_other_sizes(sizes: tuple[int, int, int, int], call: str) -> None:
    admit(call, sizes, torch.float32, outputs_and_gradients(call, draw(sizes), "triton"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", ["two-way scan", "two-way conv"])
def test_half_precision_is_rounded_once(call: str, dtype: torch.dtype) -> None:
    sizes = (1, 6, 3, 2)
    admit(call, sizes, dtype, outputs_and_gradients(call, draw(sizes, dtype), "triton"), TOLERANCE_HERE)


@pytest.mark.parametrize("call", ["two-way scan", "two-way conv"])
def test_views_give_the_bits_of_contiguous_tensors(call: str) -> None:
    sizes = (2, 5, 3, 1)
    expected = outputs_and_gradients(call, draw(sizes), "triton")
    for tensors in views(sizes):
        for x, y in zip(outputs_and_gradients(call, tensors, "triton"), expected, strict=True):
            assert torch.equal(x, y)


def test_a_gate_and_a_scan_that_nobody_differentiates() -> None:
    with torch.no_grad():
        (alone,) = CALLS["two-way scan"](draw(ODD), "triton")
    assert torch.equal(alone, CALLS["two-way scan"](draw(ODD), "triton")[0])


def test_gradients_twice_on_one_graph_are_the_same() -> None:
    """The room that states take until gradients are written is new each time."""
    tensors = draw((1, 18, 2, 1))
    (y,) = CALLS["two-way scan"](tensors, "triton")
    first, again = (torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, z) for x, z in zip(first, again, strict=True))
