"""Root-mean-square norms with what precedes them: a gate, as in Mamba-2's mixer, or the sum of the residual stream.

Read next: triton_norm.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dis_scale.scan import choose, counts
from dis_scale.scan.graphs import outside_graphs

EPS = 1e-5


@outside_graphs
def gated_rms_norm(y_BLE: Tensor, z_BLE: Tensor, weight_E: Tensor, backend: str = "auto") -> Tensor:
    """The normalised y_BLE SiLU(z), computed in float32 or better, in y's type (Mamba-2's RMSNormGated, gate first)."""
    if counts.active.get() and y_BLE.dtype != torch.float32:  # as on a GPU, whose kernel keeps its inputs alone
        return counts.keeping(by_definition, y_BLE, z_BLE, weight_E)
    if by_triton(y_BLE, backend):
        from dis_scale.scan import triton_norm  # here: Triton comes only with PyTorch's builds for Linux

        return triton_norm.gated_rms_norm(y_BLE, z_BLE, weight_E)
    return by_definition(y_BLE, z_BLE, weight_E)


def by_definition(y_BLE: Tensor, z_BLE: Tensor, weight_E: Tensor) -> Tensor:
    """By PyTorch's operations."""
    wide = torch.promote_types(y_BLE.dtype, torch.float32)
    gated_BLE = y_BLE.to(wide) * F.silu(z_BLE.to(wide))
    return rms_norm(gated_BLE, weight_E).to(y_BLE.dtype)


def added_rms_norm(
    r_BLD: Tensor, h_BLD: Tensor, weight_D: Tensor, backend: str = "auto", places: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the stream r + h, in float32 or better, and its norm in h's type.

    `places` are two permutations (L): h has token l of the stream at the first one's [l], the norm has there the second one's [l].
    """
    if h_BLD.is_cuda or backend == "triton":  # elsewhere torch.compile joins the sum and the norm to what is around them
        both = _added_by_triton(r_BLD, h_BLD, weight_D, backend, places)
        if both is not None:
            return both
    if places is None:
        r_BLD = r_BLD + h_BLD
        return r_BLD, normalised(r_BLD, weight_D, h_BLD.dtype)
    place_L, order_L = places
    r_BLD = r_BLD + reordered(h_BLD, place_L)
    return r_BLD, reordered(normalised(r_BLD, weight_D, h_BLD.dtype), order_L)


def reordered(x_BLD: Tensor, order_L: Tensor | None) -> Tensor:
    """x with its token order[l] at l; x itself without an order."""
    if order_L is None:
        return x_BLD
    out_BLD: Tensor = _Reordered.apply(x_BLD, order_L)
    return out_BLD


class _Reordered(torch.autograd.Function):
    """Its gradient is copied to its places; that of PyTorch's gather would be added to zeros."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, order_L: Tensor) -> Tensor:
        ctx.save_for_backward(order_L)
        return x_BLD.index_select(1, order_L)

    @staticmethod
    def backward(ctx: Any, dout_BLD: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(dout_BLD).index_copy_(1, ctx.saved_tensors[0], dout_BLD), None


@outside_graphs
def _added_by_triton(
    r_BLD: Tensor, h_BLD: Tensor, weight_D: Tensor, backend: str, places: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor] | None:
    if not by_triton(h_BLD, backend) or r_BLD.dtype != torch.float32:
        return None
    from dis_scale.scan import triton_norm

    return triton_norm.added_rms_norm(r_BLD, h_BLD, weight_D, places)


def by_triton(x: Tensor, backend: str) -> bool:
    """Whether Triton computes with x: a network that is priced is computed by PyTorch's operations."""
    return not counts.active.get() and choose(backend, x.device).name == "triton"


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / rms(x) * weight, in x's type."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), EPS)


def normalised(r_BLD: Tensor, weight_D: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm of the stream, in the type of the products; priced as GPUs' fused kernel if that is bfloat16."""
    return rms_norm(r_BLD, weight_D) if dtype == r_BLD.dtype else counts.fused(rms_norm, r_BLD, weight_D).to(dtype)
