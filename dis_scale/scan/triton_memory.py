"""The Triton scan's memory between kernels: states and sums, mostly in the memory of gradients that are not yet written."""

from typing import NamedTuple

import torch
from torch import Tensor

from dis_scale.scan.triton_launch import CHUNK, LANES, WARPS, ceil_div, check_offsets


class Gradients(NamedTuple):
    """A direction's gradients of u and delta. Until they are written, their memory holds intermediate values."""

    du: Tensor
    ddelta: Tensor

    def halves(self) -> tuple[Tensor, Tensor]:
        """Return memory for one float32 number per channel and step: one gradient's, or 16 bits in each if both are that wide."""
        for x in self:
            if x.dtype == torch.float32:
                return x, x
        return self.du, self.ddelta

    def state_buffer(self, N: int) -> tuple[Tensor, Tensor]:
        """Memory for the states after each chunk; a separate buffer if a chunk has too few rows."""
        return self.halves() if N <= CHUNK else (states := new_states(self.du, N), states)


class ScanGradients(NamedTuple):
    """Memory for a direction's gradients. Rows of dB and dC are evenly spaced; dA has A's strides."""

    memory: Gradients
    dA: Tensor
    dB: Tensor
    dC: Tensor
    dD: Tensor
    dbias: Tensor


class KeptStates(NamedTuple):
    """Tensors that a forward pass keeps besides its inputs: each direction's states, and y before the gate, if any."""

    states: list[Tensor]
    y: Tensor

    @property
    def any(self) -> bool:
        return self.states[0].numel() > 0


def state_rows(N: int) -> int:
    """Rows of a chunk in a buffer of states: as many as the chunk has steps, unless there are more states."""
    return CHUNK if N <= CHUNK else N


def new_states(like: Tensor, N: int) -> Tensor:
    """A buffer of states, for inputs like (B, L, E)."""
    B, L, E = like.shape
    rows = L if N <= CHUNK else ceil_div(L, CHUNK) * N
    check_offsets(rows, E)
    return like.new_empty(B, rows, E, dtype=torch.float32)


class Parts(NamedTuple):
    """Memory for a direction's sums, which programs store in parts. The directions may use it one after the other."""

    warp_sums: Tensor
    dBC: Tensor
    parameters: Tensor


def new_parts(BC: Tensor, N: int, E: int, programs: int) -> Parts:
    """Memory for the sums of one direction."""
    B = len(BC)
    return Parts(BC.new_empty(programs, B, N, WARPS * LANES), BC.new_empty(programs, *BC.shape), BC.new_empty(B, 2 * N + 2, E))
