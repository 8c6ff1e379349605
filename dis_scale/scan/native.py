"""The native CPU backend: native.cpp's functions on tensors, with their gradients. native_build.py builds and loads them.

* It computes in float32. float16 and bfloat16 inputs are converted (a copy), outputs converted back; float64 is refused.
* Inputs may be views with a contiguous last axis, such as chunks and splits of a product. Anything else costs a copy.
* With a gate the output is kept, and the backward pass divides it by the gate to get y. So a |z| below 1e-30 counts as 1e-30,
  and the output must not be changed in place.
* Results are bit-equal at any number of threads.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dis_scale.process.errors import UserError
from dis_scale.scan.backend import NATIVE_CHUNK, Backend, Direction, differentiable_once, refuse_float64
from dis_scale.scan.native_build import GROUP_CHANNELS, MOST_STATES, MOST_TAPS, library

GROUP_STEPS = 128
"""Least steps that share one partial sum of A's gradient: these sums take at most 1/7 of u's memory at 16 states."""


class _View(ctypes.Structure):
    """A float32 tensor (batch, length, channels) with contiguous channels: its address and its first two strides."""

    _fields_ = (("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("row", ctypes.c_int64))

    @classmethod
    def of(cls, x_BLE: Tensor) -> "_View":
        return cls(x_BLE.data_ptr(), x_BLE.stride(0), x_BLE.stride(1))


class _ScanDirection(ctypes.Structure):
    """As in scan.inl."""

    _fields_ = (
        *((name, _View) for name in ("u", "delta", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "bias", "weights", "starts")),
        *((name, _View) for name in ("du", "ddelta")),
        *((name, ctypes.c_void_p) for name in ("dB", "dC", "dweights", "dA", "dD", "dbias")),
    )


_SIZES = ("threads", "poison", "directions", "reverse", "batch", "length", "channels")


class _ScanJob(ctypes.Structure):
    """As in scan.inl."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*_SIZES, "states", "batch_groups")),
        *((name, _View) for name in ("z", "y", "dz", "dy")),
        ("direction", _ScanDirection * 2),
    )


class _ConvDirection(ctypes.Structure):
    """As in conv.inl."""

    _fields_ = (("y", _View), *((name, ctypes.c_void_p) for name in ("weight", "bias", "packed", "dpacked", "dweight", "dbias")))


class _ConvJob(ctypes.Structure):
    """As in conv.inl."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*_SIZES, "taps", "batch_groups")),
        ("x", _View),
        ("dx", _View),
        ("direction", _ConvDirection * 2),
    )


def _at(*tensors: Tensor | None) -> list[int | None]:
    return [None if x is None else x.data_ptr() for x in tensors]


def _job(kind: type[Any], x_BLE: Tensor, directions: int, reverse: bool) -> Any:
    batch, length, channels = x_BLE.shape
    return kind(
        threads=torch.get_num_threads(),
        poison=torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        directions=directions,
        reverse=reverse,
        batch=batch,
        length=length,
        channels=channels,
        batch_groups=min(max(batch * length // GROUP_STEPS, 1), batch),
    )


def _prepared(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In float32: sequences with contiguous channels, parameters contiguous; copies only if necessary."""
    refuse_float64("native", *tensors)
    floats = [x.float() for x in tensors]
    return [x if x.dim() == 3 and (x.shape[-1] == 1 or x.stride(-1) == 1) else x.contiguous() for x in floats]


