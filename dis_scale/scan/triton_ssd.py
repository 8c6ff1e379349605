"""State-space duality by the Triton backend. PyTorch's products compute the scores of a chunk's pairs of tokens, kernels the rest.

A forward pass keeps its inputs. Within `KeepingStates` it also keeps the states that enter the chunks. The backward pass computes
the exponents and the scores again. All runs give the same bits.

Axes: as in duality.py. Read next: triton_ssd_kernels.py, triton_ssd_mixer.py.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dis_scale.scan import triton_ssd_kernels as kernels
from dis_scale.scan.backend import differentiable_once, keeps_states, refuse_float64
from dis_scale.scan.duality import GPU_CHUNKS, Way, ways_of
from dis_scale.scan.triton_launch import Launch, ceil_div, empty_like, next_power_of_2, plain, rowwise

HEADS = 8
"""Maximum number of heads of a program. Fewer heads give more programs, and more parts of the gradients that heads share."""
WARPS = 8
"""Warps of a program. With fewer warps, tiles spill registers."""
LEAST_TILE = 16
"""Smallest tile size of a product on tensor cores."""
EXPONENTS, EXPONENTS_WARPS = 16, 4
"""Maximum number of heads, and number of warps, of a program that sums decays: with 64 tokens, a thread has 8 numbers."""


class CutWay(NamedTuple):
    """One direction's inputs for the kernels. The steps have evenly spaced rows; B and C are contiguous chunks (`SsdKind.cut`)."""

    step_BLH: Tensor
    A_H: Tensor
    B_BKQN: Tensor
    C_BKQN: Tensor


class Mixed(NamedTuple):
    """One direction's factors in each chunk, contiguous.

    `reach` and `leave` are the exponents of pairs of tokens. `taken` is a token's weight on the state that enters the chunk.
    `weight` is its weight in the state that leaves the chunk. `decay` is the state's decay in the chunk.
    """

    reach_BKHQ: Tensor
    leave_BKHQ: Tensor
    taken_BKHQ: Tensor
    weight_BKHQ: Tensor
    decay_BKH: Tensor
    B_BKQN: Tensor
    C_BKQN: Tensor


class SsdKind(NamedTuple):
    """Properties of a call that determine its launches."""

    device: torch.device
    dtype: torch.dtype
    B: int
    L: int
    H: int
    P: int
    N: int
    present: tuple[bool, bool]
    exclusive: bool
    x_row: int

    @property
    def chunks(self) -> int:
        return ceil_div(self.L, GPU_CHUNKS[self.dtype.itemsize])

    @property
    def tokens(self) -> int:
        """Tokens of a chunk."""
        return ceil_div(self.L, self.chunks)

    @property
    def heads(self) -> int:
        """Heads of a program: the largest divisor of H up to HEADS."""
        return max(heads for heads in range(1, HEADS + 1) if self.H % heads == 0)

    @property
    def programs(self) -> int:
        """Programs of a chunk."""
        return self.H // self.heads

    @property
    def grid(self) -> tuple[int, int, int]:
        """Grid of the kernels whose programs compute some heads of a chunk."""
        return self.B * self.chunks, self.programs, 1

    @property
    def reverse(self) -> list[bool]:
        """Flag for each direction that is present: true for the direction of the later tokens."""
        return [late for late in (False, True) if self.present[late]]

    @property
    def sizes(self) -> dict[str, int]:
        tiles = {"TOKENS": self.tokens, "CHANNELS": self.P, "STATES": self.N}
        sizes = {"L": self.L, "H": self.H, "P": self.P, "N": self.N, "K": self.chunks, "Q": self.tokens}
        return sizes | {name: max(LEAST_TILE, next_power_of_2(size)) for name, size in tiles.items()}

    @property
    def ways(self) -> dict[str, bool]:
        return {"EARLIER": self.present[0], "LATER": self.present[1]}

    def cut(self, x_BLN: Tensor, shift: int = 0) -> Tensor:
        """Return B or C in chunks, padded with zeros. With a shift, token i gets the values of token i - shift."""
        behind = self.chunks * self.tokens - self.L - shift
        return plain(F.pad(x_BLN, (0, 0, shift, behind)).unflatten(1, (self.chunks, self.tokens)))

    def join(self, d_BKQN: Tensor, into_BLN: Tensor, shift: int = 0) -> Tensor:
        """Store in `into_BLN` the gradient of the input of `cut`, from the gradient of its output; return `into_BLN`."""
        first, last = max(shift, 0), self.L + min(shift, 0)
        into_BLN[:, first - shift : last - shift] = d_BKQN.flatten(1, 2)[:, first:last]
        if shift:
            into_BLN[:, slice(-shift, None) if shift > 0 else slice(-shift)].zero_()
        return into_BLN


