"""The Triton backend for NVIDIA GPUs: the two-way scan and the two-way convolution.

It takes float16, bfloat16 and float32, and refuses float64. The state is float32; outputs are rounded once. The last axis of
an input must be contiguous and its batch rows evenly spaced, as in chunks and splits of a product; anything else costs a
copy. Nothing is added atomically: partial gradients of B and C (over groups of channels) and of the parameters (over batch
rows) are stored in a buffer and then summed, so every run gives the same bits. `TRITON_INTERPRET=1`, set before Triton is
imported, runs everything on the CPU, slowly.

A two-way scan launches one kernel per direction. The first stores its y in float32; the second adds its own, applies the
gate and writes the output, so nothing is flipped. The forward pass keeps only its inputs. The backward pass repeats the scan
and stores the states of every 16th step in the memory where the gradients of u and delta will be written later, so it needs
almost no memory of its own. Then it computes the gradients of each direction separately. Each direction computes y's
gradient before the gate again: storing it would move as many bytes as reading z and dy again, in bf16 twice as many. The
values before SiLU of the convolution are computed again too.

Axes: B batch, L time, E channels, N states, W taps of the convolution. Read next: triton_scan.py.
"""

import functools
import math
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from dis_scale.errors import DisScaleError, UserError
from dis_scale.scan import triton_conv, triton_scan
from dis_scale.scan.backend import Backend, Direction

LANES = 32
"""Channels per warp, one per thread: a thread reads back only what it wrote itself."""
WARPS = 4
"""Warps of a scan's program; the program sums their parts of B's and C's gradients."""
CHUNK = LANES // 2
"""Steps between stored states, limited by registers. Each step has one lane for B's gradient and one for C's."""
ROWS = 16
"""Steps that a thread of the convolution computes at a time, limited by registers: the halo of a group is computed twice."""
SEGMENT = 6 * ROWS
"""Steps of a program of the convolution's backward pass, which has one part of the weights' gradients per segment."""
CAPABILITY = 8, 0
"""Lowest compute capability for which the kernels are compiled in the tests."""
MOST_PROGRAMS = 65_535
"""Largest grid of a kernel on its second axis (the batch) and on its third (the convolution's tiles)."""


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
    elif not _compiler():
        reason = "a C compiler for its launcher: install gcc, or set CC"
    elif not (header := Path(sysconfig.get_paths(_scheme())["include"]) / "Python.h").exists():
        reason = f"Python's headers for its launcher, and there is no {header}: install python3-dev"
    else:
        return None
    return UserError(f"the triton scan needs {reason}; or set the backend to chunked")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _compiler() -> str | None:
    """The compiler that Triton takes."""
    return shutil.which(os.environ["CC"]) if "CC" in os.environ else shutil.which("gcc") or shutil.which("clang")


def _scheme() -> str:
    """The installation scheme whose headers Triton includes: not Debian's local one."""
    return sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")


def _rowwise(x_BLX: Tensor) -> Tensor:
    """x with contiguous channels and evenly spaced rows in the whole batch; a copy only if necessary."""
    B, L, X = x_BLX.shape
    even = B == 1 or x_BLX.stride(0) == L * x_BLX.stride(1)
    rows_BLX = x_BLX if even and (X == 1 or x_BLX.stride(2) == 1) else x_BLX.contiguous()
    _check_offsets(L, rows_BLX.stride(1))
    return rows_BLX


def _check_offsets(rows: int, row: int) -> None:
    """UserError if an offset within a batch row needs more than 32 bits."""
    if rows * row >= 2**31:
        raise UserError(
            f"the triton scan takes batch rows of fewer than 2**31 numbers, got {rows:,} rows of {row:,}: "
            "set the backend to chunked"
        )


