"""State-space duality by the Triton backend: what of it is small is PyTorch's, what is as wide as x is in four kernels.

A forward pass keeps only its inputs. The backward pass computes the exponents and the scores again, with their graph, through
which it passes on the gradients that the kernels compute. Every run has the same bits.

Axes: as in duality.py. Read next: triton_ssd_kernels.py.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dis_scale.process.errors import UserError
from dis_scale.scan import triton_ssd_kernels as kernels
from dis_scale.scan.duality import Exponents, Way, cut, ways_of
from dis_scale.scan.triton_launch import Launch, ceil_div, next_power_of_2, plain, rowwise

CHUNK = {2: 64, 4: 32}
"""Most tokens of a chunk by the bytes of a number: its pairs of tokens are in registers."""
HEADS = 4
"""Most heads of a program: fewer give more programs, and more parts of the gradients that heads share."""
WARPS = 8
"""Of a program: with fewer, tiles spill registers."""
LEAST_TILE = 16
"""Of a product on tensor cores."""


class Mixed(NamedTuple):
    """What the chunks of one direction mix by, contiguous: the exponents of a pair of tokens, what a token takes of the state
    that enters and adds to the one that leaves, and the state's decay in a chunk."""

    reach_BKHQ: Tensor
    leave_BKHQ: Tensor
    taken_BKHQ: Tensor
    weight_BKHQ: Tensor
    decay_BKH: Tensor
    B_BKQN: Tensor
    C_BKQN: Tensor


class SsdKind(NamedTuple):
    """All that distinguishes one call's launches from another's."""

    device: torch.device
    dtype: torch.dtype
    B: int
    L: int
    H: int
    P: int
    N: int
    present: tuple[bool, bool]
    x_row: int

    @property
    def chunks(self) -> int:
        return ceil_div(self.L, CHUNK[self.dtype.itemsize])

    @property
    def tokens(self) -> int:
        """Of a chunk."""
        return ceil_div(self.L, self.chunks)

    @property
    def heads(self) -> int:
        """Of a program."""
        return max(heads for heads in range(1, HEADS + 1) if self.H % heads == 0)

    @property
    def programs(self) -> int:
        """Of a chunk."""
        return self.H // self.heads

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs for some heads of a chunk."""
        return self.B * self.chunks, self.programs, 1

    @property
    def reverse(self) -> list[bool]:
        """Of each direction that is present, whether it is the later tokens'."""
        return [late for late in (False, True) if self.present[late]]

    @property
    def sizes(self) -> dict[str, int]:
        tiles = {"TOKENS": self.tokens, "CHANNELS": self.P, "STATES": self.N}
        sizes = {"L": self.L, "H": self.H, "P": self.P, "N": self.N, "K": self.chunks, "Q": self.tokens}
        return sizes | {name: max(LEAST_TILE, next_power_of_2(size)) for name, size in tiles.items()}

    @property
    def ways(self) -> dict[str, bool]:
        return {"EARLIER": self.present[0], "LATER": self.present[1]}


def ssd(x_BLHP: Tensor, own_BLH: Tensor, earlier: Way | None, later: Way | None, exclusive: bool) -> Tensor:
    """`duality.ssd` of checked inputs, with B and C in x's type, and all else in float32."""
    if x_BLHP.dtype == torch.float64:
        raise UserError("the triton scan computes in float32, got float64: convert, or set the backend to chunked")
    ways = list[Tensor]()
    for way in filter(None, (earlier, later)):
        ways += [way.step_BLH.float(), way.A_H.float(), way.B_BLN.to(x_BLHP), way.C_BLN.to(x_BLHP)]
    present = earlier is not None, later is not None
    y_BLHP: Tensor = _Ssd.apply(present, exclusive, x_BLHP, own_BLH.float(), *ways)
    return y_BLHP


