"""State-space duality (SSD, Mamba-2; Dao and Gu, arXiv 2405.21060) in both directions: each head forgets by one factor a token.

So matrix products mix a chunk of tokens, where the selective scan goes from token to token. Each pair of tokens belongs to one
direction: `earlier` mixes the tokens before a token into it, `later` those after it. `own` is a token's weight on itself. So both
directions of Hydra (Hwang et al., arXiv 2407.09941) are one matrix for each head.

Axes: B batch, L tokens, H heads, P channels of a head, N states, K chunks, Q tokens of a chunk. Read next: ../models/dis/ssd.py.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dis_scale.process.errors import UserError
from dis_scale.scan import choose, counts, require_like
from dis_scale.scan.backend import differentiable_once
from dis_scale.scan.graphs import outside_graphs

CHUNK = 64
"""Most tokens of a chunk: as many as a head has channels and states, so that its products cost no more than its state's."""
GPU_CHUNKS = {2: CHUNK, 4: 32}
"""Most tokens of a chunk on a GPU, by the bytes of a number: the chunk's pairs of tokens are in registers."""
MACS = 2.5
"""Multiply-adds per channel, state, token and direction, as a recurrence: 5 FLOPs."""
LEAST_STEP = 1e-30
"""Lower limit of a step, so that its logarithm is finite."""

Form = Callable[[Tensor, Tensor, "Way | None", "Way | None", bool], Tensor]


class Way(NamedTuple):
    """Inputs of one direction: the positive step, the negative A, and the B and C that all heads share."""

    step_BLH: Tensor
    A_H: Tensor
    B_BLN: Tensor
    C_BLN: Tensor


@outside_graphs
def ssd(
    x_BLHP: Tensor, own_BLH: Tensor, earlier: Way | None, later: Way | None, exclusive: bool = False, backend: str = "auto"
) -> Tensor:
    """Return y_BLHP: for token i own_i x_i + C_i . S_i, with the state S_i of the tokens before it, plus C_i . S_i of those after.

    S_i = a_i (S_{i-1} + step_{i-1} B_{i-1} x_{i-1}) with a_i = exp(step_i A): earlier tokens have decayed by the token's own
    factor, as in Mamba-2. `exclusive` omits that factor, as in Hydra, which shifts outputs by one. Computes in float32, or in
    float64 if x is float64. The `reference` backend is the recurrence, all others compute in chunks.
    """
    ways = [way for way in (earlier, later) if way]
    _check(x_BLHP, own_BLH, ways)
    if counter := counts.active.get():
        N, size = ways[0].B_BLN.shape[-1], x_BLHP.element_size()
        counts.report("ssd", MACS * len(ways) * x_BLHP.numel() * N + x_BLHP.numel())
        chunks = math.ceil(x_BLHP.shape[1] / GPU_CHUNKS.get(size, CHUNK))
        counter.states += len(ways) * (chunks - 1) * N * x_BLHP[:, 0].numel() * size
        return counts.keeping(counts.like_first, x_BLHP, own_BLH, *itertools.chain(*ways))
    name = choose(backend, x_BLHP.device).name
    if name == "triton":
        from dis_scale.scan import triton_ssd  # here: Triton comes only with PyTorch's builds for Linux

        return triton_ssd.ssd(x_BLHP, own_BLH, earlier, later, exclusive)
    dtype = torch.promote_types(x_BLHP.dtype, torch.float32)
    inputs = [x.to(dtype) for x in (x_BLHP, own_BLH, *itertools.chain(*ways))]
    present = earlier is not None, later is not None
    if name == "reference":
        return _of_tensors(recurrence, present, exclusive, inputs).to(x_BLHP.dtype)
    y_BLHP: Tensor = _Recomputed.apply(present, exclusive, *inputs)
    return y_BLHP.to(x_BLHP.dtype)


def recurrence(x_BLHP: Tensor, own_BLH: Tensor, earlier: Way | None, later: Way | None, exclusive: bool) -> Tensor:
    """The definition: a plain loop over the tokens."""
    y_BLHP = own_BLH[..., None] * x_BLHP
    if earlier:
        y_BLHP = y_BLHP + _one_way(x_BLHP, earlier, exclusive)
    if later:
        reverse = Way(*[x.flip(1) if x.ndim == 3 else x for x in later])
        y_BLHP = y_BLHP + _one_way(x_BLHP.flip(1), reverse, exclusive).flip(1)
    return y_BLHP


