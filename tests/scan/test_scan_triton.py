"""The Triton backend without a GPU: run by Triton's interpreter, and compiled ahead for the GPUs that it supports."""

import os
import re
import subprocess
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks

pytest.importorskip("triton", reason="Triton comes only with PyTorch's builds for Linux")

import triton
from triton.runtime import driver

from benchmarks.account import recorded
from benchmarks.instructions import FORWARD, CompileOnly, ahead, busy, code, compiled, counted, registers, work
from dis_scale.models.dis.network import DiSBlock
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dis.ssd import SsdMixer
from dis_scale.models.families import preset
from dis_scale.process.errors import UserError
from dis_scale.scan import (
    Choice,
    Direction,
    norms,
    triton_conv,
    triton_layout,
    triton_norm,
    triton_numbers,
    triton_scan,
    triton_ssd,
    triton_ssd_mixer,
)
from dis_scale.scan import triton as scan_triton
from dis_scale.scan.duality import Way
from dis_scale.scan.triton_fill import FULL
from dis_scale.scan.triton_launch import CHUNK, MOST_PROGRAMS, Launch, compile_together, without_memory
from tests.support.allocated import Allocated
from tests.support.alone import in_its_own_process
from tests.support.prices import price_of
from tests.support.scans import BACKWARD_CYCLES, FORWARD_CYCLES