class _Ssd(torch.autograd.Function):
    """`ways` are the tensors of the directions that are present."""

    @staticmethod
    def forward(ctx: Any, present: tuple[bool, bool], exclusive: bool, x_BLHP: Tensor, own_BLH: Tensor, *ways: Tensor) -> Tensor:
        ctx.present, ctx.exclusive = present, exclusive
        ctx.save_for_backward(x_BLHP, own_BLH, *ways)
        with torch.cuda.device_of(x_BLHP):
            x_BLE = rowwise(x_BLHP.flatten(2))
            kind = _kind(x_BLHP, x_BLE, ways, present)
            return _outputs(kind, x_BLE, plain(own_BLH), *_mixed(kind, ways, exclusive)).view(x_BLHP.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLHP: Tensor) -> tuple[Tensor | None, ...]:
        x_BLHP, own_BLH, *ways = ctx.saved_tensors
        leaves = [x.detach().requires_grad_() for x in ways]
        with torch.cuda.device_of(dy_BLHP):
            x_BLE, dy_BLE = rowwise(x_BLHP.flatten(2)), rowwise(dy_BLHP.flatten(2))
            kind = _kind(x_BLHP, x_BLE, ways, ctx.present)
            with torch.enable_grad():
                mixed, scores = _mixed(kind, leaves, ctx.exclusive)
            dx_BLE, down_BLH, gradients = _gradients(kind, x_BLE, dy_BLE, plain(own_BLH), mixed, scores)
            outputs, given = zip(*gradients, strict=True)
            return None, None, dx_BLE.view(x_BLHP.shape), down_BLH, *torch.autograd.grad(outputs, leaves, given)


def _kind(x_BLHP: Tensor, x_BLE: Tensor, ways: Sequence[Tensor], present: tuple[bool, bool]) -> SsdKind:
    B, L, H, P = x_BLHP.shape
    return SsdKind(x_BLHP.device, x_BLHP.dtype, B, L, H, P, ways[2].shape[2], present, x_BLE.stride(1))


def _mixed(kind: SsdKind, ways: Sequence[Tensor], exclusive: bool) -> tuple[list[Mixed], Tensor]:
    """What each direction mixes by, and C . B of each pair of a chunk's tokens: of the earlier direction below the diagonal."""
    parts, mixed = functools.partial(cut, K=kind.chunks, Q=kind.tokens), list[Mixed]()
    for reverse, way in zip(kind.reverse, ways_of(ways), strict=True):
        one = Exponents.of(parts(way.step_BLH), way.A_H, exclusive, reverse)
        weight_BKHQ = (one.total_BKH[..., None] + one.leave_BKHQ).exp()
        tensors = one.reach_BKHQ, one.leave_BKHQ, one.reach_BKHQ.exp(), weight_BKHQ, one.total_BKH.exp()
        mixed.append(Mixed(*map(plain, (*tensors, parts(way.B_BLN), parts(way.C_BLN)))))
    scores = [each.C_BKQN @ each.B_BKQN.transpose(2, 3) for each in mixed]
    if len(mixed) == 1:
        return mixed, scores[0]
    token = torch.arange(kind.tokens, device=kind.device)
    return mixed, torch.where(token[:, None] > token, scores[0], scores[1])


def _states(kind: SsdKind, U_BKQN: Tensor, v_BLE: Tensor, weight_BKHQ: Tensor, decay_BKH: Tensor, reverse: bool) -> Tensor:
    """The state that enters each chunk in this order; nothing if there is only one."""
    if kind.chunks == 1:
        return v_BLE
    states_BKHNP = v_BLE.new_empty(kind.B, kind.chunks, kind.H, kind.N, kind.P)
    _states_launch(kind, v_BLE.stride(1), reverse)(U_BKQN, v_BLE, weight_BKHQ, decay_BKH, states_BKHNP)
    return states_BKHNP


def _entering(kind: SsdKind, x_BLE: Tensor, mixed: Sequence[Mixed]) -> list[Tensor]:
    return [
        _states(kind, each.B_BKQN, x_BLE, each.weight_BKHQ, each.decay_BKH, reverse)
        for each, reverse in zip(mixed, kind.reverse, strict=True)
    ]


