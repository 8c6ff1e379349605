"""State-space duality on a GPU, against its definition in float64. Skipped if PyTorch finds no GPU. Needs no conftest."""

import os

import pytest
import torch

from dis_scale.models.dis.network import DiSBlock
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dis.verification import verify_block
from dis_scale.models.families import preset
from dis_scale.scan.duality import Way
from dis_scale.scan.selftest import Case
from tests.support import ssd

if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU here", allow_module_level=True)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # bit-equal products, as in training
GPU = torch.device("cuda")
# L, H, P, N: one incomplete chunk, two, and several; the last are a published model's.
SIZES = [(7, 1, 3, 5), (66, 5, 20, 16), (131, 2, 64, 128), (258, 32, 64, 64)]


def on(device: torch.device, given: ssd.Inputs) -> ssd.Inputs:
    x, own, *ways = given
    earlier, later = (Way(*[tensor.to(device) for tensor in way]) for way in ways)
    return x.to(device), own.to(device), earlier, later


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_float32_is_the_recurrence(sizes: tuple[int, int, int, int], exclusive: bool) -> None:
    """Also of one direction. A's gradient is a sum over all tokens, in which most cancels."""
    exact, single = (on(GPU, ssd.inputs(*sizes, dtype)) for dtype in (torch.float64, torch.float32))
    for present in ((True, True), (True, False), (False, True)):
        results = []
        for (x, own, *ways), backend in ((exact, "reference"), (single, "triton")):
            earlier, later = (way if there else None for way, there in zip(ways, present, strict=True))
            results.append(ssd.outputs_and_gradients((x, own, earlier, later), exclusive=exclusive, backend=backend))
        for a, b in zip(*results, strict=True):
            assert (a - b).abs().max() <= (2e-4 if a.ndim == 1 else 2e-5) * a.abs().max()


def test_bfloat16_is_bit_equal_when_repeated() -> None:
    given = on(GPU, ssd.inputs(258, 8, 64, 64, torch.bfloat16))
    first, *others = (ssd.outputs_and_gradients(given, exclusive=True, backend="triton") for _ in range(3))
    for again in others:
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


@pytest.mark.parametrize("combine", ["sum", "hydra"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", ["DiS2-S/2", "DiS2-L/2"])
def test_a_workers_self_test_passes(size: str, dtype: torch.dtype, combine: str) -> None:
    """At the published widths and 256 pixels, and of the forward pass alone, which compiles other kernels."""
    settings = Dis.model_validate(preset(size) | {"combine": combine})
    for case in (Case(258, images=8), Case(258, images=8, gradients=False)):
        verify_block(lambda scan: DiSBlock(settings, scan, skip=False), settings.width, "triton", GPU, dtype, case)
