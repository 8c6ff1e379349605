"""The interface of a scan backend: four functions. Two of them can be derived from the other two (`from_one_way`).

Axes: B batch, L time, E channels, N states, W taps of the convolution.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dis_scale.process.errors import UserError

T = TypeVar("T")

NATIVE_CHUNK = 86
"""Steps between the states that the native scan keeps for its backward pass.

Images of 8, 16, 32 or 64 patches a side make 66, 258, 1026 or 4098 tokens with time and label. 86 leaves no small
remainder of these lengths; a small remainder would cost nearly as much as a full chunk.
"""


def differentiable_once(kernel: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Return a decorator of a `backward` that refuses a second derivative, which would lack terms. The error names the kernel.

    PyTorch's `once_differentiable` detects a second derivative only if the incoming gradient has a gradient.
    """

    def decorate(backward: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(backward)
        def guarded(ctx: Any, *gradients: Tensor) -> T:
            if torch.is_grad_enabled():
                raise NotImplementedError(
                    f"the {kernel} is differentiable once: for second derivatives (create_graph=True) set the backend to reference"
                )
            return backward(ctx, *gradients)

        return guarded

    return decorate


def refuse_float64(backend: str, *tensors: Tensor | None) -> None:
    """Raise a UserError if a tensor is float64, which the backend would round to float32."""
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        raise UserError(f"the {backend} scan computes in float32, got float64: convert, or set the backend to chunked")


_keeping = ContextVar("keeping", default=0)
"""Number of `KeepingStates` entered in this thread."""


class KeepingStates:
    """Context in which a scan keeps what shortens its backward pass: for a block being recomputed, or for all if memory allows.

    Triton's scan keeps its states only within this context: for up to 16 states as many float32 numbers as its input has.

    It may be entered repeatedly, as PyTorch does for each backward pass through a block. It also enters and leaves `within`.
    """

    def __init__(self, within: AbstractContextManager[Any] | None = None) -> None:
        self._within = within or nullcontext()

    def __enter__(self) -> None:
        self._within.__enter__()
        _keeping.set(_keeping.get() + 1)

    def __exit__(self, *error: Any) -> None:
        _keeping.set(_keeping.get() - 1)
        self._within.__exit__(*error)


def keeps_states() -> bool:
    """Whether a `KeepingStates` is active in this thread."""
    return _keeping.get() > 0


class Direction(NamedTuple):
    """The inputs of one direction. `delta` is raw: the scan adds its bias and applies softplus. A is negative."""

    u_BLE: Tensor
    delta_BLE: Tensor
    A_EN: Tensor
    B_BLN: Tensor
    C_BLN: Tensor
    D_E: Tensor
    delta_bias_E: Tensor


class Backend(NamedTuple):
    """`selective_scan(direction, reverse)`, `two_way_scan(forward, backward, z)`, and both forms of the convolution."""

    selective_scan: Callable[[Direction, bool], Tensor]
    two_way_scan: Callable[[Direction, Direction, Tensor | None], Tensor]
    causal_conv_silu: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    two_way_conv_silu: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def from_one_way(scan: Callable[[Direction, bool], Tensor], conv: Callable[[Tensor, Tensor, Tensor, bool], Tensor]) -> Backend:
    """Return a backend whose two-way functions call the one-way functions once for each direction."""

    def two_way_scan(forward: Direction, backward: Direction, z_BLE: Tensor | None) -> Tensor:
        dtype = forward.u_BLE.dtype
        wide = torch.promote_types(dtype, torch.float32)  # neither the sum nor the gate is rounded in between
        forward, backward = (d._replace(u_BLE=d.u_BLE.to(wide)) for d in (forward, backward))
        y_BLE = scan(forward, False) + scan(backward, True)
        return (y_BLE if z_BLE is None else y_BLE * F.silu(z_BLE.to(wide))).to(dtype)

    def two_way_conv_silu(
        x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, back_weight_EW: Tensor, back_bias_E: Tensor
    ) -> tuple[Tensor, Tensor]:
        return conv(x_BLE, weight_EW, bias_E, False), conv(x_BLE, back_weight_EW, back_bias_E, True)

    return Backend(scan, two_way_scan, conv, two_way_conv_silu)