def ssd(x_BLHP: Tensor, own_BLH: Tensor, earlier: Way | None, later: Way | None, exclusive: bool) -> Tensor:
    """Compute `duality.ssd` of checked inputs. B and C are rounded to x's type; the steps, A and own are float32."""
    refuse_float64("triton", x_BLHP, own_BLH, *(earlier or ()), *(later or ()))
    ways = list[Tensor]()
    for way in filter(None, (earlier, later)):
        ways += [way.step_BLH.float(), way.A_H.float(), way.B_BLN.to(x_BLHP), way.C_BLN.to(x_BLHP)]
    present = earlier is not None, later is not None
    y_BLHP: Tensor = _Ssd.apply(present, exclusive, x_BLHP, own_BLH.float(), *ways)
    return y_BLHP


class _Ssd(torch.autograd.Function):
    """Autograd function of `ssd`; its `ways` are the tensors of the directions that are present."""

    @staticmethod
    def forward(ctx: Any, present: tuple[bool, bool], exclusive: bool, x_BLHP: Tensor, own_BLH: Tensor, *ways: Tensor) -> Tensor:
        ctx.present, ctx.exclusive = present, exclusive
        with torch.cuda.device_of(x_BLHP):
            kind, x_BLE, chunks = _inputs(x_BLHP, ways, present, exclusive)
            y_BLE, states = run_ssd(kind, x_BLE, plain(own_BLH), chunks)
        ctx.save_for_backward(x_BLHP, own_BLH, *ways, *states)
        return y_BLE.view(x_BLHP.shape)

    @staticmethod
    @differentiable_once("triton scan")
    def backward(ctx: Any, dy_BLHP: Tensor) -> tuple[Tensor | None, ...]:
        (x_BLHP, own_BLH, *saved), given = ctx.saved_tensors, len(Way._fields) * sum(ctx.present)
        ways, states = saved[:given], saved[given:]
        with torch.cuda.device_of(dy_BLHP):
            kind, x_BLE, chunks = _inputs(x_BLHP, ways, ctx.present, ctx.exclusive)
            dx_BLE, dsteps = empty_like(x_BLE), [empty_like(each.step_BLH) for each in chunks]
            dy_BLE = rowwise(dy_BLHP.flatten(2))
            down_BLH, gradients = run_ssd_backward(kind, x_BLE, dy_BLE, plain(own_BLH), chunks, states, dx_BLE, dsteps)
            of_ways = list[Tensor]()
            for each, way in zip(gradients, ways_of(ways), strict=True):
                shared = zip(each[2:], way[2:], strict=True)
                of_ways += [*each[:2], *[kind.join(d_BKQN, empty_like(x_BLN)) for d_BKQN, x_BLN in shared]]
            return None, None, dx_BLE.view(x_BLHP.shape), down_BLH, *of_ways


def _inputs(
    x_BLHP: Tensor, ways: Sequence[Tensor], present: tuple[bool, bool], exclusive: bool
) -> tuple[SsdKind, Tensor, list[CutWay]]:
    (B, L, H, P), x_BLE = x_BLHP.shape, rowwise(x_BLHP.flatten(2))
    kind = SsdKind(x_BLHP.device, x_BLHP.dtype, B, L, H, P, ways[2].shape[2], present, exclusive, x_BLE.stride(1))
    return kind, x_BLE, [CutWay(plain(way[0]), plain(way[1]), kind.cut(way[2]), kind.cut(way[3])) for way in ways_of(ways)]