def _one_way(x_BLHP: Tensor, way: Way, exclusive: bool) -> Tensor:
    step_BLH, A_H, B_BLN, C_BLN = way
    tokens = zip(*[x.unbind(1) for x in (x_BLHP, step_BLH, B_BLN, C_BLN)], strict=True)
    S_BHNP, ys = x_BLHP.new_zeros(()), []
    for x_BHP, step_BH, B_BN, C_BN in tokens:
        decayed = (step_BH * A_H).exp()[..., None, None] * S_BHNP
        ys.append((C_BN[:, None, :, None] * (S_BHNP if exclusive else decayed)).sum(2).expand_as(x_BHP))
        S_BHNP = decayed + B_BN[:, None, :, None] * (step_BH[..., None] * x_BHP)[:, :, None]
    return torch.stack(ys, 1)


class _Recomputed(torch.autograd.Function):
    """`chunked`, which keeps only the inputs for the backward pass: all pairs of tokens would take many times the memory."""

    @staticmethod
    def forward(ctx: Any, present: tuple[bool, bool], exclusive: bool, *inputs: Tensor) -> Tensor:
        ctx.present, ctx.exclusive = present, exclusive
        ctx.save_for_backward(*inputs)
        return _of_tensors(chunked, present, exclusive, inputs)

    @staticmethod
    @differentiable_once("chunked scan")
    def backward(ctx: Any, dy_BLHP: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            y_BLHP = _of_tensors(chunked, ctx.present, ctx.exclusive, leaves)
        return None, None, *torch.autograd.grad(y_BLHP, leaves, dy_BLHP)


def _of_tensors(form: Form, present: tuple[bool, bool], exclusive: bool, inputs: Sequence[Tensor]) -> Tensor:
    """Apply `recurrence` or `chunked` to x, own and the tensors of the ways that are present."""
    ways = ways_of(inputs[2:])
    earlier, later = ways[0] if present[0] else None, ways[-1] if present[1] else None
    return form(inputs[0], inputs[1], earlier, later, exclusive)


def ways_of(tensors: Sequence[Tensor]) -> list[Way]:
    """The directions with these tensors one after the other."""
    return [Way(*each) for each in zip(*[iter(tensors)] * len(Way._fields), strict=True)]


def chunked(x_BLHP: Tensor, own_BLH: Tensor, earlier: Way | None, later: Way | None, exclusive: bool, most: int = CHUNK) -> Tensor:
    """Compute products within chunks of equal length, at most `most` tokens, and pass a state from chunk to chunk.

    Exponents are differences of sums over tokens. The sums are float64: in float32, differences of large sums would lose digits.
    """
    L = x_BLHP.shape[1]
    K = math.ceil(L / most)
    parts = functools.partial(cut, K=K, Q=math.ceil(L / K))
    x_BKQHP = parts(x_BLHP)
    token = torch.arange(x_BKQHP.shape[2], device=x_BLHP.device)
    exponent, product, passed = x_BLHP.new_tensor(-math.inf, dtype=torch.float64), x_BLHP.new_zeros(()), x_BLHP.new_zeros(())
    for way, reverse, mine_QQ in ((earlier, False, token[:, None] > token), (later, True, token[:, None] < token)):
        if way is None:
            continue
        one = Exponents.of(parts(way.step_BLH.double()), way.A_H.double(), exclusive, reverse)
        B_BKQN, C_BKQN = parts(way.B_BLN), parts(way.C_BLN)
        exponent = torch.where(mine_QQ, one.reach_BKHQ[..., None] + one.leave_BKHQ[..., None, :], exponent)
        product = torch.where(mine_QQ, C_BKQN @ B_BKQN.transpose(2, 3), product)
        if K > 1:
            passed = passed + _passed(x_BKQHP, one, B_BKQN, C_BKQN, reverse)
    mixing_BKHQQ = exponent.to(x_BLHP).exp() * product.unsqueeze(2)
    y_BKQHP = passed + (mixing_BKHQQ @ x_BKQHP.transpose(2, 3)).transpose(2, 3)
    return y_BKQHP.flatten(1, 2)[:, :L] + own_BLH[..., None] * x_BLHP


def cut(x: Tensor, K: int, Q: int) -> Tensor:
    """(B, L, ...) to (B, K, Q, ...), padded with zeros."""
    padded: Tensor = F.pad(x, (0, 0) * (x.ndim - 2) + (0, K * Q - x.shape[1]))
    chunks: Tensor = padded.unflatten(1, (K, Q))
    return chunks


class Exponents(NamedTuple):
    """Exponents of a chunk: token i has the weight exp(reach_i + leave_j) on token j, and exp(reach_i) on the entering state."""

    reach_BKHQ: Tensor
    leave_BKHQ: Tensor
    total_BKH: Tensor
    """Exponent of the complete chunk, by which the entering state decays."""

    @classmethod
    def of(cls, step_BKQH: Tensor, A_H: Tensor, exclusive: bool, reverse: bool) -> "Exponents":
        step_BKHQ = step_BKQH.transpose(2, 3)
        decay_BKHQ = step_BKHQ * A_H[:, None]
        sums = decay_BKHQ.flip(-1).cumsum(-1).flip(-1) if reverse else decay_BKHQ.cumsum(-1)
        leave_BKHQ = step_BKHQ.clamp(min=LEAST_STEP).log() - sums
        return cls(sums - decay_BKHQ if exclusive else sums, leave_BKHQ, sums[..., 0 if reverse else -1])


def _passed(x_BKQHP: Tensor, one: Exponents, B_BKQN: Tensor, C_BKQN: Tensor, reverse: bool) -> Tensor:
    """Return the outputs of each chunk's tokens from the entering state. None enters the first chunk; the last's is not used."""
    H, P = x_BKQHP.shape[-2:]
    givers, takers = (slice(1, None), slice(-1)) if reverse else (slice(-1), slice(1, None))
    weight_BKQH = (one.total_BKH[..., None] + one.leave_BKHQ)[:, givers].to(x_BKQHP).exp().transpose(2, 3)
    added = (B_BKQN[:, givers].transpose(2, 3) @ (weight_BKQH[..., None] * x_BKQHP[:, givers]).flatten(3)).unflatten(3, (H, P))
    chunks = list(zip(added.unbind(1), one.total_BKH[:, givers].to(x_BKQHP).exp().unbind(1), strict=True))
    state, entering = x_BKQHP.new_zeros(()), []
    for added_BNHP, decay_BH in reversed(chunks) if reverse else chunks:
        state = decay_BH[:, None, :, None] * state + added_BNHP
        entering.append(state)
    states_BKNHP = torch.stack(entering[::-1] if reverse else entering, 1)
    taken_BKQHP = (C_BKQN[:, takers] @ states_BKNHP.flatten(3)).unflatten(3, (H, P))
    decayed_BKQHP = one.reach_BKHQ[:, takers].to(x_BKQHP).exp().transpose(2, 3)[..., None] * taken_BKQHP
    nothing = torch.zeros_like(decayed_BKQHP[:, :1])
    return torch.cat([decayed_BKQHP, nothing] if reverse else [nothing, decayed_BKQHP], 1)


def _check(x_BLHP: Tensor, own_BLH: Tensor, ways: list[Way]) -> None:
    if x_BLHP.ndim != 4 or 0 in x_BLHP.shape or not ways or ways[0].B_BLN.ndim != 3 or not ways[0].B_BLN.shape[2]:
        raise UserError(f"ssd: x_BLHP is {tuple(x_BLHP.shape)}, expected 4 axes, none empty, and a direction with a state at least")
    B, L, H, _ = x_BLHP.shape
    N = ways[0].B_BLN.shape[2]
    expected = {"own_BLH": (B, L, H), "step_BLH": (B, L, H), "A_H": (H,), "B_BLN": (B, L, N), "C_BLN": (B, L, N)}
    given = [("own_BLH", own_BLH)] + [named for way in ways for named in way._asdict().items()]
    for name, x in [("x_BLHP", x_BLHP), *given]:
        require_like(f"ssd: {name}", x, expected.get(name, x_BLHP.shape), x_BLHP.device)
