"""The Triton backend for NVIDIA GPUs: the two-way scan and the two-way convolution.

It takes float16, bfloat16 and float32, and refuses float64. The state is float32; outputs are rounded once. The last axis of
an input must be contiguous and its batch rows evenly spaced, as in chunks and splits of a product; anything else costs a
copy. Nothing is added atomically: partial gradients of B and C (over groups of channels) and of the parameters (over batch
rows) are stored in a buffer and then summed, so every run gives the same bits. `TRITON_INTERPRET=1`, set before Triton is
imported, runs everything on the CPU, slowly.

A scan's first kernel brings B and C into the layout of the others. Then there is one kernel per direction. The first
direction stores its y in float32; the second adds its own, applies the gate and writes the output, so nothing is flipped. The
forward pass keeps only its inputs, and B and C in the new layout. The backward pass repeats the scan and stores the states of
every 16th step in the memory where the gradients of u and delta will be written later, so it needs almost no memory of its
own. Where a block is recomputed for its own backward pass (`KeepingStates`), the forward pass stores the states, and y before
the gate, so that nothing is repeated: a block's memory, and only for this block. Then the backward pass computes the gradients of
each direction separately. Each direction computes y's gradient before the gate again:
storing it would move as many bytes as reading z and dy again, in bf16 twice as many. The values before SiLU of the convolution
are computed again too.

Axes: B batch, L time, E channels, N states, W taps of the convolution. Read next: triton_tiles.py, triton_launch.py.
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

from dis_scale.errors import DisScaleError, UserError
from dis_scale.scan import triton_backward, triton_conv, triton_layout, triton_scan
from dis_scale.scan.backend import Backend, Direction, keeps_states
from dis_scale.scan.triton_fill import FULL, Filling, filling
from dis_scale.scan.triton_launch import (
    CHUNK,
    LANES,
    WARPS,
    ceil_div,
    compile_once,
    grid,
    launch,
    multiprocessors,
    next_power_of_2,
    rowwise,
    without_memory,
)
from dis_scale.scan.triton_memory import Gradients, KeptStates, Parts, new_states, state_rows

ROWS = 16
"""Steps that a thread of the convolution computes at a time, limited by registers: the halo of a group is computed twice."""
SEGMENT = 6 * ROWS
"""Steps of a program of the convolution's backward pass, which has one part of the weights' gradients per segment."""
STEPS, SIZE = 32, 256
"""Steps, and numbers, of a program of triton_layout.py."""
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
    """One direction's inputs: six as the kernels take them, of which BC is B and C in the layout of `_by_state`; B and C."""

    u: Tensor
    delta: Tensor
    A: Tensor
    BC: Tensor
    D: Tensor
    bias: Tensor
    B: Tensor
    C: Tensor

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        return self[:6]

    def constants(self, reverse: bool, z: Tensor, dy: Tensor, lanes: int) -> dict[str, Any]:
        (_, L, E), N = self.u.shape, self.A.shape[1]
        rows = {"z_row": z.stride(1), "dy_row": dy.stride(1)}
        tile = {"LANES": LANES, "WARPS": WARPS, "SPLIT": lanes, "CHUNK": CHUNK, "num_warps": WARPS}
        return {"E": E, "L": L, "N": N, "REVERSE": reverse, **rows, **tile}

    def parts(self, lanes: int) -> Parts:
        return Parts(self.u, self.BC, self.A.shape[1], lanes)


def _operands(reverse: bool, inputs: Sequence[Tensor]) -> list[_Operands]:
    """The operands of each direction, whose inputs follow each other."""
    directions = [Direction(*inputs[i : i + 7]) for i in range(0, len(inputs), 7)]
    return [
        _Operands(rowwise(u), rowwise(delta), A.contiguous(), BC, D.contiguous(), bias.contiguous(), B, C)
        for (u, delta, A, B, C, D, bias), BC in zip(directions, _by_state(reverse, directions), strict=True)
    ]