def _empty_like(x_BLE: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x_BLE.shape, dtype=dtype or x_BLE.dtype, device=x_BLE.device)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel; for tensors on the meta device, only compile it."""
    first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    if first.is_meta:
        kernel.warmup(*arguments, grid=grid, **constants)
        return
    with torch.cuda.device_of(first):
        kernel[grid](*arguments, **constants)


def _grid(x_BLE: Tensor, channels: int, *tiles: int) -> tuple[int, ...]:
    B, L, E = x_BLE.shape
    if B > MOST_PROGRAMS:
        raise UserError(
            f"the triton scan takes at most {MOST_PROGRAMS:,} images per call, got {B:,}: "
            "take smaller micro-batches, or set the backend to chunked"
        )
    if max(tiles, default=0) > MOST_PROGRAMS:
        raise UserError(
            f"the triton convolution takes at most {MOST_PROGRAMS * ROWS:,} steps, got {L:,}: set the backend to chunked"
        )
    return triton.cdiv(E, channels), B, *tiles


class _Operands:
    """One direction's inputs in the layout of the kernels."""

    def __init__(self, direction: Direction, reverse: bool):
        u, delta, A, B, C, D, bias = direction
        self.u, self.delta, self.reverse = _rowwise(u), _rowwise(delta), reverse
        A_NE = (A.float() / math.log(2)).t().contiguous()
        self.pointers = self.u, self.delta, A_NE, self._by_state(B, C), D.contiguous(), bias.contiguous()

    def _steps(self) -> slice:
        """Position of the sequence in the padded one: at the beginning, or at the end if reversed."""
        L = self.u.shape[1]
        return slice(-L, None) if self.reverse else slice(L)

    def _by_state(self, B: Tensor, C: Tensor) -> Tensor:
        """B and C as (B, 2, N, L) in float32, steps contiguous, padded with zeros to whole chunks."""
        batch, L, N = B.shape
        both = B.new_zeros(batch, 2, N, triton.cdiv(L, CHUNK) * CHUNK, dtype=torch.float32)
        for i, x in enumerate((B, C)):
            both[:, i, :, self._steps()] = x.transpose(1, 2)
        return both

    def from_states(self, both: Tensor) -> list[Tensor]:
        """The inverse of `_by_state`: [B, C] without the padding."""
        return [x[..., self._steps()].transpose(1, 2) for x in both.unbind(1)]

    def constants(self, z: Tensor, dy: Tensor) -> dict[str, int]:
        (_, L, E), N = self.u.shape, self.pointers[2].shape[0]
        named = {"u_row": self.u, "delta_row": self.delta, "z_row": z, "dy_row": dy}
        rows = {name: x.stride(1) for name, x in named.items()}
        tile = {"LANES": LANES, "WARPS": WARPS, "CHUNK": CHUNK, "num_warps": WARPS}
        return {"E": E, "L": L, "N": N, "REVERSE": self.reverse, **rows, **tile}


class _Gradients(NamedTuple):
    """A direction's gradients of u and delta. Until they are written, their memory holds intermediate values."""

    du: Tensor
    ddelta: Tensor

    def halves(self) -> tuple[Tensor, Tensor]:
        """Memory for one float32 number per channel and step: one of them, or 16 bits in each if they are 16 bits wide."""
        for x in self:
            if x.dtype == torch.float32:
                return x, x
        return self.du.view(torch.int16), self.ddelta.view(torch.int16)

    def state_buffer(self, N: int) -> tuple[tuple[Tensor, Tensor], int]:
        """Memory for the states after each chunk, and its rows per chunk; a separate buffer if a chunk has too few rows."""
        if N <= CHUNK:
            return self.halves(), CHUNK
        B, L, E = self.du.shape
        _check_offsets(triton.cdiv(L, CHUNK) * N, E)
        buffer = self.du.new_empty(B, triton.cdiv(L, CHUNK), N, E, dtype=torch.float32)
        return (buffer, buffer), N


