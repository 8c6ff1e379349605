"""The Triton backend for NVIDIA GPUs: the two-way scan and the two-way convolution.

It takes float16, bfloat16 and float32, and refuses float64. The state is float32; outputs are rounded once. An input's last axis
must be contiguous, and its batch rows evenly spaced, as in chunks and splits of a product. Its first number, except that of B and
C, must be at a multiple of 16 bytes. Any other input is copied. No sum is atomic: partial gradients of B and C (over groups of
channels) and of the parameters (over batch rows) are stored in a buffer and then summed, so every run gives the same bits.
`TRITON_INTERPRET=1`, set before Triton is imported, runs everything on the CPU, slowly.

A scan's first kernel converts B and C to the layout of the other kernels. Then there is one kernel per direction. The first
direction stores its y in float32; the second adds its own, applies the gate and writes the output, so nothing is flipped. The
forward pass keeps only its inputs, and B and C in the new layout. The backward pass repeats the scan. It stores the states of every
16th step in the memory where the gradients of u and delta are written later, so it needs almost no additional memory. With more
than 16 states both directions have separate buffers, which no plan counts: with 64 states they are a third of the activations that
a recomputed DiS-L/2 keeps. If a block is recomputed for its own backward pass, or if memory is left for all states
(`KeepingStates`), the forward pass stores the states and the y before the gate, and the scan is not repeated. Then the backward
pass computes the gradients of each direction separately. Each direction recomputes the gradient of y before the gate: storing it
would move as many bytes as reading z and dy again, in bf16 twice as many. The convolution's values before SiLU are recomputed also.

Axes: B batch, L time, E channels, N states, W taps of the convolution. Read next: triton_tiles.py, triton_numbers.py.
"""

import os
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dis_scale.process.errors import DisScaleError, UserError
from dis_scale.scan import triton_numbers as numbers
from dis_scale.scan.backend import Backend, Direction, differentiable_once, keeps_states, refuse_float64
from dis_scale.scan.triton_fill import Filling
from dis_scale.scan.triton_launch import (
    Launch,
    alike,
    compile_together,
    empty_like,
    filling_on,
    padded,
    plain,
    rowwise,
    without_memory,
)
from dis_scale.scan.triton_memory import Gradients, KeptStates, ScanGradients, new_parts, new_states
from dis_scale.scan.triton_numbers import ConvBackward, ConvKind, ScanBackward, ScanForward, ScanKind

META = torch.device("meta")
"""Tensors without memory, for which a launch only compiles."""
CAPABILITY = 8, 0
"""Lowest compute capability for which the kernels are compiled in the tests."""


def problem() -> DisScaleError | None:
    """Return the reason why the kernels cannot run on this machine's GPUs, or None.

    Triton's launcher is C code that it compiles at the first launch.
    """
    if torch.version.hip:  # a warp of 64 threads holds each channel twice, which races
        reason = "an NVIDIA GPU, got PyTorch for ROCm"
    elif not torch.cuda.is_available():
        reason = "a GPU, and PyTorch finds none"
    elif (oldest := min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))) < CAPABILITY:
        reason = f"compute capability {_dotted(CAPABILITY)} or newer, got {_dotted(oldest)}"
    elif not compiler():
        reason = "a C compiler for its launcher: install gcc, or set CC"
    elif not (header := Path(sysconfig.get_paths(_scheme())["include"]) / "Python.h").exists():
        reason = f"Python's headers for its launcher, and there is no {header}: install python3-dev"
    else:
        return None
    return UserError(f"the triton scan needs {reason}; or set the backend to chunked")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def compiler() -> str | None:
    """Return the C compiler that Triton uses, or None."""
    return shutil.which(os.environ["CC"]) if "CC" in os.environ else shutil.which("gcc") or shutil.which("clang")


def _scheme() -> str:
    """The installation scheme whose headers Triton includes: not Debian's local one."""
    return sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")


class Operands(NamedTuple):
    """One direction's inputs as the kernels take them; BC is B and C in the layout of `_by_state`."""

    u: Tensor
    delta: Tensor
    A: Tensor
    BC: Tensor
    D: Tensor
    bias: Tensor


def _kind(reverse: bool, z: Tensor | None, directions: Sequence[Direction], fill: Filling) -> ScanKind:
    first, (B, L, E) = directions[0], directions[0].u_BLE.shape
    return ScanKind(
        first.u_BLE.device, tuple([x.dtype for direction in directions for x in direction]), B, L, E, first.A_EN.shape[1],
        tuple([(x.u_BLE.stride(1), x.delta_BLE.stride(1)) for x in directions]),
        tuple([x.stride(1) for direction in directions for x in direction[3:5]]), first.A_EN.stride(),
        None if z is None else (z.dtype, z.stride(1)), reverse, fill,
    )  # fmt: skip


