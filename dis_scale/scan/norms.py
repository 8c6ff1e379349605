"""Root-mean-square norms joined with the preceding operation: a gate, as in Mamba-2's mixer, or the sum of the residual stream.

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
    """Return the normalised y_BLE SiLU(z), computed in float32 or better, in y's type (Mamba-2's RMSNormGated, gate first)."""
    if counts.active.get() and y_BLE.dtype != torch.float32:  # as on a GPU, whose kernel keeps only its inputs
        return counts.keeping(by_definition, y_BLE, z_BLE, weight_E)
    if by_triton(y_BLE, backend):
        from dis_scale.scan import triton_norm  # here: Triton comes only with PyTorch's builds for Linux

        return triton_norm.gated_rms_norm(y_BLE, z_BLE, weight_E)
    return by_definition(y_BLE, z_BLE, weight_E)


def by_definition(y_BLE: Tensor, z_BLE: Tensor, weight_E: Tensor) -> Tensor:
    """Compute `gated_rms_norm` by PyTorch's operations."""
    wide = torch.promote_types(y_BLE.dtype, torch.float32)
    gated_BLE = y_BLE.to(wide) * F.silu(z_BLE.to(wide))
    return rms_norm(gated_BLE, weight_E).to(y_BLE.dtype)


def added_rms_norm(
    r_BLD: Tensor, h_BLD: Tensor, weight_D: Tensor, backend: str = "auto", places: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the stream r + h, in float32 or better, and its norm in h's type.

    `places` are two permutations (place, order), each (L): token l of the stream is h's token place[l]; the norm's token l is the
    stream's token order[l].
    """
    if h_BLD.is_cuda or backend == "triton":  # elsewhere torch.compile fuses the sum and the norm with their neighbours
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
    """Return x with its token order[l] at position l; x itself if there is no order."""
    if order_L is None:
        return x_BLD
    out_BLD: Tensor = _Reordered.apply(x_BLD, order_L)
    return out_BLD


class _Reordered(torch.autograd.Function):
    """`reordered` with a gradient that is copied to its positions; PyTorch's gather would add its gradient to zeros."""

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
    """Return whether Triton computes with x. While a network is priced, PyTorch's operations are used."""
    return not counts.active.get() and choose(backend, x.device).name == "triton"


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / rms(x) * weight, in x's type."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), EPS)


def normalised(r_BLD: Tensor, weight_D: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norm of the stream in `dtype`, the type of the products; priced as one kernel if it is not the stream's type."""
    return rms_norm(r_BLD, weight_D) if dtype == r_BLD.dtype else counts.fused(rms_norm, r_BLD, weight_D).to(dtype)