def _mixed(kind: SsdKind, ways: Sequence[CutWay]) -> tuple[list[Mixed], Tensor]:
    """Return each direction's factors, and the scores C . B of each chunk's pairs of tokens.

    With both directions, scores of the earlier one are below the diagonal, those of the later one above it.
    """
    mixed = list[Mixed]()
    for way, reverse in zip(ways, kind.reverse, strict=True):
        exponents = way.A_H.new_empty(4, kind.B, kind.chunks, kind.H, kind.tokens).unbind()
        decay_BKH = way.A_H.new_empty(kind.B, kind.chunks, kind.H)
        _exponents_launch(kind, way.step_BLH.stride(1), reverse)(way.step_BLH, way.A_H, *exponents, decay_BKH)
        mixed.append(Mixed._make((*exponents, decay_BKH, way.B_BKQN, way.C_BKQN)))
    scores = [each.C_BKQN @ each.B_BKQN.transpose(2, 3) for each in mixed]
    if len(mixed) == 1:
        return mixed, scores[0]
    token = torch.arange(kind.tokens, device=kind.device)
    return mixed, torch.where(token[:, None] > token, scores[0], scores[1])


def _entering_states(kind: SsdKind, x_BLE: Tensor, mixed: Sequence[Mixed]) -> list[Tensor]:
    """Return for each direction the states that enter its chunks, except its first chunk: (B, K - 1, H, N, P), in x's type."""
    ways = [(each.B_BKQN, each.weight_BKHQ, each.decay_BKH) for each in mixed]
    return _passed(kind, x_BLE, ways, backward=False)


def _passed(kind: SsdKind, v_BLE: Tensor, ways: Sequence[tuple[Tensor, Tensor, Tensor]], backward: bool) -> list[Tensor]:
    """Return the states that each direction (U, weight, decay) sums from v. With one chunk, return tensors that are not used."""
    if kind.chunks == 1:
        return [v_BLE] * len(ways)
    states = v_BLE.new_empty(len(ways), kind.B, kind.chunks - 1, kind.H, kind.N, kind.P).unbind()
    both = _both([(*way, each) for way, each in zip(ways, states, strict=True)])
    _states_launch(kind, v_BLE.stride(1), backward)(v_BLE, *both)
    return list(states)


def run_ssd(kind: SsdKind, x_BLE: Tensor, own_BLH: Tensor, ways: Sequence[CutWay]) -> tuple[Tensor, list[Tensor]]:
    """Return y (B, L, E), and for each direction the states that enter the chunks. The inputs are in the kernels' layout.

    States that are not kept are empty tensors: a recomputed block must save as many tensors as in its first pass.
    """
    (mixed, scores), y_BLE = _mixed(kind, ways), empty_like(x_BLE)
    states = _entering_states(kind, x_BLE, mixed)
    taking = [(each.C_BKQN, each.taken_BKHQ, state) for each, state in zip(mixed, states, strict=True)]
    _outputs_launch(kind)(x_BLE, own_BLH, scores, *_both([each[:2] for each in mixed]), *_both(taking), y_BLE)
    keep = kind.chunks > 1 and keeps_states()
    return y_BLE, states if keep else [x_BLE.new_empty(0) for _ in states]


def run_ssd_backward(
    kind: SsdKind,
    x_BLE: Tensor,
    dy_BLE: Tensor,
    own_BLH: Tensor,
    ways: Sequence[CutWay],
    states: Sequence[Tensor],
    dx_BLE: Tensor,
    dsteps: Sequence[Tensor],
) -> tuple[Tensor, list[CutWay]]:
    """Store the gradients of x and of each direction's steps; return the gradient of own and those of each direction's inputs.

    If the forward pass did not keep its states, they are computed again. The gradients of B and C are float32, or of x's type
    if an image has one chunk.
    """
    (mixed, scores), down_BLH = _mixed(kind, ways), torch.empty_like(own_BLH)
    pairs, of_states = _backward_launches(kind, dy_BLE.stride(1), dx_BLE.stride(1))
    dstates = _passed(kind, dy_BLE, [(each.C_BKQN, each.taken_BKHQ, each.decay_BKH) for each in mixed], backward=True)
    adding = [(each.B_BKQN, each.weight_BKHQ, dstate) for each, dstate in zip(mixed, dstates, strict=True)]
    new = [Mixed(*[torch.empty_like(x) for x in each[:5]], *[_parts(kind, x) for x in each[5:]]) for each in mixed]
    dscores = _parts(kind, scores)
    pairs(
        x_BLE, dy_BLE, own_BLH, scores, *_both([each[:2] for each in mixed]), *_both(adding), dx_BLE, down_BLH, dscores,
        *_both([each[:2] for each in new]),
    )  # fmt: skip
    if kind.chunks > 1:
        states = states if states[0].numel() else _entering_states(kind, x_BLE, mixed)
        through = [
            (each.B_BKQN, each.C_BKQN, each.taken_BKHQ, each.weight_BKHQ, *both)
            for each, *both in zip(mixed, states, dstates, strict=True)
        ]
        of_states(x_BLE, dy_BLE, *_both(through), *_both([each[2:] for each in new]))
    dscores_BKQQ, gradients = dscores.sum(0).to(scores.dtype), list[CutWay]()
    for way, each, d, dstep_BLH, reverse in zip(ways, mixed, new, dsteps, kind.reverse, strict=True):
        half_BKQQ = dscores_BKQQ.triu(1) if reverse else dscores_BKQQ.tril(-1)
        dB, dC = half_BKQQ.mT @ each.C_BKQN, half_BKQQ @ each.B_BKQN
        if kind.chunks > 1:
            dB, dC = dB + d.B_BKQN.sum(0), dC + d.C_BKQN.sum(0)
        dA_BKH = torch.empty_like(each.decay_BKH)
        launch = _exponents_backward_launch(kind, way.step_BLH.stride(1), dstep_BLH.stride(1), reverse)
        launch(way.step_BLH, way.A_H, *each[2:5], *d[:5], dstep_BLH, dA_BKH)
        gradients.append(CutWay(dstep_BLH, dA_BKH.sum((0, 1)), dB, dC))
    return down_BLH, gradients


