"""The Triton backend for NVIDIA GPUs: the two-way scan and the two-way convolution.

It takes float16, bfloat16 and float32, and refuses float64. The state is float32; outputs are rounded once. The last axis
of an input must be contiguous, its batch rows evenly spaced, as in chunks and splits of a product, and its first number at
a multiple of 16 bytes (not for B and C); anything else costs a copy. Nothing is added atomically: partial gradients of B
and C (over groups of channels) and of the parameters (over batch rows) are stored in a buffer and then summed, so every run
gives the same bits. `TRITON_INTERPRET=1`, set before Triton is imported, runs everything on the CPU, slowly.

A scan's first kernel brings B and C into the layout of the others. Then there is one kernel per direction. The first
direction stores its y in float32; the second adds its own, applies the gate and writes the output, so nothing is flipped.
The forward pass keeps only its inputs, and B and C in the new layout. The backward pass repeats the scan and stores the
states of every 16th step in the memory where the gradients of u and delta will be written later, so it needs almost no
memory of its own. Where a block is recomputed for its own backward pass, or memory is left for all (`KeepingStates`), the
forward pass stores the states, and y before the gate, so that nothing is repeated. Then the backward
pass computes the gradients of each direction separately. Each direction computes y's gradient before the gate again:
storing it would move as many bytes as reading z and dy again, in bf16 twice as many. The values before SiLU of the
convolution are computed again too.

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
from torch.autograd.function import once_differentiable

from dis_scale.process.errors import DisScaleError, UserError
from dis_scale.scan import triton_numbers as numbers
from dis_scale.scan.backend import Backend, Direction, keeps_states
from dis_scale.scan.triton_fill import Filling
from dis_scale.scan.triton_launch import (
    Launch,
    compile_together,
    filling_on,
    padded,
    plain,
    rowwise,
    without_memory,
)
from dis_scale.scan.triton_memory import Gradients, KeptStates, Parts, new_parts, new_states
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
    """The compiler that Triton takes."""
    return shutil.which(os.environ["CC"]) if "CC" in os.environ else shutil.which("gcc") or shutil.which("clang")


def _scheme() -> str:
    """The installation scheme whose headers Triton includes: not Debian's local one."""
    return sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")


def _empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


class _Operands(NamedTuple):
    """One direction's inputs as the kernels take them; BC is B and C in the layout of `_by_state`."""

    u: Tensor
    delta: Tensor
    A: Tensor
    BC: Tensor
    D: Tensor
    bias: Tensor


def _kind(reverse: bool, z: Tensor | None, inputs: Sequence[Tensor], fill: Filling) -> tuple[ScanKind, list[Direction]]:
    """The inputs of each direction, which follow each other, as the kernels take them."""
    directions = [
        Direction(rowwise(u), rowwise(delta), plain(A), rowwise(B, False), rowwise(C, False), plain(D), plain(bias))
        for u, delta, A, B, C, D, bias in zip(*[iter(inputs)] * 7, strict=True)
    ]
    u, (B, L, E), N = directions[0].u_BLE, directions[0].u_BLE.shape, directions[0].A_EN.shape[1]
    kind = ScanKind(
        u.device, tuple([None if x is None else x.dtype for x in (*inputs, z)]), B, L, E, N,
        tuple([(x.u_BLE.stride(1), x.delta_BLE.stride(1)) for x in directions]),
        tuple([x.stride(1) for direction in directions for x in direction[3:5]]),
        None if z is None else z.stride(1), reverse, fill,
    )  # fmt: skip
    return kind, directions


