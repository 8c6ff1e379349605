"""The same comparison on a GPU, for the backends that need one. Skipped if PyTorch finds no GPU. Needs no conftest."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dis_scale import models
from dis_scale.models.dis.settings import Dis
from dis_scale.models.replay import Replayed
from dis_scale.process.settings import LatentShape
from dis_scale.scan.selftest import Case, verify
from dis_scale.scan.triton_fill import FULL, Filling
from tests.support.scans import (
    CALLS,
    SANITIZED,
    SIZES,
    TOLERANCE,
    WIDE,
    check_extreme_gates,
    check_results,
    compare,
    fill_by,
    outputs_and_gradients,
    poison,
    random_tensors,
    views,
)

__all__ = ["poison"]

if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU here", allow_module_level=True)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # `poison` asks for deterministic products
MAMBA = pytest.mark.skipif(find_spec("mamba_ssm") is None, reason="mamba-ssm is not installed")
BACKENDS = ["triton", pytest.param("mamba", marks=MAMBA)]
# The published kernels round each direction and its gate separately, and some of them add atomically.
ROUNDINGS = {"triton": 1, "mamba": 4}
# A GPU's exponential (ex2.approx) is off by up to 2 units in the last place, 2^-22. A decay near 1 is multiplied by itself at
# each step: with a mean error of half a unit, emulated in the loop, 1,026 steps are off by 5.5e-5. The rest as on a CPU.
GPU_TOLERANCE = {dtype: tolerance + 1e-4 for dtype, tolerance in TOLERANCE.items()}
LARGE = (32, 258, 2048, 16)
"""DiS-L/2 at 256 pixels: more programs than a GPU has multiprocessors."""
HALF_SIZES = [(2, 63, 33, 16), (2, 258, 17, 16)]
CASES = [(torch.float32, sizes) for sizes in [*SIZES, WIDE]]
CASES += [(torch.bfloat16, sizes) for sizes in [*SIZES, WIDE]] + [(torch.float16, sizes) for sizes in HALF_SIZES]


def moved(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.detach().cuda().requires_grad_() for x in tensors]


def on_the_gpu(call: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    return [x.cpu() for x in outputs_and_gradients(call, moved(random_tensors(sizes, dtype)), backend)]


@pytest.mark.parametrize(("dtype", "sizes"), CASES, ids=str)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_equal_the_reference(
    backend: str, call: str, dtype: torch.dtype, sizes: tuple[int, int, int, int]
) -> None:
    if "conv" in call and sizes[3] < 4:
        pytest.skip("the four taps are columns of A, which has fewer states")
    if backend == "mamba" and sizes[3] < 4:
        pytest.skip("the published kernels were written for 16 states")
    tolerance = {dtype: value * ROUNDINGS[backend] for dtype, value in GPU_TOLERANCE.items()}
    check_results(call, sizes, dtype, on_the_gpu(call, sizes, dtype, backend), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", ["two-way scan", "two-way conv"])
def test_a_models_sizes_equal_plain_pytorch_in_float64(call: str, dtype: torch.dtype) -> None:
    tensors = moved(random_tensors(LARGE, dtype))
    got = outputs_and_gradients(call, tensors, "triton")
    exact = [x.detach().double().requires_grad_() for x in tensors]
    compare(got, outputs_and_gradients(call, exact, "chunked", dtype), GPU_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mixers_types_and_strides_equal_the_reference(backend: str, dtype: torch.dtype) -> None:
    """At a model's sizes: x and z are halves of one product, weights and dynamics float32."""
    verify(backend, torch.device("cuda"), dtype, Case(*LARGE[1:]))


@pytest.mark.parametrize("call", ["two-way scan", "two-way conv"])
def test_views_are_accepted(call: str) -> None:
    sizes = (2, 66, 33, 16)
    for tensors in views(sizes, "cuda"):
        got = [x.cpu() for x in outputs_and_gradients(call, tensors, "triton")]
        check_results(call, sizes, torch.float32, got, GPU_TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_gates(backend: str) -> None:
    check_extreme_gates(backend, "cuda")


@pytest.mark.parametrize("call", CALLS)
def test_triton_is_bit_equal_when_repeated(call: str) -> None:
    results = [on_the_gpu(call, (5, 70, 403, 16), torch.bfloat16, "triton") for _ in range(3)]
    for again in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(again, results[0], strict=True))


@pytest.mark.parametrize("fill", [FULL, Filling(2, 1, True), Filling(4, 8, False), Filling(8, 4, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_way_to_fill_a_gpu(dtype: torch.dtype, fill: Filling, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of the other tests make few programs, which all get eight lanes per channel."""
    fill_by(fill, monkeypatch)
    sizes = (2, 258, 403, 16)
    tensors = moved(random_tensors(sizes, dtype))
    got = outputs_and_gradients("two-way scan", tensors, "triton")
    exact = [x.detach().double().requires_grad_() for x in tensors]
    compare(got, outputs_and_gradients("two-way scan", exact, "chunked", dtype), GPU_TOLERANCE[dtype])


def test_a_graph_of_a_pass_computes_the_same_numbers() -> None:
    """Of a new input after another one, with the guided batch between them."""
    model = models.build(Dis(kind="dis", width=64, depth=2, patch=2), LatentShape(4, 8), 10).cuda().requires_grad_(False)
    drawn = Replayed(model, after=0)
    for batch in (3, 6, 3):
        x_BCHW, t_B = torch.randn(batch, 4, 8, 8, device="cuda"), torch.rand(batch, device="cuda") * 999
        y_B = torch.arange(batch, device="cuda")
        assert torch.equal(drawn(x_BCHW, t_B, y_B), model(x_BCHW, t_B, y_B))
    assert model not in drawn._passes.values(), "a capture failed"


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    """Accesses outside of an allocation, each tensor in one of its own; races in shared memory. One lane per channel, and four."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code],
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, cwd=Path(__file__).parents[2],
            capture_output=True, text=True,
        )  # fmt: skip

    harmless = run("import torch; torch.ones(1, device='cuda') + 1")
    if harmless.returncode:
        pytest.skip(f"compute-sanitizer does not run here: {(harmless.stdout + harmless.stderr).strip()[-200:]}")
    found = run(
        "import torch; from dis_scale.scan.selftest import Case, verify; types = torch.float32, torch.bfloat16; "
        f"[verify('triton', torch.device('cuda'), dtype, case) for case in {SANITIZED} for dtype in types]"
    )
    assert found.returncode == 0, (found.stdout + found.stderr)[-3000:]
