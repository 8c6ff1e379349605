"""The Triton backend without a GPU: run by Triton's interpreter, and compiled ahead for the GPUs that it is for."""

import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for Linux alone")

from benchmarks.instructions import compiled, counted, registers
from dis_scale.scan import Direction
from dis_scale.scan import triton as scan_triton

# One of scan_forward's four is enough: the one that does most.
INTERPRETED = Path(__file__).parent.parent / "support" / "interpreted_triton.py"
COMPILED = ["scan_forward, second, for backward", "scan_backward", "conv_forward", "conv_backward"]


def test_the_interpreter_gives_the_loops_outputs_and_gradients() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(INTERPRETED)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", COMPILED)
def test_it_compiles_ahead(name: str, capability: int) -> None:
    """For an A100 and an H100 or H200: no atomics, little or no shared memory, no register spilled."""
    program = compiled(name, capability, "bf16")
    assert f".target sm_{capability}" in program.asm["ptx"]
    assert program.metadata.shared <= (0 if name.startswith("scan") else 2048)
    assert not re.search(r"\b(atom|red)\.", program.asm["ptx"])
    assert registers(program).spilled_bytes == 0
    if name.startswith("scan"):  # or a thread might read what another one wrote, and a sum of lanes be no shuffle
        assert "convert_layout" not in program.asm["ttgir"]
        assert len(set(re.findall(r"(#\w+) = #ttg.blocked<{sizePerThread = \[1, 1\]", program.asm["ttgir"]))) == 1


def test_the_instructions_are_counted() -> None:
    """A state's way through a chunk and back: 27 instructions a step and warp, of which 2 shuffle and 1.25 are MUFU's."""
    cycles = counted(compiled("scan_backward", 90, "bf16"), scan_triton.CHUNK)
    assert 20 < cycles["issued"] < 32
    assert cycles["MUFU"] == pytest.approx(10)
    assert 8 < cycles["LSU"] < 16


class Allocated(TorchDispatchMode):
    """Bytes of all storages that operations gave and that are alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for x in tree_leaves(given):
            if isinstance(x, torch.Tensor) and id(storage := x.untyped_storage()) not in self.alive:
                self.alive[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, id(storage))
        self.most = max(self.most, sum(self.alive.values()))
        return given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory_is_inputs_outputs_gradients_and_a_tenth(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """DiS-L/2's sizes; no kernel runs. Between the passes nothing but inputs and output is kept."""
    monkeypatch.setattr(scan_triton, "_launch", lambda *_, **__: None)
    B, L, E, N = 32, 258, 2048, 16
    shapes = [(B, L, E), (B, L, E), (E, N), (B, L, N), (B, L, N), (E,), (E,)]
    with Allocated() as allocated:
        inputs = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in [*shapes, *shapes, (B, L, E)]]
        y = scan_triton.backend.two_way_scan(Direction(*inputs[:7]), Direction(*inputs[7:14]), inputs[14])
        needful = sum(x.nbytes for x in inputs) + y.nbytes
        assert sum(allocated.alive.values()) == needful
        dy = torch.empty_like(y)
        gradients = torch.autograd.grad(y, inputs, dy)
        needful += sum(x.nbytes for x in gradients) + dy.nbytes
    print(
        f"{dtype}: {allocated.most / y.numel():.2f} bytes an element, {allocated.most / needful - 1:.1%} over {needful}"
    )
    assert allocated.most <= 1.1 * needful