class _Scan(torch.autograd.Function):
    """`reverse` is the first direction's; a second direction runs the other way. z is the gate of the sum, or None."""

    @staticmethod
    def forward(ctx: Any, reverse: bool, z: Tensor | None, *inputs: Tensor) -> Tensor:
        keep = any(ctx.needs_input_grad) and keeps_states()
        with torch.cuda.device_of(inputs[0]):
            gate = None if z is None else rowwise(z)
            kind, directions = _kind(reverse, gate, inputs, _filling(inputs))
            launches = numbers.scan_forward(kind, keep)
            if kind.device.type == "cuda" and launches.by_state.is_new:
                compile_together(lambda: compile_forward(kind, gate, directions, keep))
            out, operands, kept = _forward(launches, kind, gate, directions, keep)
        ctx.kind = kind
        # Without memory if nothing is kept: a recomputed block must save as many tensors as it did at first.
        ctx.save_for_backward(z, kept.y, *kept.states, *[x for direction in operands for x in direction])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        z, y, *saved = ctx.saved_tensors
        count = len(saved) // 7
        # A hook on saved tensors may have returned copies of them, with other strides than in the forward pass.
        operands = [
            _Operands(rowwise(u), rowwise(delta), *map(plain, others))
            for u, delta, *others in zip(*[iter(saved[count:])] * 6, strict=True)
        ]
        with torch.cuda.device_of(dy):
            z, dy, kept = None if z is None else rowwise(z), rowwise(dy), KeptStates(saved[:count], y)
            rows = tuple([(x.u.stride(1), x.delta.stride(1)) for x in operands])
            kind = ctx.kind._replace(rows=rows, z_row=None if z is None else z.stride(1))
            launches = numbers.scan_backward(kind, kept.any, dy.stride(1))
            if dy.is_cuda and launches.sums[0].is_new:
                compile_together(lambda: compile_backward(kind, z, operands, dy, kept))
            return None, *_backward(launches, kind, z, operands, dy, kept)