def _parts(kind: SsdKind, x: Tensor) -> Tensor:
    """Return memory for the gradient of a tensor that heads share: one part per program of a chunk."""
    return x.new_empty(kind.programs, *x.shape, dtype=torch.float32)


def _both(ways: Sequence[Any]) -> tuple[Any, Any]:
    """Return a value for each direction. An absent direction gets the other's value, which is not used."""
    return ways[0], ways[-1]


@functools.cache
def _states_launch(kind: SsdKind, v_row: int, backward: bool) -> Launch:
    """Return the launch of `ssd_states`, with one program per image, head and direction."""
    programs = kind.B * kind.H * sum(kind.present)
    return _launch(kind, kernels.ssd_states, (programs, 1, 1), v_row=v_row, BACKWARD=backward, **kind.ways)


@functools.cache
def _outputs_launch(kind: SsdKind) -> Launch:
    return _launch(kind, kernels.ssd_outputs, kind.grid, HEADS=kind.heads, x_row=kind.x_row, **kind.ways)


@functools.cache
def _backward_launches(kind: SsdKind, dy_row: int, dx_row: int) -> tuple[Launch, Launch]:
    """Return the launches of `ssd_pairs_backward` and of `ssd_states_backward`."""
    rows = {"HEADS": kind.heads, "x_row": kind.x_row, "dy_row": dy_row, **kind.ways}
    pairs = _launch(kind, kernels.ssd_pairs_backward, kind.grid, **rows, dx_row=dx_row)
    directions = kind.B * kind.chunks * sum(kind.present), kind.programs, 1
    return pairs, _launch(kind, kernels.ssd_states_backward, directions, **rows)


@functools.cache
def _exponents_launch(kind: SsdKind, step_row: int, reverse: bool) -> Launch:
    return _of_exponents(kind, kernels.ssd_exponents, reverse, step_row=step_row)


@functools.cache
def _exponents_backward_launch(kind: SsdKind, step_row: int, dstep_row: int, reverse: bool) -> Launch:
    return _of_exponents(kind, kernels.ssd_exponents_backward, reverse, step_row=step_row, dstep_row=dstep_row)


def _of_exponents(kind: SsdKind, kernel: Any, reverse: bool, **rows: int) -> Launch:
    """Return a launch of one direction's exponents, whose programs compute some heads of a chunk."""
    heads, sizes = min(EXPONENTS, next_power_of_2(kind.H)), {name: kind.sizes[name] for name in ("L", "H", "K", "Q", "TOKENS")}
    flags = {"REVERSE": reverse, "EXCLUSIVE": kind.exclusive, "HEADS": heads, "num_warps": EXPONENTS_WARPS}
    return Launch(kernel, (kind.B * kind.chunks, ceil_div(kind.H, heads), 1), **sizes, **rows, **flags)


def _launch(kind: SsdKind, kernel: Any, grid: tuple[int, int, int], **numbers: int) -> Launch:
    """Return a launch without pipelined loads, which would use most shared memory and leave one program per multiprocessor."""
    return Launch(kernel, grid, **kind.sizes, **numbers, num_warps=WARPS, num_stages=1)