PRODUCTS, TOUCHED = "threadsPerWarp = [32, 1], warpsPerCTA = [1, 4]", "threadsPerWarp = [8, 4], warpsPerCTA = [4, 1]"
"""Layouts of a tile: of all that is loaded, stored or summed; and of addresses of which nothing else is loaded."""
INTERPRETED = Path(__file__).parent.parent / "support/interpreted"
# Of the variants of scan_forward and scan_backward `make test` compiles those with the most registers.
COMPILED = [
    "scan_forward, second, for backward", "scan_backward", "conv_forward", "conv_backward",
    pytest.param("scan_forward, second, keeps", marks=pytest.mark.slow),
    pytest.param("scan_backward, of the gate, too", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("part", ["scan", "blocks", "duality"])
@pytest.mark.parametrize("rows", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_interpreters_outputs_and_gradients_equal_the_reference(rows: str, part: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", rows, str(INTERPRETED / f"{part}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


CAPABILITIES = [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
"""Of an A100, of an H100 or H200, and of a B200."""


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", COMPILED)
def test_it_compiles_ahead(name: str, capability: int) -> None:
    """No atomics, no shared memory, no register spilled."""
    check_program(compiled(name, capability, "bf16"), name, capability)


@pytest.mark.parametrize("lanes", [8, pytest.param(4, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_several_lanes_per_channel_compile_ahead(lanes: int) -> None:
    """The same, both directions at once."""
    for name in ("scan_forward, second, for backward", "scan_backward, of the gate, too"):
        check_program(compiled(name, 90, "bf16", lanes, both="backward, " in name), name, 90)


def check_program(program: Any, name: str, capability: int) -> None:
    assert f".target sm_{capability}" in program.asm["ptx"]
    assert program.metadata.shared == 0
    assert not re.search(r"\b(atom|red)\.", program.asm["ptx"])
    assert registers(program).spilled_bytes == 0
    assert "convert_layout" not in program.asm["ttgir"]
    if name.startswith("scan"):  # one layout: a thread reads only what it wrote, and sums over lanes are shuffles
        layouts = re.findall(r"(#\w+) = #ttg.blocked<{sizePerThread = \[1, 1\], (.*?), order", program.asm["ttgir"])
        assert {layout for _, layout in layouts} == {PRODUCTS, TOUCHED}, "products need the first"
        others = [name for name, layout in layouts if layout != PRODUCTS]
        moved = [line for line in program.asm["ttgir"].splitlines() if re.search(r"tt\.(load|store|gather)", line)]
        assert not any(f"{other}>" in line for other in others for line in moved), "only what is touched has another"


DUALITY = {"ssd_states", "ssd_outputs", "ssd_pairs_backward", "ssd_states_backward"}
"""Kernels of products."""
EXPONENTS = {"ssd_exponents", "ssd_exponents_backward"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_state_space_duality_compiles_ahead(capability: int) -> None:
    """At DiS2-L/2's sizes."""
    with torch.device("meta"), ahead(capability) as launched:
        mixer = SsdMixer(Dis.model_validate(preset("DiS2-L/2")), "triton")
        h = torch.empty(2, 258, 1024, dtype=torch.bfloat16, requires_grad=True)
        names = ("in_proj", "conv", "own_proj", "dt_bias", "A_log", "D", "norm", "out_proj")
        out = triton_ssd_mixer.mixer(h, *[mixer.get_parameter(name) for name in names])
        out.backward(torch.empty_like(out))
    others = {"conv_forward", "gated_norm", "conv_backward", "sum_conv", "gated_norm_backward"}
    check_duality(launched, capability, DUALITY | EXPONENTS | others)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("later", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_duality_of_a_single_direction_compiles_ahead(later: bool, capability: int) -> None:
    """As `combine: sum` has it: each direction of its own x, with the token itself."""
    with torch.device("meta"), ahead(capability) as launched:
        x, own = torch.empty(2, 258, 32, 64, dtype=torch.bfloat16, requires_grad=True), torch.empty(2, 258, 32, requires_grad=True)
        B, C = (torch.empty(2, 258, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        way = Way(torch.empty(2, 258, 32, requires_grad=True), torch.empty(32, requires_grad=True), B, C)
        out = triton_ssd.ssd(x, own, None if later else way, way if later else None, exclusive=False)
        out.backward(torch.empty_like(out))
    check_duality(launched, capability, DUALITY | EXPONENTS)


def check_duality(launched: list[tuple[Launch, tuple[Any, ...], Any]], capability: int, kernels: set[str]) -> None:
    """These kernels: products on tensor cores, in 18 KB of shared memory, without atomics; only an A100's spill registers."""
    assert {launch.kernel.__name__ for launch, *_ in launched} == kernels
    for launch, _, program in launched:
        assert f".target sm_{capability}" in program.asm["ptx"]
        multiplies = re.search(r"\b(mma\.sync|wgmma|tcgen05\.mma)", program.asm["ptx"])
        assert bool(multiplies) == (launch.kernel.__name__ in DUALITY)
        assert not re.search(r"\b(atom|red)\.", program.asm["ptx"])
        assert program.metadata.shared <= 18 * 1024
        assert registers(program).spilled_bytes <= (400 if capability == 80 else 0)


def test_hydras_mixer_keeps_what_is_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of an image in a block of DiS2-L/2 within 3 %: by the price, and by the tensors that autograd saves."""
    settings = Dis.model_validate(preset("DiS2-L/2"))
    kept = price_of("DiS2-L/2").kept_in("bf16")
    monkeypatch.setattr(norms, "choose", lambda *_: Choice("triton", "by count"))
    found = list[int]()
    for images in (1, 2):
        saved = dict[int, UntypedStorage]()
        with torch.device("meta"), recorded():
            block = DiSBlock(settings, "triton", skip=False)
            h = torch.empty(images, 258, 1024, dtype=torch.bfloat16, requires_grad=True)
            r, c = torch.empty(images, 258, 1024, requires_grad=True), torch.empty(images, 1024, dtype=torch.bfloat16)

            def keep(x: Tensor, saved: dict[int, UntypedStorage] = saved) -> Tensor:
                saved[x.untyped_storage()._cdata] = x.untyped_storage()
                return x

            with saved_tensors_hooks(keep, lambda x: x):
                outs = block(h, r, c, None, None)
        found.append(sum(each.nbytes() for each in saved.values()))
        del outs
    priced = sum(kept.image[number] for number in kept.blocks[1].kept)
    assert found[1] - found[0] == pytest.approx(priced, rel=0.03)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("ordered", [False, True], ids=["stream's order", "order of its own"])
def test_norms_compile_ahead(capability: int, ordered: bool) -> None:
    """At DiS-L/2's sizes; an order is an argument, of which a kernel without one knows nothing. No register is spilled."""
    with torch.device("meta"), ahead(capability) as launched:
        r, weight = torch.empty(2, 258, 1024, requires_grad=True), torch.empty(1024, requires_grad=True)
        places = (torch.empty(258, dtype=torch.int64), torch.empty(258, dtype=torch.int64)) if ordered else None
        stream, normal = triton_norm.added_rms_norm(r, torch.empty(2, 258, 1024, dtype=torch.bfloat16), weight, places)
        torch.autograd.backward([stream, normal], [torch.empty_like(stream), torch.empty_like(normal)])
        gated = triton_norm.gated_rms_norm(normal.detach(), normal.detach(), weight)
        gated.backward(torch.empty_like(gated))
    assert [launch.kernel.__name__ for launch, *_ in launched] == [
        "added_norm", "added_norm_backward", "gated_norm", "gated_norm_backward",
    ]  # fmt: skip
    for launch, _, program in launched:
        assert f".target sm_{capability}" in program.asm["ptx"]
        assert registers(program).spilled_bytes == 0
        takes_orders = "%order: !tt.ptr<i64>" in program.asm["ttir"]
        assert takes_orders == (ordered and launch.kernel.__name__.startswith("added"))


def test_the_instructions_are_counted() -> None:
    """A state's forward and backward pass through a chunk: per step and warp 22 instructions, 1.25 of them MUFU.

    In bfloat16 8 products and 7 shuffles sum 32 values over lanes, in float32 31 shuffles.
    """
    cycles = counted(compiled("scan_backward", 90, "bf16"), work("scan_backward"))
    assert 20 < cycles["issued"] < 24
    assert cycles["MUFU"] == pytest.approx(10)
    assert 6 < cycles["LSU"] < 10
    single = counted(compiled("scan_backward", 90, "fp32"), work("scan_backward"))
    assert single["LSU"] - cycles["LSU"] == pytest.approx(6, abs=0.5)


@pytest.mark.parametrize("lanes", [8, pytest.param(4, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_the_cycles_by_lanes_are_counted(lanes: int) -> None:
    """Sums over lanes cost instructions; exponentials stay the same."""
    forward = [counted(compiled(name, 90, "bf16", lanes), work(name, lanes)) for name in FORWARD]
    backward = counted(compiled("scan_backward", 90, "bf16", lanes), work("scan_backward", lanes))
    assert [cycles["MUFU"] for cycles in (*forward, backward)] == [8.5, 9.5, 10]
    assert sum(max(cycles.values()) for cycles in forward) == pytest.approx(FORWARD_CYCLES[lanes], rel=0.01)
    assert max(backward.values()) == pytest.approx(BACKWARD_CYCLES[lanes], rel=0.01)


def test_a_multiprocessor_that_runs_one_program_takes_the_time_of_two() -> None:
    assert [busy(programs, 2, 3) for programs in (1, 2, 3, 4, 6, 7, 8, 9)] == [2, 2, 2, 2, 3, 5, 5, 5]


def test_no_load_of_a_group_of_steps_waits_for_a_store() -> None:
    """A thread waits for memory once for all steps of a group: a load cannot move above a store that may be to its address."""
    group = [op for op, depth in code(compiled("scan_forward, second, for backward", 90, "bf16")) if depth == 2]
    assert "LDG" in group[: group.index("STG")]
    assert "LDG" not in group[group.index("STG") :]


def test_the_convolutions_instructions_are_counted() -> None:
    """Two exponentials and two reciprocals (MUFU) per step, 19 times for a group of 16 steps: its halo is computed twice."""
    cycles = counted(compiled("conv_backward", 90, "bf16"), work("conv_backward"))
    assert 60 < cycles["issued"] < 90
    assert cycles["MUFU"] == pytest.approx(4 * 8 * 19 / 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory_exceeds_inputs_outputs_and_gradients_by_a_tenth_at_most(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At DiS-L/2's sizes; no kernel runs. Between the passes only inputs, output, and B and C in another layout are kept."""
    monkeypatch.setattr(Launch, "__call__", lambda *_: None)
    B, L, E, N = 32, 258, 2048, 16
    shapes = [(B, L, E), (B, L, E), (E, N), (B, L, N), (B, L, N), (E,), (E,)]
    with Allocated() as allocated:
        inputs = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in [*shapes, *shapes, (B, L, E)]]
        y = scan_triton.backend.two_way_scan(Direction(*inputs[:7]), Direction(*inputs[7:14]), inputs[14])
        needed = sum(x.nbytes for x in inputs) + y.nbytes
        by_state = 2 * 2 * B * N * (L + -L % CHUNK) * 4
        assert sum(allocated.alive.values()) == needed + by_state
        dy = torch.empty_like(y)
        gradients = torch.autograd.grad(y, inputs, dy)
        needed += sum(x.nbytes for x in gradients) + dy.nbytes
    print(f"{dtype}: {allocated.peak / y.numel():.2f} bytes an element, {allocated.peak / needed - 1:.1%} over {needed}")
    assert allocated.peak <= 1.1 * needed


def direction_of_meta(B: int, L: int, E: int, N: int, row: int = 0) -> Direction:
    """A direction without memory; `row` is the distance between two rows of u, E unless given."""
    shapes = [(B, L, row or E), (B, L, E), (E, N), (B, L, N), (B, L, N), (E,), (E,)]
    u, *rest = (torch.empty(shape, device="meta") for shape in shapes)
    return Direction(u[..., :E], *rest)


def test_sizes_beyond_a_grid_or_32_bits_are_named() -> None:
    with recorded() as launched:
        require_limits(launched)


def require_limits(launched: list[Any]) -> None:
    backend, ones = scan_triton.backend, torch.ones(1, 4, device="meta")
    most = MOST_PROGRAMS
    with pytest.raises(UserError, match=r"at most 65,535 images per call, got 65,536: take smaller micro-batches"):
        backend.selective_scan(direction_of_meta(most + 1, 1, 1, 1), False)
    with pytest.raises(UserError, match=r"at most 1,048,560 steps, got 1,048,561: set the backend to chunked"):
        backend.causal_conv_silu(torch.ones(1, 1_048_561, 1, device="meta"), ones, ones[0, :1], False)
    assert not launched
    with pytest.raises(UserError, match=r"fewer than 2\*\*31 numbers, got 4,096 rows of 524,288: set the backend to ch"):
        backend.selective_scan(direction_of_meta(2, 4096, 8, 1, row=2**19), False)
    backend.selective_scan(direction_of_meta(most, 1, 1, 1), False)
    backend.causal_conv_silu(torch.ones(1, 1_048_560, 1, device="meta"), ones, ones[0, :1], False)
    backend.selective_scan(direction_of_meta(2, 4095, 8, 1, row=2**19), False)
    # With more states than a chunk has steps, the backward pass keeps them in a buffer of their own.
    many = [x.requires_grad_() for x in direction_of_meta(1, 2**20, 2**10, 64)]
    y = backend.selective_scan(Direction(*many), False)
    with pytest.raises(UserError, match=r"got 4,194,304 rows of 1,024: set the backend to chunked"):
        y.backward(torch.empty_like(y))


def compile_launches(run: Callable[[], object]) -> None:
    """Compile what a function launches, by the path of a launch."""
    with recorded() as launched:
        run()
    for launch, arguments, _ in launched:
        launch.kernel.warmup(*arguments, grid=launch.grid, **launch.numbers)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An H100 that compiles and cannot launch; the names of the kernels that were compiled."""
    compiled_kernels = list[str]()
    monkeypatch.setattr(driver, "_active", CompileOnly())
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **k: compiled_kernels.append(k["fn"].name))
    return compiled_kernels


def let_wait_for_each_other(monkeypatch: pytest.MonkeyPatch, *kernels: Any) -> list[Exception]:
    """Let each compilation of these kernels wait for another one; return the list of their failures."""
    together, failed = threading.Barrier(2, timeout=300), list[Exception]()

    def compile_with_the_other(*args: Any, alone: Any, **kwargs: Any) -> Any:
        together.wait()
        try:
            return alone(*args, **kwargs)
        except Exception as error:  # compile_together leaves it to the first launch
            failed.append(error)
            raise

    for kernel in kernels:
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        kernel.device_caches[0]
        monkeypatch.setattr(kernel, "compile", partial(compile_with_the_other, alone=kernel.compile))
    return failed


@in_its_own_process
def test_kernels_compile_together_and_are_those_that_a_launch_takes(monkeypatch: pytest.MonkeyPatch, compiles: list[str]) -> None:
    """Of a pass without gradients, by the path of a launch: both of its scans wait for each other."""
    failed = let_wait_for_each_other(monkeypatch, triton_scan.scan_forward)
    shapes = [(1, 5, 8), (1, 5, 8), (8, 1), (1, 5, 1), (1, 5, 1), (8,), (8,)]
    inputs, z = [torch.ones(shape) for shape in shapes * 2], torch.ones(1, 5, 16)[..., 8:]
    directions = [Direction(*inputs[:7]), Direction(*inputs[7:])]
    kind = scan_triton._kind(False, z, directions, FULL)
    compile_together(lambda: scan_triton.compile_forward(kind, z, directions, keep=False))
    assert not failed, ["".join(traceback.format_exception(error)) for error in failed]
    assert sorted(compiles) == ["by_state", "scan_forward", "scan_forward"]
    compile_launches(lambda: scan_triton._forward(triton_numbers.scan_forward(kind, False), kind, z, directions, keep=False))
    assert len(compiles) == 3


@in_its_own_process
def test_the_convolutions_kernels_compile_together(monkeypatch: pytest.MonkeyPatch, compiles: list[str]) -> None:
    """Those of the backward pass: the forward pass has only one."""
    failed = let_wait_for_each_other(monkeypatch, triton_conv.conv_backward, triton_layout.sum_conv)
    x, weights = torch.ones(1, 5, 16)[..., 8:], [torch.ones(8, 4), torch.ones(8)] * 2
    dys, kind = [torch.ones(1, 5, 8)] * 2, scan_triton._conv_kind(x, weights, ahead=0)
    dx, gradients = torch.empty(1, 5, 8), [torch.empty_like(w) for w in weights]
    meta, launches = kind._replace(device=scan_triton.META), triton_numbers.conv_backward(kind, 8, 8, 8)
    empty = without_memory((x, weights, dys, dx, gradients))
    compile_together(lambda: scan_triton._conv_backward(launches, meta, *empty))
    assert (sorted(compiles), failed) == (["conv_backward", "sum_conv"], [])
    launches = triton_numbers.conv_backward(kind, 8, 8, 8)
    compile_launches(lambda: scan_triton._conv_backward(launches, kind, x, weights, dys, dx, gradients))
    assert len(compiles) == 2
