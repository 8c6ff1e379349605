"""The norm behind a gate, of Mamba-2's mixer: rms_norm(y SiLU(z)) weight. Read next: triton_norm.py."""

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
    if not counts.active.get() and choose(backend, y_BLE.device).name == "triton":
        from dis_scale.scan import triton_norm  # here: Triton comes only with PyTorch's builds for Linux

        return triton_norm.gated_rms_norm(y_BLE, z_BLE, weight_E)
    return by_definition(y_BLE, z_BLE, weight_E)


def by_definition(y_BLE: Tensor, z_BLE: Tensor, weight_E: Tensor) -> Tensor:
    """By PyTorch's operations."""
    wide = torch.promote_types(y_BLE.dtype, torch.float32)
    gated_BLE = y_BLE.to(wide) * F.silu(z_BLE.to(wide))
    return F.rms_norm(gated_BLE, weight_E.shape, weight_E.to(wide), EPS).to(y_BLE.dtype)