def _filling(inputs: Sequence[Tensor]) -> Filling:
    (B, L, E), N = inputs[0].shape, inputs[2].shape[1]
    return filling_on(inputs[0].device, B, L, E, N, len(inputs) // 7)


def compile_forward(kind: ScanKind, z: Tensor | None, directions: Sequence[Direction], keep: bool) -> None:
    """Compile all kernels of a forward pass."""
    gate, empty = None if z is None else without_memory(z), [Direction(*map(without_memory, x)) for x in directions]
    kind = kind._replace(device=META)
    _forward(numbers.scan_forward(kind, keep), kind, gate, empty, keep)


def compile_backward(
    kind: ScanKind, z: Tensor | None, directions: Sequence[_Operands], dy: Tensor, kept: KeptStates
) -> None:
    """Compile all kernels of a backward pass."""
    gate, empty = None if z is None else without_memory(z), [_Operands(*map(without_memory, x)) for x in directions]
    states = KeptStates([without_memory(x) for x in kept.states], without_memory(kept.y))
    kind = kind._replace(device=META)
    launches = numbers.scan_backward(kind, kept.any, dy.stride(1))
    _backward(launches, kind, gate, empty, without_memory(dy), states)


def _forward(
    launches: ScanForward, kind: ScanKind, z: Tensor | None, directions: Sequence[Direction], keep: bool
) -> tuple[Tensor, list[_Operands], KeptStates]:
    operands = [
        _Operands(x.u_BLE, x.delta_BLE, x.A_EN, BC, x.D_E, x.delta_bias_E)
        for x, BC in zip(directions, _by_state(launches.by_state, kind, directions), strict=True)
    ]
    out, gate = _empty_like(directions[0].u_BLE), directions[0].u_BLE if z is None else z
    y, none = _empty_like(out, torch.float32) if len(directions) == 2 else out, out.new_empty(0)
    kept = KeptStates(
        [new_states(x.u, kind.N) if keep else none for x in operands],
        _empty_like(out) if keep and z is not None else none,
    )
    kept_y = kept.y if kept.y.numel() else out
    for launch, one, states in zip(launches.scans, operands, kept.states, strict=True):
        unused = states if keep else y  # a pointer of the type that the kernel would store
        launch(one, gate, gate, out, (y, y), (unused, unused), kept_y)
    return out, operands, kept


def _by_state(launch: Launch, kind: ScanKind, directions: Sequence[Direction]) -> list[Tensor]:
    """B and C of each direction as (B, 2, L / 4, N, 4) in float32, padded with zeros to complete chunks: a load takes four
    steps of a state, and those of the states that a channel's lanes compute at a time are neighbours."""
    shape = kind.B, 2, padded(kind.L) // 4, kind.N, 4
    outs = [directions[0].u_BLE.new_empty(shape, dtype=torch.float32) for _ in directions]
    launch(*directions[0][3:5], *directions[-1][3:5], tuple(outs))
    return outs


def _backward(
    launches: ScanBackward,
    kind: ScanKind,
    z: Tensor | None,
    directions: Sequence[_Operands],
    dy: Tensor,
    kept: KeptStates,
) -> list[Tensor | None]:
    """The gradients of z and of the inputs. A recomputed block has `kind` from its first forward pass, `kept` from its second."""
    dz = None if z is None else _empty_like(z)
    gate, out = dy if z is None else z, dy if dz is None else dz
    memories = [Gradients(_empty_like(operands.u), _empty_like(operands.delta)) for operands in directions]
    if kept.any:
        states = [(x, x) for x in kept.states]
    else:
        states = _repeat_forward(launches.repeat, gate, directions, dy, out, memories)
    kept_y, count = kept.y if kept.y.numel() else dy, len(directions) // len(launches.scans)
    parts = [new_parts(x.BC, kind.N, kind.E, launches.scans[0].grid[0]) for x in directions[:count]]
    gradients: list[Tensor | None] = [dz]
    for i, launch in enumerate(launches.scans):
        some = slice(i * count, i * count + count)
        launch(
            tuple(directions[some]), gate, dy, tuple(states[some]), tuple([x.warp_sums for x in parts]), tuple(memories[some]),
            tuple([x.dBC for x in parts]), tuple([x.parameters for x in parts]), kept_y, out,
        )  # fmt: skip
        for j, part in enumerate(parts, i * count):
            types = kind.types[7 * j + 3 : 7 * j + 5]
            gradients += [*memories[j], *_sum_parts(launches.sums[j], directions[j], types, part)]
    return gradients


def _repeat_forward(
    launches: Sequence[Launch], gate: Tensor, directions: Sequence[_Operands], dy: Tensor, out: Tensor,
    memories: Sequence[Gradients],
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Store the states of each direction in the memory of its gradients. The first direction stores its output in that of
    the last one's gradients, which reads it there and writes dz."""
    states = [memory.state_buffer(x.A.shape[1]) for x, memory in zip(directions, memories, strict=True)]
    for launch, operands, pair in zip(launches, directions, states, strict=True):
        launch(operands, gate, dy, out, memories[-1].halves(), pair, out)
    return states


def _sum_parts(
    launch: Launch, operands: _Operands, types: Sequence[torch.dtype | None], parts: Parts
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of A, B, C, D and the bias; `types` are those of B and C."""
    (B, L, _), N = operands.u.shape, operands.A.shape[1]
    dB, dC = (operands.BC.new_empty(B, L, N, dtype=dtype) for dtype in types)
    dA, dD, dbias = torch.empty_like(operands.A), torch.empty_like(operands.D), torch.empty_like(operands.bias)
    launch(parts.dBC, parts.parameters, dA, dB, dC, dD, dbias)
    return dA, dB, dC, dD, dbias


class _Conv(torch.autograd.Function):
    """Forward direction with the first weight and bias, backward direction with the second; None skips a direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weights = rowwise(x), tuple([None if w is None else plain(w) for w in weights])
        ctx.save_for_backward(x, *weights)
        with torch.cuda.device_of(x):
            return tuple(_conv_forward(x, weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        x, weights = rowwise(x), [None if w is None else plain(w) for w in weights]
        with torch.cuda.device_of(x):
            kind, given = _conv_kind(x, weights), tuple([x if dy is None else rowwise(dy) for dy in dys])
            launches = numbers.conv_backward(kind, given[0].stride(1), given[1].stride(1))
            if x.is_cuda and launches.sums.is_new:
                compile_together(lambda: compile_conv(kind, x, weights, given))
            return tuple(_conv_backward(launches, kind, x, weights, given))


def compile_conv(kind: ConvKind, x: Tensor, weights: Sequence[Tensor | None], dys: Sequence[Tensor]) -> None:
    """Compile both kernels of a convolution's backward pass; the forward pass has only one."""
    kind, without = kind._replace(device=META), [None if w is None else without_memory(w) for w in weights]
    launches = numbers.conv_backward(kind, dys[0].stride(1), dys[1].stride(1))
    _conv_backward(launches, kind, without_memory(x), without, [without_memory(dy) for dy in dys])


def _conv_kind(x: Tensor, weights: Sequence[Tensor | None]) -> ConvKind:
    (B, L, E), taps = x.shape, next(w.shape[1] for w in weights if w is not None)
    types = tuple([None if w is None else w.dtype for w in (x, *weights)])
    return ConvKind(x.device, types, B, L, E, taps, x.stride(1))


def _conv_forward(x: Tensor, weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The outputs of both directions; None for a skipped one."""
    outs = [None if weight is None else _empty_like(x) for weight in weights[::2]]
    numbers.conv_forward(_conv_kind(x, weights))(x, _both(weights[::2]), _both(weights[1::2]), _both(outs))
    return outs


def _conv_backward(
    launches: ConvBackward, kind: ConvKind, x: Tensor, weights: Sequence[Tensor | None], dys: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of the input, and of each direction's weight and bias."""
    dx, shape = _empty_like(x), (kind.parts, kind.taps + 1, kind.E)
    sums = tuple([x.new_empty(shape, dtype=torch.float32) for w in weights[::2] if w is not None])
    launches.conv(x, _both(weights[::2]), _both(weights[1::2]), tuple(dys), dx, _both(sums))
    gradients = [None if w is None else _empty_like(w) for w in weights]
    dweights, dbiases = (tuple([g for g in gradients[i::2] if g is not None]) for i in range(2))
    launches.sums(sums, dweights, dbiases)
    return [dx, *gradients]


def _both(tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """A tensor for each direction. The other direction's takes the place of a skipped one's, which is never used."""
    present = [x for x in tensors if x is not None]
    return present[0], present[-1]


def _refuse_float64(*tensors: Tensor | None) -> None:
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            raise UserError("the triton scan computes in float32, got float64: convert, or set the backend to chunked")


def _selective_scan(direction: Direction, reverse: bool) -> Tensor:
    _refuse_float64(*direction)
    y_BLE: Tensor = _Scan.apply(reverse, None, *direction)
    return y_BLE


def _two_way_scan(forward: Direction, backward: Direction, z_BLE: Tensor | None) -> Tensor:
    _refuse_float64(*forward, *backward, z_BLE)
    y_BLE: Tensor = _Scan.apply(False, z_BLE, *forward, *backward)
    return y_BLE


def _causal_conv_silu(x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, reverse: bool) -> Tensor:
    _refuse_float64(x_BLE, weight_EW, bias_E)
    weights = (None, None, weight_EW, bias_E) if reverse else (weight_EW, bias_E, None, None)
    y_BLE: Tensor = _Conv.apply(x_BLE, *weights)[int(reverse)]
    return y_BLE


def _two_way_conv_silu(x_BLE: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    _refuse_float64(x_BLE, *weights)
    both_BLE: tuple[Tensor, Tensor] = _Conv.apply(x_BLE, *weights)
    return both_BLE


backend = Backend(_selective_scan, _two_way_scan, _causal_conv_silu, _two_way_conv_silu)
