"""Counts of operations: a function whose work is not in products reports its multiply-adds here.

Nothing happens unless a network is being priced (models/cost.py), which then runs no kernel. Rules: the scan counts 9 FLOPs per
channel, state, token and direction. The skip D u and the gate, wherever it is applied, each count one multiply-add per element and
direction. One multiply-add is two FLOPs.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from dis_scale.scan.backend import NATIVE_CHUNK, Direction, from_one_way

SCAN_MACS = 4.5
"""Multiply-adds per channel, state, token and direction: 9 FLOPs."""


class Counter(Protocol):
    """Receiver of the counts of a network that is being priced."""

    states: int
    """Bytes that scans and state-space duality keep in addition within `KeepingStates`."""

    def add(self, name: str, macs: float, passes: int = 3) -> None:
        """Count multiply-adds of a forward pass; training needs `passes` times as many."""
        ...

    def alone(self, name: str, macs: float) -> AbstractContextManager[None]:
        """Return a context for which only these multiply-adds count."""
        ...

    def block(self, inputs: tuple[Tensor | None, ...]) -> AbstractContextManager[None]:
        """Return the context of a block of the network, with its inputs."""
        ...


active: ContextVar[Counter | None] = ContextVar("counter", default=None)
"""The counter of the pricing in progress."""


def report(name: str, macs: float) -> None:
    """Report operations that are no products."""
    if counter := active.get():
        counter.add(name, macs)


@contextmanager
def reporting(name: str, macs: float) -> Iterator[None]:
    """Report the multiply-adds of this context; its products are not counted in addition."""
    if counter := active.get():
        with counter.alone(name, macs):
            yield
    else:
        yield


class _Keeping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError("a priced network has no backward pass")


def keeping(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return a function's output, for which a backward pass keeps only the inputs, as with `checkpoint` and kernels."""
    out: Tensor = _Keeping.apply(function, *inputs)
    return out


def fused(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return a function's output. On a GPU one kernel computes it and keeps only its inputs."""
    # A compiler cannot trace the look-up.
    return keeping(function, *inputs) if not torch.compiler.is_compiling() and active.get() else function(*inputs)


def like_first(x_BLE: Tensor, *_: Tensor) -> Tensor:
    """Return uninitialised memory of the first shape."""
    return torch.empty_like(x_BLE, memory_format=torch.contiguous_format)


def _scan(direction: Direction, reverse: bool) -> Tensor:  # noqa: ARG001
    return _scans(direction)


def _scans(*directions: Direction, gate: tuple[Tensor, ...] = ()) -> Tensor:
    (B, L, E), N = directions[0].u_BLE.shape, directions[0].A_EN.shape[1]
    report("scan", len(directions) * B * L * E * N * SCAN_MACS)
    report("D u and gate", len(directions) * 2 * B * L * E)
    if counter := active.get():
        counter.states += B * L * E * (4 * len(directions) * max(16, N) // 16 + len(gate) * directions[0].u_BLE.element_size())
    inputs, states = [x for direction in directions for x in direction], (L - 1) // NATIVE_CHUNK
    kept = directions[0].A_EN.new_empty(B, len(directions) * E * N * states)
    return keeping(like_first, *inputs, *gate, kept)


def _two_way_scan(forward: Direction, backward: Direction, z_BLE: Tensor | None) -> Tensor:
    return _scans(forward, backward, gate=() if z_BLE is None else (z_BLE,))


def _conv(x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, reverse: bool) -> Tensor:  # noqa: ARG001
    report("conv", x_BLE.numel() * weight_EW.shape[1])
    return keeping(like_first, x_BLE, weight_EW, bias_E)


backend = from_one_way(_scan, _conv)._replace(two_way_scan=_two_way_scan)
"""The backend of a network that is priced."""