def _by_state(reverse: bool, directions: Sequence[Direction]) -> list[Tensor]:
    """B and C of each direction as (B, 2, L / 4, N, 4) in float32, padded with zeros to complete chunks: a load takes four
    steps of a state, and those of the states that a channel's lanes compute at a time are neighbours."""
    both = tuple(rowwise(x) for direction in directions for x in (direction.B_BLN, direction.C_BLN))
    (_, B, _), (L, N) = grid(both[0]), both[0].shape[1:]
    length = ceil_div(L, CHUNK) * CHUNK
    outs = [both[0].new_empty(B, 2, length // 4, N, 4, dtype=torch.float32) for _ in directions]
    launch(
        triton_layout.by_state, (ceil_div(length, STEPS), B, len(both)), both, tuple(outs),
        rows=tuple([x.stride(1) for x in both]), L=L, N=N, LENGTH=length, REVERSE=reverse,
        STATES=next_power_of_2(N), SIZE=STEPS,
    )  # fmt: skip
    return outs


class _Scan(torch.autograd.Function):
    """`reverse` is the first direction's; a second direction runs the other way. z is the gate of the sum, or None."""

    @staticmethod
    def forward(ctx: Any, reverse: bool, z: Tensor | None, *inputs: Tensor) -> Tensor:
        gradients = any(ctx.needs_input_grad)
        keep = gradients and keeps_states()
        fill = _filling(inputs)
        if inputs[0].is_cuda:
            key = ("scan", inputs[2].shape[1], len(inputs), reverse, z is None, gradients, keep, fill)
            compile_once(inputs[0], key, lambda: launch_scan(reverse, z, inputs, gradients, keep, fill))
        operands = _operands(reverse, inputs)
        out, kept = _forward(reverse, z, operands, keep, fill)
        ctx.reverse, ctx.fill = reverse, fill
        # Without memory if nothing is kept: a recomputed block must save as many tensors as it did at first.
        ctx.save_for_backward(z, kept.y, *kept.states, *[x for direction in operands for x in direction])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        z, y, *saved = ctx.saved_tensors
        count = len(saved) // 9
        operands = [_Operands(*saved[i : i + 8]) for i in range(count, len(saved), 8)]
        return None, *_backward(ctx.reverse, z, operands, dy, KeptStates(saved[:count], y), ctx.fill)


def _filling(inputs: Sequence[Tensor]) -> Filling:
    """The way to fill this GPU. The interpreter has no multiprocessors."""
    u, A = inputs[0], inputs[2]
    if not u.is_cuda:
        return FULL
    groups, B, _ = grid(u)
    return filling(groups * B, A.shape[1], len(inputs) // 7, multiprocessors(u.device))


def launch_scan(
    reverse: bool, z: Tensor | None, inputs: Sequence[Tensor], gradients: bool, keep: bool, fill: Filling
) -> None:
    """Launch all kernels of a scan for tensors without memory."""
    gate, empty = None if z is None else without_memory(z), [without_memory(x) for x in inputs]
    operands = _operands(reverse, empty)
    out, kept = _forward(reverse, gate, operands, keep, fill)
    if gradients:
        _backward(reverse, gate, operands, out, kept, fill)


def _forward(
    reverse: bool, z: Tensor | None, directions: Sequence[_Operands], keep: bool, fill: Filling
) -> tuple[Tensor, KeptStates]:
    out, gate = _empty_like(directions[0].u), directions[0].u if z is None else rowwise(z)
    y, none = _empty_like(out, torch.float32) if len(directions) == 2 else out, out.new_empty(0)
    kept = KeptStates(
        [new_states(operands.u, operands.A.shape[1]) if keep else none for operands in directions],
        _empty_like(out) if keep and z is not None else none,
    )
    for i, (operands, states) in enumerate(zip(directions, kept.states, strict=True)):
        unused = states if keep else y  # a pointer of the type that the kernel would store
        _scan_forward(
            operands, gate, gate, out, (y, y), (unused, unused), kept.y if kept.y.numel() else out,
            operands.constants(reverse != bool(i), gate, gate, fill.forward)
            | {"FIRST": i + 1 < len(directions), "SECOND": i > 0, "GATED": z is not None, "FOR_BACKWARD": False, "KEEP": keep},
        )  # fmt: skip
    return out, kept


def _scan_forward(
    operands: _Operands, z: Tensor, dy: Tensor, out: Tensor, y: tuple[Tensor, Tensor], states: tuple[Tensor, Tensor],
    kept_y: Tensor, constants: dict[str, Any],
) -> None:  # fmt: skip
    launch(
        triton_scan.scan_forward, grid(dy, lanes=constants["SPLIT"]), operands.pointers, z, dy, out, y, states, kept_y,
        **constants, u_row=operands.u.stride(1), delta_row=operands.delta.stride(1),
        STATE_ROWS=state_rows(operands.A.shape[1]),
    )  # fmt: skip


def _backward(
    reverse: bool, z: Tensor | None, directions: Sequence[_Operands], dy: Tensor, kept: KeptStates, fill: Filling
) -> list[Tensor | None]:
    """The gradients of z and of the inputs."""
    dy, dz = rowwise(dy), None if z is None else _empty_like(z)
    z = None if z is None else rowwise(z)
    memories = [Gradients(_empty_like(operands.u), _empty_like(operands.delta)) for operands in directions]
    states, kept_y = [_both([x]) for x in kept.states], kept.y if kept.y.numel() else None
    if not kept.states[0].numel():
        states = _repeat_forward(reverse, z, directions, dy, dz, memories, fill)
    both, shared = fill.both and len(directions) == 2, directions[0].parts(fill.backward)
    parts = [shared, directions[1].parts(fill.backward)] if both else [shared] * len(directions)
    gradients: list[Tensor | None] = [dz]
    for ways in [slice(None)] if both else [slice(i, i + 1) for i in range(len(directions))]:
        last = ways.stop in (None, len(directions))
        _scan_backward(
            reverse != bool(ways.start), z, directions[ways], dy, dz, states[ways], memories[ways], parts[ways],
            kept_y if last else None, fill.backward,
        )  # fmt: skip
        for i in range(len(directions))[ways]:
            gradients += [*memories[i], *_sum_parts(directions[i], parts[i], reverse != bool(i))]
    return gradients


def _repeat_forward(
    reverse: bool, z: Tensor | None, directions: Sequence[_Operands], dy: Tensor, dz: Tensor | None,
    memories: Sequence[Gradients], fill: Filling,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Store the states of each direction in the memory of its gradients. The first direction stores its output in that of
    the last one's gradients, which reads it there and writes dz."""
    gate, out, states = dy if z is None else z, dy if dz is None else dz, list[tuple[Tensor, Tensor]]()
    for i, (operands, memory) in enumerate(zip(directions, memories, strict=True)):
        states.append(memory.state_buffer(operands.A.shape[1]))
        order = {"FIRST": dz is not None and i + 1 < len(directions), "SECOND": dz is not None and i > 0}
        flags = order | {"GATED": z is not None, "FOR_BACKWARD": True, "KEEP": False}
        constants = operands.constants(reverse != bool(i), gate, dy, fill.forward) | flags
        _scan_forward(operands, gate, dy, out, memories[-1].halves(), states[-1], out, constants)
    return states


def _scan_backward(
    reverse: bool, z: Tensor | None, directions: Sequence[_Operands], dy: Tensor, dz: Tensor | None,
    states: Sequence[tuple[Tensor, Tensor]], memories: Sequence[Gradients], parts: Sequence[Parts],
    kept_y: Tensor | None, lanes: int,
) -> None:  # fmt: skip
    """Compute the gradients of one direction or both, and dz if y before the gate was kept. The memory of the gradients may
    hold the states until they are written."""
    N, gate = directions[0].A.shape[1], dy if z is None else z
    programs, B, _ = grid(dy, lanes=lanes)
    inputs, gradients, warp_sums, dBCs, parameters, u_rows, delta_rows = zip(
        *[
            (x.pointers, tuple(memory), part.warp_sums, part.dBC, part.parameters, x.u.stride(1), x.delta.stride(1))
            for x, memory, part in zip(directions, memories, parts, strict=True)
        ],
        strict=True,
    )
    launch(
        triton_backward.scan_backward, (programs, B, len(directions)), inputs, gate, dy, tuple(states), warp_sums,
        gradients, dBCs, parameters, dy if kept_y is None else kept_y, dy if dz is None else dz,
        **directions[0].constants(reverse, gate, dy, lanes), u_rows=u_rows, delta_rows=delta_rows, GATED=z is not None,
        GATE_GRADIENT=kept_y is not None, PRODUCTS=_sums_by_products(directions), STATE_ROWS=state_rows(N),
        STATES=next_power_of_2(N),
    )  # fmt: skip


def _sums_by_products(directions: Sequence[_Operands]) -> bool:
    """Whether tensor cores sum the gradients of B and C over channels: they truncate each term to 11 bits, and bfloat16 has 8.

    Not on a CPU: the interpreter has none.
    """
    return all(not x.B.is_cpu and x.B.dtype == x.C.dtype == torch.bfloat16 for x in directions)


def _sum_parts(operands: _Operands, parts: Parts, reverse: bool) -> list[Tensor]:
    """The gradients of A, B, C, D and the bias."""
    gradients = [_empty_like(x) for x in (operands.A, operands.B, operands.C, operands.D, operands.bias)]
    programs, N, size = len(parts.dBC), operands.A.shape[1], operands.BC.numel()
    B, L, E = operands.u.shape
    blocks = ceil_div(max(size, (N + 2) * E), SIZE)
    launch(
        triton_layout.sum_scan, (blocks, 2, 1), parts.dBC, parts.parameters, *gradients,
        batch=B, E=E, L=L, N=N, LENGTH=size // (2 * B * N), REVERSE=reverse, PARTS=programs, SIZE=SIZE,
    )  # fmt: skip
    return gradients


class _Conv(torch.autograd.Function):
    """Forward direction with the first weight and bias, backward direction with the second; None skips a direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        x = rowwise(x)
        if x.is_cuda:
            gradients, both = any(ctx.needs_input_grad), [w is None for w in weights]
            compile_once(x, ("conv", *both, gradients), lambda: launch_conv(x, weights, gradients))
        ctx.save_for_backward(x, *weights)
        return tuple(_conv_forward(x, weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        return tuple(_conv_backward(x, weights, dys))


def launch_conv(x: Tensor, weights: Sequence[Tensor | None], gradients: bool) -> None:
    """Launch all kernels of a convolution for tensors without memory."""
    empty, without = without_memory(x), [None if w is None else without_memory(w) for w in weights]
    outs = _conv_forward(empty, without)
    if gradients:
        _conv_backward(empty, without, outs)


def _conv_forward(x: Tensor, weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The outputs of both directions; None for a skipped one."""
    outs = [None if weight is None else _empty_like(x) for weight in weights[::2]]
    launch(
        triton_conv.conv_forward, grid(x, ROWS), x, *_conv_pointers(weights), _both(outs), x_row=x.stride(1),
        **_conv_constants(x, weights),
    )  # fmt: skip
    return outs


def _conv_backward(x: Tensor, weights: Sequence[Tensor | None], dys: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of the input, and of each direction's weight and bias."""
    programs, constants = grid(x, SEGMENT), _conv_constants(x, weights)
    _, B, segments = programs
    E, taps = constants["E"], constants["TAPS"]
    dx, rows = _empty_like(x), tuple(x if dy is None else rowwise(dy) for dy in dys)
    sums = tuple(x.new_empty(B * segments, taps + 1, E, dtype=torch.float32) for w in weights[::2] if w is not None)
    launch(
        triton_conv.conv_backward, programs, x, *_conv_pointers(weights), rows, dx, _both(sums),
        x_row=x.stride(1), dy0_row=rows[0].stride(1), dy1_row=rows[1].stride(1), **constants, SEGMENT=SEGMENT,
    )  # fmt: skip
    gradients = [None if w is None else _empty_like(w) for w in weights]
    dweights, dbiases = (tuple(g for g in gradients[i::2] if g is not None) for i in range(2))
    launch(
        triton_layout.sum_conv, (ceil_div((taps + 1) * E, SIZE), len(sums), 1), sums, dweights, dbiases,
        parts=B * segments, E=E, TAPS=taps, SIZE=SIZE,
    )  # fmt: skip
    return [dx, *gradients]


def _both(tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """A tensor for each direction. The other direction's takes the place of a skipped one's, which is never used."""
    present = [x for x in tensors if x is not None]
    return present[0], present[-1]


def _conv_constants(x: Tensor, weights: Sequence[Tensor | None]) -> dict[str, int]:
    (_, L, E), taps = x.shape, next(w.shape[1] for w in weights[::2] if w is not None)
    sizes = {"E": E, "L": L, "TAPS": taps, "ROWS": ROWS, "LANES": LANES * WARPS, "num_warps": WARPS}
    return sizes | {"FORWARD": weights[0] is not None, "BACKWARD": weights[2] is not None}


def _conv_pointers(weights: Sequence[Tensor | None]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Both weights, and both biases."""
    contiguous = [None if w is None else w.contiguous() for w in weights]
    return _both(contiguous[::2]), _both(contiguous[1::2])


def _refuse_float64(*tensors: Tensor | None) -> None:
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            raise UserError("the triton scan computes in float32, got float64: convert, or set the backend to chunked")


def _selective_scan(direction: Direction, reverse: bool) -> Tensor:
    _refuse_float64(*direction)
    return _Scan.apply(reverse, None, *direction)


def _two_way_scan(forward: Direction, backward: Direction, z_BLE: Tensor | None) -> Tensor:
    _refuse_float64(*forward, *backward, z_BLE)
    return _Scan.apply(False, z_BLE, *forward, *backward)


def _causal_conv_silu(x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, reverse: bool) -> Tensor:
    _refuse_float64(x_BLE, weight_EW, bias_E)
    weights = (None, None, weight_EW, bias_E) if reverse else (weight_EW, bias_E, None, None)
    return _Conv.apply(x_BLE, *weights)[int(reverse)]


def _two_way_conv_silu(x_BLE: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    _refuse_float64(x_BLE, *weights)
    return _Conv.apply(x_BLE, *weights)


backend = Backend(_selective_scan, _two_way_scan, _causal_conv_silu, _two_way_conv_silu)