class _Scan(torch.autograd.Function):
    """`reverse` is the first direction's; a second direction runs the other way. z is the gate of the sum, or None."""

    @staticmethod
    def forward(ctx: Any, reverse: bool, z: Tensor | None, *inputs: Tensor) -> Tensor:
        keep = any(ctx.needs_input_grad) and keeps_states()
        given = list(inputs)
        given[2::7] = alike(inputs[2::7])
        directions = [
            Direction(rowwise(u), rowwise(delta), A, rowwise(B, False), rowwise(C, False), plain(D), plain(bias))
            for u, delta, A, B, C, D, bias in zip(*[iter(given)] * 7, strict=True)
        ]
        with torch.cuda.device_of(inputs[0]):
            out, ctx.kind, operands, kept = run_scan(None if z is None else rowwise(z), directions, keep, reverse)
        # Empty tensors if nothing is kept: a recomputed block must save as many tensors as in its first pass.
        ctx.save_for_backward(z, kept.y, *kept.states, *[x for direction in operands for x in direction])
        return out

    @staticmethod
    @differentiable_once("triton scan")
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        z, y, *saved = ctx.saved_tensors
        count = len(saved) // 7
        states, saved = saved[:count], saved[count:]
        # A hook on saved tensors may have returned copies of them, with other strides than in the forward pass.
        saved[2::6] = alike(saved[2::6])
        operands = [
            Operands(rowwise(u), rowwise(delta), A, plain(BC), plain(D), plain(bias))
            for u, delta, A, BC, D, bias in zip(*[iter(saved)] * 6, strict=True)
        ]
        with torch.cuda.device_of(dy):
            z, dz = None if z is None else rowwise(z), None if z is None else empty_like(z)
            into = [_new_gradients(x, ctx.kind.types[7 * i + 3 : 7 * i + 5]) for i, x in enumerate(operands)]
            run_scan_backward(ctx.kind, BackwardPass(z, operands, rowwise(dy), KeptStates(states, y), dz, into))
        return None, dz, *[x for memory, *others in into for x in (*memory, *others)]


def _new_gradients(x: Operands, types: Sequence[torch.dtype]) -> ScanGradients:
    """Memory for a direction's gradients; `types` are those of B and C."""
    (B, L, _), N = x.u.shape, x.A.shape[1]
    dB, dC = (x.BC.new_empty(B, L, N, dtype=dtype) for dtype in types)
    memory = Gradients(empty_like(x.u), empty_like(x.delta))
    return ScanGradients(memory, torch.empty_like(x.A), dB, dC, torch.empty_like(x.D), torch.empty_like(x.bias))


def _filling(inputs: Sequence[Direction]) -> Filling:
    u_BLE, N = inputs[0].u_BLE, inputs[0].A_EN.shape[1]
    B, L, E = u_BLE.shape
    return filling_on(u_BLE.device, B, L, E, N, len(inputs))


def run_scan(
    z: Tensor | None, directions: Sequence[Direction], keep: bool, reverse: bool = False
) -> tuple[Tensor, ScanKind, list[Operands], KeptStates]:
    """Launch a forward pass for tensors as the kernels take them. `keep` stores the states for the backward pass."""
    kind = _kind(reverse, z, directions, _filling(directions))
    launches = numbers.scan_forward(kind, keep)
    if kind.device.type == "cuda" and launches.by_state.is_new:
        compile_together(lambda: compile_forward(kind, z, directions, keep))
    out, operands, kept = _forward(launches, kind, z, directions, keep)
    return out, kind, operands, kept


class BackwardPass(NamedTuple):
    """The tensors of a scan's backward pass as the kernels take them; `into` and dz are written."""

    z: Tensor | None
    operands: list[Operands]
    dy: Tensor
    kept: KeptStates
    dz: Tensor | None
    into: list[ScanGradients]

    def launches(self, kind: ScanKind) -> ScanBackward:
        dz_row = (self.dy if self.dz is None else self.dz).stride(1)
        return numbers.scan_backward(kind, self.kept.any, self.dy.stride(1), dz_row, self.into[0].dB.stride(1))