def _by_block(parameter_of: Tensor, columns: int) -> Tensor:
    """Zeros for parameters in the kernels' layout: (blocks of channels, columns, lanes)."""
    lanes: int = library().lanes()
    return parameter_of.new_zeros((parameter_of.shape[0] + lanes - 1) // lanes, columns, lanes)


def _as_given(gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    return [gradient.to(x.dtype) for gradient, x in zip(gradients, inputs, strict=True)]


def _wants_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _scan_job(inputs: Sequence[Tensor], reverse: bool, kept: Sequence[Tensor | None]) -> Any:
    """`inputs`: seven per direction, then z if there is a gate; `kept`: weights and starts of each direction."""
    job = _job(_ScanJob, inputs[0], len(inputs) // 7, reverse)
    job.states = inputs[3].shape[2]
    for i, (u, delta, A, B, C, D, bias) in enumerate(zip(*[iter(inputs)] * 7, strict=False)):
        to = job.direction[i]
        to.u, to.delta, to.B, to.C = map(_View.of, (u, delta, B, C))
        to.A, to.D, to.bias, to.weights, to.starts = _at(A, D, bias, *kept[2 * i : 2 * i + 2])
    if len(inputs) % 7:
        job.z = _View.of(inputs[-1])
    return job


def _scan_forward(given: Sequence[Tensor], reverse: bool, keep: bool) -> tuple[Tensor, list[Tensor | None]]:
    """Return y in float32, and what the backward pass needs of each direction."""
    inputs, kept = _prepared(given), list[Tensor | None]()
    (batch, length, _), states = inputs[0].shape, inputs[3].shape[2]
    for A in inputs[2::7]:
        weights = _by_block(A, states + 2)
        chunks = max(length - 1, 0) // NATIVE_CHUNK
        starts = A.new_empty(batch, chunks, weights.shape[0], states, weights.shape[2]) if keep else None
        kept += [weights, starts]
    y = inputs[0].new_empty(inputs[0].shape)
    job = _scan_job(inputs, reverse, kept)
    job.y = _View.of(y)
    library().scan_forward(ctypes.byref(job))
    return y, kept


class _NativeScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reverse: bool, *inputs: Tensor) -> Tensor:
        y, kept = _scan_forward(inputs, reverse, keep=True)
        ctx.reverse = reverse
        ctx.save_for_backward(*inputs, *kept, *([y] if len(inputs) % 7 else []))
        return y.to(inputs[0].dtype)

    @staticmethod
    @differentiable_once("native scan")
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        directions, gate = len(saved) // 9, len(saved) % 9 // 2  # two more tensors with a gate: z and y
        given, kept = saved[: 7 * directions + gate], saved[7 * directions + gate : 9 * directions + gate]
        inputs, (dy,) = _prepared(given), _prepared([dy])
        if kept[0].shape[2] != library().lanes():
            raise RuntimeError("the instruction set changed between forward and backward")
        job, gradients, sums = _scan_job(inputs, ctx.reverse, kept), list[Tensor](), list[Tensor]()
        job.dy = _View.of(dy)
        for i in range(directions):
            u, _, A, B, _, D, bias = inputs[7 * i : 7 * i + 7]
            du, ddelta = u.new_empty(u.shape), u.new_empty(u.shape)
            parts = (u.shape[2] + GROUP_CHANNELS - 1) // GROUP_CHANNELS, *B.shape
            dB, dC, dA, dD, dbias = B.new_empty(parts), B.new_empty(parts), *map(torch.empty_like, (A, D, bias))
            dweights = A.new_zeros(job.batch_groups, *kept[2 * i].shape)
            to = job.direction[i]
            to.du, to.ddelta = _View.of(du), _View.of(ddelta)
            to.dB, to.dC, to.dweights, to.dA, to.dD, to.dbias = _at(dB, dC, dweights, dA, dD, dbias)
            gradients += [du, ddelta, dA, dB[0], dC[0], dD, dbias]
            sums.append(dweights)
        if gate:
            gradients.append(u.new_empty(u.shape))
            job.dz, job.y = _View.of(gradients[-1]), _View.of(saved[-1])
        library().scan_backward(ctypes.byref(job))
        return None, *_as_given(gradients, given)


def _scan(inputs: Sequence[Tensor], reverse: bool) -> Tensor:
    if _wants_gradient(inputs):
        y: Tensor = _NativeScan.apply(reverse, *inputs)
        return y
    return _scan_forward(inputs, reverse, keep=False)[0].to(inputs[0].dtype)


def _conv_job(inputs: Sequence[Tensor], reverse: bool, ys: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """Return a job, and the packed weights, to hold as long as it runs.

    `inputs`: x, then a weight and a bias per direction; `ys`: the outputs, or their gradients.
    """
    job = _job(_ConvJob, inputs[0], len(ys), reverse)
    packed = [_by_block(weight, weight.shape[1] + 1) for weight in inputs[1::2]]
    job.taps, job.x = inputs[1].shape[1], _View.of(inputs[0])
    for i, (y, weight, bias, by_block) in enumerate(zip(ys, inputs[1::2], inputs[2::2], packed, strict=True)):
        job.direction[i].y = _View.of(y)
        job.direction[i].weight, job.direction[i].bias, job.direction[i].packed = _at(weight, bias, by_block)
    return job, packed


def _conv_forward(given: Sequence[Tensor], reverse: bool) -> tuple[Tensor, ...]:
    inputs = _prepared(given)
    ys = [inputs[0].new_empty(inputs[0].shape) for _ in inputs[1::2]]
    job, _held = _conv_job(inputs, reverse, ys)
    library().conv_forward(ctypes.byref(job))
    return tuple(y.to(given[0].dtype) for y in ys)


class _NativeConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reverse: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.reverse = reverse
        ctx.save_for_backward(*inputs)
        return _conv_forward(inputs, reverse)

    @staticmethod
    @differentiable_once("native scan")
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        given = ctx.saved_tensors
        inputs, ready = _prepared(given), _prepared(dys)
        job, packed = _conv_job(inputs, ctx.reverse, ready)
        gradients = [inputs[0].new_empty(inputs[0].shape), *map(torch.empty_like, inputs[1:])]
        dpacked = [x.new_zeros(job.batch_groups, *x.shape) for x in packed]
        job.dx = _View.of(gradients[0])
        for i, sums in enumerate(dpacked):
            to = job.direction[i]
            to.dpacked, to.dweight, to.dbias = _at(sums, *gradients[1 + 2 * i : 3 + 2 * i])
        library().conv_backward(ctypes.byref(job))
        return None, *_as_given(gradients, given)


def _conv(inputs: Sequence[Tensor], reverse: bool) -> tuple[Tensor, ...]:
    if _wants_gradient(inputs):
        ys: tuple[Tensor, ...] = _NativeConv.apply(reverse, *inputs)
        return ys
    return _conv_forward(inputs, reverse)


def _check_limit(what: str, got: int, most: int) -> None:
    if got > most:
        raise UserError(f"the native scan takes at most {most} {what}, got {got}: set the backend to chunked")


def _selective_scan(direction: Direction, reverse: bool) -> Tensor:
    _check_limit("states", direction.A_EN.shape[1], MOST_STATES)
    return _scan(direction, reverse)


def _two_way_scan(forward: Direction, backward: Direction, z_BLE: Tensor | None) -> Tensor:
    _check_limit("states", max(forward.A_EN.shape[1], backward.A_EN.shape[1]), MOST_STATES)
    return _scan([*forward, *backward, *(() if z_BLE is None else (z_BLE,))], False)


def _causal_conv_silu(x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, reverse: bool) -> Tensor:
    _check_limit("taps", weight_EW.shape[1], MOST_TAPS)
    return _conv([x_BLE, weight_EW, bias_E], reverse)[0]


def _two_way_conv_silu(x_BLE: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    _check_limit("taps", weights[0].shape[1], MOST_TAPS)
    forward, backward = _conv([x_BLE, *weights], False)
    return forward, backward


backend = Backend(_selective_scan, _two_way_scan, _causal_conv_silu, _two_way_conv_silu)
