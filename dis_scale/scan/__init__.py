"""The selective scan and the causal convolution of a state-space mixer, on the best backend of the device.

    reference   the definition, a plain loop
    native      C++ code for CPUs
    triton      our kernels for NVIDIA GPUs
    mamba       the published kernels for NVIDIA GPUs
    chunked     plain PyTorch, for any device; duality needs one with float64

`auto` selects the fastest one and gives the reason: `choose`. Every backend takes any float dtype, except that native,
triton and mamba refuse float64. The state is float32 (float64 for float64 inputs), outputs have the first input's dtype, and
every tensor has a gradient. Tensors may have any strides; each backend's module documents what it copies.

Axes: B batch, L time, E channels, N states, W taps of the convolution.
"""

import functools
import importlib
import logging
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dis_scale.process.errors import DisScaleError, UserError, nearest
from dis_scale.scan import counts, native_build
from dis_scale.scan.backend import Backend, Direction
from dis_scale.scan.graphs import outside_graphs

__all__ = [
    "BACKENDS", "GPU_BACKENDS", "Choice", "Direction", "causal_conv_silu", "choose", "problem", "selective_scan",
    "two_way_conv_silu", "two_way_scan",
]  # fmt: skip

BACKENDS = ("reference", "native", "triton", "mamba", "chunked")
"""Modules of this folder, imported at first use: two of them need packages that not every machine has."""
GPU_BACKENDS = {
    "triton": "triton, which comes with PyTorch's builds for Linux: pip install triton",
    "mamba": "mamba-ssm and causal-conv1d: on a machine with nvcc, in the repository: "
    "pip install --no-build-isolation -e '.[gpu]' -c constraints.txt",
}
"""Requirements of the GPU backends, and how to install them."""


FALLBACK = "chunked"
"""Backend that runs anywhere, by PyTorch's operations."""


class Choice(NamedTuple):
    """Name of a backend and the reason for it; prints as `native (auto: cpu, avx512)`."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@outside_graphs
def selective_scan(
    u_BLE: Tensor,
    delta_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor,
    delta_bias_E: Tensor,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y_BLE of h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t . h_t + D u_t (Gu and Dao 2023, Algorithm 2).

    `delta` is raw: delta_t = softplus(delta_BLE + delta_bias_E). A is negative. `reverse` scans from the end to the
    start, which is the same as flip, scan, flip.
    """
    direction = Direction(u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, D_E, delta_bias_E)
    _check_direction("selective_scan", direction)
    return _running(backend, u_BLE.device.type).selective_scan(direction, reverse)


@outside_graphs
def two_way_scan(forward: Direction, backward: Direction, z_BLE: Tensor | None, backend: str = "auto") -> Tensor:
    """Return (scan of `forward` + reversed scan of `backward`) * SiLU(z), or only the sum if z is None."""
    _check_direction("two_way_scan, forward", forward)
    _check_direction("two_way_scan, backward", backward)
    shape, device = forward.u_BLE.shape, forward.u_BLE.device
    require_like("two_way_scan, backward: u_BLE", backward.u_BLE, shape, device)
    require_like("two_way_scan, backward: A_EN", backward.A_EN, forward.A_EN.shape, device)
    if z_BLE is not None:
        require_like("two_way_scan: z_BLE", z_BLE, shape, device)
    return _running(backend, device.type).two_way_scan(forward, backward, z_BLE)


@outside_graphs
def causal_conv_silu(x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, reverse: bool = False, backend: str = "auto") -> Tensor:
    """SiLU of the depthwise causal convolution; `reverse` is the same as flip, convolve, flip."""
    _check_conv("causal_conv_silu", x_BLE, weight_EW, bias_E)
    return _running(backend, x_BLE.device.type).causal_conv_silu(x_BLE, weight_EW, bias_E, reverse)