def run_scan_backward(kind: ScanKind, given: BackwardPass) -> None:
    """Launch a backward pass. For a recomputed block, `kind` is from the first forward pass and `kept` from the second."""
    rows, z = tuple([(x.u.stride(1), x.delta.stride(1)) for x in given.operands]), given.z
    kind = kind._replace(rows=rows, A=given.operands[0].A.stride(), z=None if z is None else (z.dtype, z.stride(1)))
    launches = given.launches(kind)
    if given.dy.is_cuda and launches.sums[0].is_new:
        meta, empty = kind._replace(device=META), without_memory(given)
        compile_together(lambda: _backward(empty.launches(meta), meta, empty))
    _backward(launches, kind, given)


def compile_forward(kind: ScanKind, z: Tensor | None, directions: Sequence[Direction], keep: bool) -> None:
    """Compile all kernels of a forward pass."""
    kind = kind._replace(device=META)
    _forward(numbers.scan_forward(kind, keep), kind, *without_memory((z, directions)), keep)


def _forward(
    launches: ScanForward, kind: ScanKind, z: Tensor | None, directions: Sequence[Direction], keep: bool
) -> tuple[Tensor, list[Operands], KeptStates]:
    operands = [
        Operands(x.u_BLE, x.delta_BLE, x.A_EN, BC, x.D_E, x.delta_bias_E)
        for x, BC in zip(directions, _by_state(launches.by_state, kind, directions), strict=True)
    ]
    out, gate = empty_like(directions[0].u_BLE), directions[0].u_BLE if z is None else z
    y, none = empty_like(out, torch.float32) if len(directions) == 2 else out, out.new_empty(0)
    kept = KeptStates(
        [new_states(x.u, kind.N) if keep else none for x in operands], empty_like(out) if keep and z is not None else none
    )
    kept_y = kept.y if kept.y.numel() else out
    for launch, one, states in zip(launches.scans, operands, kept.states, strict=True):
        unused = states if keep else y  # a pointer of the type that the kernel would store
        launch(one, gate, gate, out, (y, y), (unused, unused), kept_y)
    return out, operands, kept


def _by_state(launch: Launch, kind: ScanKind, directions: Sequence[Direction]) -> list[Tensor]:
    """Return B and C of each direction as (B, 2, L / 4, N, 4) in float32, padded with zeros to complete chunks. One load takes
    four steps of a state. States that a channel's lanes compute at the same time are neighbours in memory."""
    shape = kind.B, 2, padded(kind.L) // 4, kind.N, 4
    outs = [directions[0].u_BLE.new_empty(shape, dtype=torch.float32) for _ in directions]
    launch(*directions[0][3:5], *directions[-1][3:5], tuple(outs))
    return outs


def _backward(launches: ScanBackward, kind: ScanKind, given: BackwardPass) -> None:
    z, directions, dy, kept, dz, into = given
    gate, out, memories = dy if z is None else z, dy if dz is None else dz, [x.memory for x in into]
    if kept.any:
        states = [(x, x) for x in kept.states]
    else:
        states = _repeat_forward(launches.repeat, gate, directions, dy, out, memories)
    kept_y, count = kept.y if kept.y.numel() else dy, len(directions) // len(launches.scans)
    parts = [new_parts(x.BC, kind.N, kind.E, launches.scans[0].grid[0]) for x in directions[:count]]
    for i, launch in enumerate(launches.scans):
        some = slice(i * count, i * count + count)
        launch(
            tuple(directions[some]), gate, dy, tuple(states[some]), tuple([x.warp_sums for x in parts]), tuple(memories[some]),
            tuple([x.dBC for x in parts]), tuple([x.parameters for x in parts]), kept_y, out,
        )  # fmt: skip
        for part, sums, (_, *gradients) in zip(parts, launches.sums[some], into[some], strict=True):
            sums(part.dBC, part.parameters, *gradients)


