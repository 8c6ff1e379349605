"""The baseline's attention on a GPU. Skipped if PyTorch finds none. Needs no conftest."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dis_scale.models import build
from dis_scale.models.dit.settings import Dit
from dis_scale.models.families import preset
from dis_scale.recipe import LatentShape

if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU here", allow_module_level=True)

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", ["DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2"])
def test_a_fused_kernel_takes_every_precision(size: str, precision: str) -> None:
    """PyTorch raises if none of them takes a block's queries, keys and values, also in the backward pass."""
    settings = Dit(**preset(size) | {"depth": 1})
    model = build(settings, LatentShape(4, 32), 10, precision=precision).cuda()  # type: ignore[arg-type]
    with sdpa_kernel(FUSED):
        out = model(torch.randn(2, 4, 32, 32, device="cuda"), torch.rand(2, device="cuda"), torch.arange(2).cuda())
        out.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
