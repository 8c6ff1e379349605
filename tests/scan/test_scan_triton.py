"""The Triton backend without a GPU: run by Triton's interpreter, and compiled ahead for the GPUs that it is for."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for Linux alone")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dis_scale.scan import triton_kernels as kernels  # noqa: E402
from dis_scale.scan.triton import CHUNK, LANES, ROWS  # noqa: E402

ALWAYS_FLOAT32 = {
    "A",
    "A0",
    "A1",
    "sums",
    "sums0",
    "sums1",
    "starts",
    "starts0",
    "starts1",
    "dA",
    "dB",
    "dC",
    "dD",
    "dbias",
}
SCAN = {"LANES": LANES, "STATES": 16, "CHUNK": CHUNK, "L": 258, "N": 16, "GATED": True}
CONV = {"LANES": LANES, "ROWS": ROWS, "TAPS": 4, "L": 258, "BACK": True, "ON": True}
# What a kernel is compiled with, and how many bytes of registers a thread may spill.
KERNELS = {
    "scan_forward": (SCAN | {"REVERSE": False, "TWO_WAY": True, "KEEP": True}, 0),
    "scan_backward": (SCAN | {"REVERSE": True, "WRITE_DZ": True}, 200),
    "conv_forward": (CONV, 0),
    "conv_backward": (CONV, 0),
}


def compiled(name: str, capability: int, dtype: str) -> Any:
    """As a launch on DiS-L/2 compiles it: all pointers and distances are multiples of 16."""
    kernel, (constants, _) = getattr(kernels, name), KERNELS[name]
    signature = {
        argument: "constexpr"
        if argument in constants
        else "i32"
        if argument == "E" or argument.endswith("_row")
        else "*fp32"
        if argument in ALWAYS_FLOAT32
        else f"*{dtype}"
        for argument in kernel.arg_names
    }
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    wide = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names) if key not in constants}
    source = ASTSource(kernel, signature=signature, constexprs=places, attrs=wide)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": LANES // 32})


def test_the_interpreter_gives_the_loops_outputs_and_gradients() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(Path(__file__).with_name("interpreted.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles_ahead(name: str, capability: int, tmp_path: Path) -> None:
    """For an A100 and an H100 or H200: no atomics, little shared memory, few registers spilled."""
    program = compiled(name, capability, "bf16")
    assert f".target sm_{capability}" in program.asm["ptx"]
    assert program.metadata.shared <= 2048
    assert not re.search(r"\b(atom|red)\.", program.asm["ptx"])
    cubin = tmp_path / "cubin"
    cubin.write_bytes(program.asm["cubin"])
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    print(f"{name} sm_{capability}: {found[1]} registers, {found[2]} bytes spilled, {program.metadata.shared} shared")
    assert int(found[2]) <= KERNELS[name][1]