class _Scan(torch.autograd.Function):
    """`reverse` is the first direction's; a second direction runs the other way. z is the gate of the sum, or None."""

    @staticmethod
    def forward(ctx: Any, reverse: bool, z: Tensor | None, *inputs: Tensor) -> Tensor:
        if inputs[0].is_cuda:
            gradients = any(ctx.needs_input_grad)
            key = ("scan", inputs[2].shape[1], len(inputs), reverse, z is None, gradients)
            _compile_once(inputs[0], key, lambda: _launch_scan(reverse, z, inputs, gradients))
        ctx.reverse = reverse
        ctx.save_for_backward(z, *inputs)
        return _forward(reverse, z, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        z, *inputs = ctx.saved_tensors
        return None, *_backward(ctx.reverse, z, inputs, dy)


def _forward(reverse: bool, z: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
    directions = _operands(reverse, inputs)
    out, gate = _empty_like(directions[0].u), directions[0].u if z is None else _rowwise(z)
    y = _empty_like(out, torch.float32) if len(directions) == 2 else out
    for i, operands in enumerate(directions):
        _launch(
            triton_scan.scan_forward, _grid(out, LANES * WARPS), operands.pointers, gate, gate, out, (y, y), (y, y),
            **operands.constants(gate, gate), FIRST=i + 1 < len(directions), SECOND=i > 0, GATED=z is not None,
            FOR_BACKWARD=False, STATE_ROWS=CHUNK,
        )  # fmt: skip
    return out


def _backward(reverse: bool, z: Tensor | None, inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor | None]:
    """The gradients of z and of the inputs."""
    directions, dy, dz = _operands(reverse, inputs), _rowwise(dy), None if z is None else _empty_like(z)
    written_later = [_Gradients(_empty_like(operands.u), _empty_like(operands.delta)) for operands in directions]
    y = written_later[-1].halves()
    gradients: list[Tensor | None] = [dz]
    z = None if z is None else _rowwise(z)
    for i, (operands, memory) in enumerate(zip(directions, written_later, strict=True)):
        order = {"FIRST": dz is not None and i + 1 < len(directions), "SECOND": dz is not None and i > 0}
        one_way = _one_way_gradients(operands, z, dy, dz, memory, y, order)
        gradients += [g.to(x.dtype) for g, x in zip(one_way, inputs[7 * i : 7 * i + 7], strict=True)]
    return gradients


_compiled = set[tuple[Any, ...]]()
"""Sizes and types whose kernels are compiled."""


def _compile_once(x: Tensor, key: tuple[Any, ...], launches: Callable[[], object]) -> None:
    """Compile all kernels of these launches together before the first one: one after the other, a scan's six take a minute."""
    key = (x.device, x.dtype, x.shape[1:], *key)
    if key not in _compiled:
        _compiled.add(key)
        with torch.cuda.device_of(x):
            _compile(launches)


def _compile(launches: Callable[[], object]) -> None:
    """Compile the kernels of launches for tensors without memory, in threads: Triton's compiler runs outside of Python's lock.

    A kernel that cannot be compiled is an error at its first launch: an error here would leave Triton in this mode.
    """
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        launches()


def _launch_scan(reverse: bool, z: Tensor | None, inputs: Sequence[Tensor], gradients: bool) -> None:
    """Launch all kernels of a scan for tensors without memory."""
    gate, empty = None if z is None else _without_memory(z), [_without_memory(x) for x in inputs]
    out = _forward(reverse, gate, empty)
    if gradients:
        _backward(reverse, gate, empty, out)


def _launch_conv(x: Tensor, weights: Sequence[Tensor | None], gradients: bool) -> None:
    """Launch both kernels of a convolution for tensors without memory."""
    empty, without = _without_memory(x), [None if w is None else _without_memory(w) for w in weights]
    outs = _conv_forward(empty, without)
    if gradients:
        _conv_backward(empty, without, outs)


def _without_memory(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _operands(reverse: bool, inputs: Sequence[Tensor]) -> list[_Operands]:
    starts = range(0, len(inputs), 7)
    return [_Operands(Direction(*inputs[i : i + 7]), reverse != bool(i)) for i in starts]


def _one_way_gradients(
    operands: _Operands, z: Tensor | None, dy: Tensor, dz: Tensor | None, memory: _Gradients, y: tuple[Tensor, Tensor],
    order: dict[str, bool],
) -> list[Tensor]:  # fmt: skip
    """One direction's gradients, in the order of its inputs. The first direction stores its output in `y`; the second
    reads it there and writes dz. `memory` holds states until the gradients of u and delta are written to it."""
    B, N, E = operands.u.shape[0], *operands.pointers[2].shape
    gate, grid = dy if z is None else z, _grid(operands.u, LANES * WARPS)
    states, rows = memory.state_buffer(N)
    constants = operands.constants(gate, dy) | {"GATED": z is not None, "STATE_ROWS": rows}
    _launch(
        triton_scan.scan_forward, grid, operands.pointers, gate, dy, dy if dz is None else dz, y, states,
        **constants, **order, FOR_BACKWARD=True,
    )  # fmt: skip
    empty = functools.partial(torch.empty, dtype=torch.float32, device=operands.u.device)
    warp_sums, dBC = empty(*grid, N, WARPS * LANES), empty(grid[0], *operands.pointers[3].shape)
    parameters = empty(B, 2 * N + 2, E)
    _launch(
        triton_scan.scan_backward, grid, operands.pointers, gate, dy, states, warp_sums, tuple(memory), dBC, parameters,
        **constants, STATES=triton.next_power_of_2(N),
    )  # fmt: skip
    dA, dD, dbias = parameters[:, : N + 2].sum(0).split((N, 1, 1))
    return [*memory, dA.t(), *operands.from_states(dBC.sum(0)), dD[0], dbias[0]]


class _Conv(torch.autograd.Function):
    """Forward direction with the first weight and bias, backward direction with the second; None skips a direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        x = _rowwise(x)
        if x.is_cuda:
            gradients, both = any(ctx.needs_input_grad), [w is None for w in weights]
            _compile_once(x, ("conv", *both, gradients), lambda: _launch_conv(x, weights, gradients))
        ctx.save_for_backward(x, *weights)
        return tuple(_conv_forward(x, weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        return tuple(_conv_backward(x, weights, dys))


def _conv_forward(x: Tensor, weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The outputs of both directions; None for a skipped one."""
    outs = [None if weight is None else _empty_like(x) for weight in weights[::2]]
    _launch(
        triton_conv.conv_forward, _grid(x, LANES * WARPS, triton.cdiv(x.shape[1], ROWS)),
        x, *_conv_pointers(weights), tuple(x if out is None else out for out in outs), x_row=x.stride(1),
        **_conv_constants(x, weights),
    )  # fmt: skip
    return outs


def _conv_backward(x: Tensor, weights: Sequence[Tensor | None], dys: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of the input, and of each direction's weight and bias."""
    (B, L, E), constants = x.shape, _conv_constants(x, weights)
    segments, taps = triton.cdiv(L, SEGMENT), constants["TAPS"]
    dx, rows = _empty_like(x), tuple(x if dy is None else _rowwise(dy) for dy in dys)
    sums = tuple(x.new_empty(B * segments, taps + 1, E, dtype=torch.float32) for _ in rows)
    _launch(
        triton_conv.conv_backward, _grid(x, LANES * WARPS, segments),
        x, *_conv_pointers(weights), rows, dx, sums, x_row=x.stride(1), dy0_row=rows[0].stride(1), dy1_row=rows[1].stride(1),
        **constants, SEGMENT=SEGMENT,
    )  # fmt: skip
    gradients: list[Tensor | None] = [dx]
    for weight, bias, total in zip(weights[::2], weights[1::2], sums, strict=True):
        if weight is None or bias is None:
            gradients += [None, None]
        else:
            both = total.sum(0)
            gradients += [both[:taps].t().to(weight.dtype), both[taps].to(bias.dtype)]
    return gradients


def _conv_constants(x: Tensor, weights: Sequence[Tensor | None]) -> dict[str, int]:
    (_, L, E), taps = x.shape, next(w.shape[1] for w in weights[::2] if w is not None)
    sizes = {"E": E, "L": L, "TAPS": taps, "ROWS": ROWS, "LANES": LANES * WARPS, "num_warps": WARPS}
    return sizes | {"FORWARD": weights[0] is not None, "BACKWARD": weights[2] is not None}


def _conv_pointers(weights: Sequence[Tensor | None]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Both weights and both biases. Those of a skipped direction are never used: the other direction's take their place."""
    present = [w.contiguous() for w in weights if w is not None]
    return (present[0], present[-2]), (present[1], present[-1])


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