def _outputs(kind: SsdKind, x_BLE: Tensor, own_BLH: Tensor, mixed: Sequence[Mixed], scores: Tensor) -> Tensor:
    y_BLE = torch.empty_like(x_BLE, memory_format=torch.contiguous_format)
    states = _entering(kind, x_BLE, mixed)
    taking = [(each.C_BKQN, each.taken_BKHQ, state) for each, state in zip(mixed, states, strict=True)]
    _outputs_launch(kind)(x_BLE, own_BLH, scores, *_both([each[:2] for each in mixed]), *_both(taking), y_BLE)
    return y_BLE


def _gradients(
    kind: SsdKind, x_BLE: Tensor, dy_BLE: Tensor, own_BLH: Tensor, mixed: Sequence[Mixed], scores: Tensor
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """The gradients of x and own, and those of what is mixed by, each behind its tensor."""
    dx_BLE, down_BLH = torch.empty_like(x_BLE, memory_format=torch.contiguous_format), torch.empty_like(own_BLH)
    pairs, states = _backward_launches(kind, dy_BLE.stride(1))
    dstates = [
        _states(kind, each.C_BKQN, dy_BLE, each.taken_BKHQ, each.decay_BKH, not reverse)
        for each, reverse in zip(mixed, kind.reverse, strict=True)
    ]
    adding = [(each.B_BKQN, each.weight_BKHQ, dstate) for each, dstate in zip(mixed, dstates, strict=True)]
    new = [Mixed(*[torch.empty_like(x) for x in each[:5]], *[_parts(kind, x) for x in each[5:]]) for each in mixed]
    dscores = _parts(kind, scores)
    pairs(
        x_BLE, dy_BLE, own_BLH, scores, *_both([each[:2] for each in mixed]), *_both(adding), dx_BLE, down_BLH, dscores,
        *_both([each[:2] for each in new]),
    )  # fmt: skip
    gradients = [(scores, dscores.sum(0).to(scores.dtype))]
    for each, d, state, dstate in zip(mixed, new, _entering(kind, x_BLE, mixed), dstates, strict=True):
        gradients += zip(each[:2], d[:2], strict=True)
        if kind.chunks > 1:
            B, C, taken, weight = each.B_BKQN, each.C_BKQN, each.taken_BKHQ, each.weight_BKHQ
            states(x_BLE, dy_BLE, B, C, taken, weight, state, dstate, d.B_BKQN, d.C_BKQN, *d[2:5])
            gradients += zip(each[2:5], d[2:5], strict=True)
            gradients += [(B, d.B_BKQN.sum(0).to(B.dtype)), (C, d.C_BKQN.sum(0).to(C.dtype))]
    return dx_BLE, down_BLH, gradients


def _parts(kind: SsdKind, x: Tensor) -> Tensor:
    """Memory for the gradient of a tensor that heads share, a part of each program of a chunk."""
    return x.new_empty(kind.programs, *x.shape, dtype=torch.float32)


def _both(ways: Sequence[Any]) -> tuple[Any, Any]:
    """A value for each direction: of an absent one the other's, which is not used."""
    return ways[0], ways[-1]


@functools.cache
def _states_launch(kind: SsdKind, v_row: int, reverse: bool) -> Launch:
    """With a program for each head of an image."""
    return _launch(kind, kernels.ssd_states, (kind.B, kind.H, 1), v_row=v_row, REVERSE=reverse)


@functools.cache
def _outputs_launch(kind: SsdKind) -> Launch:
    return _launch(kind, kernels.ssd_outputs, kind.grid, HEADS=kind.heads, x_row=kind.x_row, **kind.ways)


@functools.cache
def _backward_launches(kind: SsdKind, dy_row: int) -> tuple[Launch, Launch]:
    """Of pairs of tokens, and of one direction's states."""
    rows = {"HEADS": kind.heads, "x_row": kind.x_row, "dy_row": dy_row}
    pairs = _launch(kind, kernels.ssd_pairs_backward, kind.grid, **rows, **kind.ways)
    return pairs, _launch(kind, kernels.ssd_states_backward, kind.grid, **rows)


def _launch(kind: SsdKind, kernel: Any, grid: tuple[int, int, int], **numbers: int) -> Launch:
    """Without stages: a pipeline of loads would take most of the shared memory, and so leave one program to a multiprocessor."""
    return Launch(kernel, grid, **kind.sizes, **numbers, num_warps=WARPS, num_stages=1)