@outside_graphs
def two_way_conv_silu(
    x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, back_weight_EW: Tensor, back_bias_E: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Apply `causal_conv_silu` to x in both directions, reading x once; return (forward, backward)."""
    _check_conv("two_way_conv_silu, forward", x_BLE, weight_EW, bias_E)
    require_like("two_way_conv_silu, backward: the weight", back_weight_EW, weight_EW.shape, x_BLE.device)
    require_like("two_way_conv_silu, backward: the bias", back_bias_E, bias_E.shape, x_BLE.device)
    convolve = _running(backend, x_BLE.device.type).two_way_conv_silu
    return convolve(x_BLE, weight_EW, bias_E, back_weight_EW, back_bias_E)


def choose(name: str, device: torch.device | str) -> Choice:
    """Return the backend that `name` selects on `device`; cached. UserError or DisScaleError if it cannot run there."""
    return _choose(name, torch.device(device).type)


@functools.cache
def _choose(name: str, device: str) -> Choice:
    if name == "auto":
        return _automatic(device)
    if name not in BACKENDS:
        raise UserError(f"no scan backend {name!r}{nearest(name, BACKENDS)}: there are auto, {', '.join(BACKENDS)}")
    if error := problem(name, device):
        raise error
    return Choice(name, "as asked; it adds gradients atomically, so no run is equal to the bit" if name == "mamba" else "as asked")


def _automatic(device: str) -> Choice:
    best = {"cpu": "native", "cuda": "triton"}.get(device)
    if best is None:
        return Choice(FALLBACK, f"auto: {device}")
    if error := problem(best, device):
        logging.getLogger(__name__).warning("the scan is %s, which is slow: %s", FALLBACK, error)
        return Choice(FALLBACK, f"auto: {error}")
    return Choice(best, f"auto: {device}, {native_build.instruction_set() if best == 'native' else 'an NVIDIA GPU'}")


def problem(name: str, device: str) -> DisScaleError | None:
    """Return why a backend cannot run on a device, or None."""
    if name == "native":
        wrong = UserError(f"the native scan is for the CPU, got tensors on {device}: set the backend to auto or chunked")
        return native_build.problem() if device == "cpu" else wrong
    if name not in GPU_BACKENDS:
        return None
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device != "cuda" and not interpreted:
        return UserError(f"the {name} scan is for NVIDIA GPUs, got tensors on {device}: set the backend to auto")
    try:
        module = _module(name)
    except ImportError as error:
        return UserError(f"the {name} scan needs {GPU_BACKENDS[name]} (got: {error})")
    return None if interpreted else module.problem()


def _module(name: str) -> Any:
    return importlib.import_module(f"dis_scale.scan.{name}")


def _running(name: str, device: str) -> Backend:
    return counts.backend if counts.active.get() else _backend(name, device)


@functools.cache
def _backend(name: str, device: str) -> Backend:
    backend: Backend = _module(_choose(name, device).name).backend
    return backend


def _check_direction(where: str, direction: Direction) -> None:
    u_BLE, A_EN = direction.u_BLE, direction.A_EN
    if u_BLE.ndim != 3 or A_EN.ndim != 2 or 0 in u_BLE.shape + A_EN.shape:
        raise UserError(f"{where}: u_BLE is {tuple(u_BLE.shape)} and A_EN {tuple(A_EN.shape)}, expected 3 and 2 axes, none empty")
    (B, L, E), N, device = u_BLE.shape, A_EN.shape[1], u_BLE.device
    shapes = (u_BLE.shape, (B, L, E), (E, N), (B, L, N), (B, L, N), (E,), (E,))
    for name, x, shape in zip(Direction._fields, direction, shapes, strict=True):
        require_like(f"{where}: {name}", x, shape, device)


def _check_conv(where: str, x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor) -> None:
    if x_BLE.ndim != 3 or weight_EW.ndim != 2 or 0 in x_BLE.shape + weight_EW.shape:
        raise UserError(
            f"{where}: x_BLE is {tuple(x_BLE.shape)} and the weight {tuple(weight_EW.shape)}, expected 3 and 2 axes, none empty"
        )
    E, device = x_BLE.shape[2], x_BLE.device
    require_like(f"{where}: x_BLE", x_BLE, x_BLE.shape, device)
    require_like(f"{where}: the weight", weight_EW, (E, weight_EW.shape[1]), device)
    require_like(f"{where}: the bias", bias_E, (E,), device)


def require_like(what: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """UserError names a tensor of another shape or device, or of no floats."""
    if x.shape != shape or x.device != device or not x.is_floating_point():
        raise UserError(f"{what} is {tuple(x.shape)} {x.dtype} on {x.device}, expected {tuple(shape)} of floats on {device}")