def _repeat_forward(
    launches: Sequence[Launch], gate: Tensor, directions: Sequence[Operands], dy: Tensor, out: Tensor,
    memories: Sequence[Gradients],
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Store the states of each direction in the memory of its gradients. The first direction stores its output in the memory of
    the last direction's gradients; the last direction reads it there and writes dz."""
    states = [memory.state_buffer(x.A.shape[1]) for x, memory in zip(directions, memories, strict=True)]
    for launch, operands, pair in zip(launches, directions, states, strict=True):
        launch(operands, gate, dy, out, memories[-1].halves(), pair, out)
    return states


class _Conv(torch.autograd.Function):
    """Forward direction with the first weight and bias, backward direction with the second; None skips a direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        x, given = rowwise(x), _plain_weights(weights)
        ctx.save_for_backward(x, *given)
        outs = [None if weight is None else empty_like(x) for weight in given[::2]]
        with torch.cuda.device_of(x):
            run_conv(x, given, outs)
        return tuple(outs)

    @staticmethod
    @differentiable_once("triton scan")
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        x, weights = rowwise(x), _plain_weights(weights)
        given, dx = [x if dy is None else rowwise(dy) for dy in dys], empty_like(x)
        gradients = [None if w is None else torch.empty_like(w) for w in weights]
        with torch.cuda.device_of(x):
            run_conv_backward(x, weights, given, dx, gradients)
        return dx, *gradients


def _plain_weights(weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Weights and biases as the kernels take them, of each direction or None."""
    matrices = iter(alike([w for w in weights[::2] if w is not None]))
    biases = [None if bias is None else plain(bias) for bias in weights[1::2]]
    return [x for bias in biases for x in (None if bias is None else next(matrices), bias)]


def run_conv(x: Tensor, weights: Sequence[Tensor | None], outs: Sequence[Tensor | None], ahead: int = 0) -> None:
    """Launch a forward pass for tensors as the kernels take them; None for a skipped direction. If only the first direction is
    computed, its outputs may read `ahead` later steps, and as many fewer earlier ones."""
    numbers.conv_forward(_conv_kind(x, weights, ahead))(x, _both(weights[::2]), _both(weights[1::2]), _both(outs))


def run_conv_backward(
    x: Tensor,
    weights: Sequence[Tensor | None],
    dys: Sequence[Tensor],
    dx: Tensor,
    gradients: Sequence[Tensor | None],
    ahead: int = 0,
) -> None:
    """Launch a backward pass. The gradients of the weights have the weights' strides."""
    kind, rows = _conv_kind(x, weights, ahead), [each.stride(1) for each in (*dys, dx)]
    launches = numbers.conv_backward(kind, *rows)
    given = x, weights, dys, dx, gradients
    if x.is_cuda and launches.sums.is_new:  # both kernels; the forward pass has only one
        meta, empty = kind._replace(device=META), without_memory(given)
        compile_together(lambda: _conv_backward(numbers.conv_backward(meta, *rows), meta, *empty))
    _conv_backward(launches, kind, *given)


def _conv_kind(x: Tensor, weights: Sequence[Tensor | None], ahead: int) -> ConvKind:
    assert not ahead or weights[2] is None, "only a direction that is alone looks ahead"
    (B, L, E), weight = x.shape, next(w for w in weights if w is not None)
    types = tuple([None if w is None else w.dtype for w in (x, *weights)])
    return ConvKind(x.device, types, B, L, E, weight.shape[1], x.stride(1), weight.stride(), ahead)


def _conv_backward(
    launches: ConvBackward,
    kind: ConvKind,
    x: Tensor,
    weights: Sequence[Tensor | None],
    dys: Sequence[Tensor],
    dx: Tensor,
    gradients: Sequence[Tensor | None],
) -> None:
    shape = kind.parts, kind.taps + 1, kind.E
    sums = tuple([x.new_empty(shape, dtype=torch.float32) for w in weights[::2] if w is not None])
    launches.conv(x, _both(weights[::2]), _both(weights[1::2]), tuple(dys), dx, _both(sums))
    dweights, dbiases = (tuple([g for g in gradients[i::2] if g is not None]) for i in range(2))
    launches.sums(sums, dweights, dbiases)


def _both(tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Return a tensor for each direction. A skipped direction gets the other direction's tensor, which is then never used."""
    present = [x for x in tensors if x is not None]
    return present[0], present[-1]


def _selective_scan(direction: Direction, reverse: bool) -> Tensor:
    refuse_float64("triton", *direction)
    y_BLE: Tensor = _Scan.apply(reverse, None, *direction)
    return y_BLE


def _two_way_scan(forward: Direction, backward: Direction, z_BLE: Tensor | None) -> Tensor:
    refuse_float64("triton", *forward, *backward, z_BLE)
    y_BLE: Tensor = _Scan.apply(False, z_BLE, *forward, *backward)
    return y_BLE


def _causal_conv_silu(x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, reverse: bool) -> Tensor:
    refuse_float64("triton", x_BLE, weight_EW, bias_E)
    weights = (None, None, weight_EW, bias_E) if reverse else (weight_EW, bias_E, None, None)
    y_BLE: Tensor = _Conv.apply(x_BLE, *weights)[int(reverse)]
    return y_BLE


def _two_way_conv_silu(x_BLE: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    refuse_float64("triton", x_BLE, *weights)
    both_BLE: tuple[Tensor, Tensor] = _Conv.apply(x_BLE, *weights)
    return both_BLE


backend = Backend(_selective_scan, _two_way_scan, _causal_conv_silu, _two_way_conv_silu)
