"""The same comparison on a GPU, for the backends that need one. Skipped if PyTorch finds no GPU."""

from importlib.util import find_spec

import pytest
import torch

from tests.scan.test_scan_admission import (
    CALLS,
    SIZES,
    TOLERANCE,
    WIDE,
    check_results,
    outputs_and_gradients,
    poison,
    random_tensors,
)

__all__ = ["poison"]

if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU here", allow_module_level=True)

MAMBA = pytest.mark.skipif(find_spec("mamba_ssm") is None, reason="mamba-ssm is not installed")
BACKENDS = ["triton", pytest.param("mamba", marks=MAMBA)]
# The published kernels round each direction and its gate separately, and some of them add atomically.
ROUNDINGS = {"triton": 1, "mamba": 4}


def on_the_gpu(call: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    tensors = [x.detach().cuda().requires_grad_() for x in random_tensors(sizes, dtype)]
    return [x.cpu() for x in outputs_and_gradients(call, tensors, backend)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, WIDE], ids=str)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_equal_the_reference(
    backend: str, call: str, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    if "conv" in call and sizes[3] < 4:
        pytest.skip("the four taps are columns of A, which has fewer states")
    if backend == "mamba" and sizes[3] < 4:
        pytest.skip("the published kernels were written for 16 states")
    tolerance = {dtype: value * ROUNDINGS[backend] for dtype, value in TOLERANCE.items()}
    check_results(call, sizes, dtype, on_the_gpu(call, sizes, dtype, backend), tolerance)


@pytest.mark.parametrize("call", CALLS)
def test_triton_is_bit_equal_when_repeated(call: str) -> None:
    results = [on_the_gpu(call, (5, 70, 403, 16), torch.bfloat16, "triton") for _ in range(3)]
    for again in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(again, results[0], strict=True))
