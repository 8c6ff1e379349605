"""DiT's training pass against the public code's, by count: `python -m benchmarks.dit_counts`. Needs no GPU.

The public code is fast-DiT (a fork of Meta's DiT): its block with timm's attention through PyTorch's fused kernel, its mixed
precision written out as CUDA's autocast computes it. Both passes run on fake tensors of DiT-XL/2's shapes at 256 pixels; only
operations that launch a kernel count, and a byte counts each time that one of them reads or writes it. Kernels inside attention and
products are the same in both. Rows: a block's forward and backward pass, the same with the block recomputed as fast-DiT always
does, and the average of all weights, once per step.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dis_scale.models.dit.network import DiTBlock
from dis_scale.models.dit.settings import Dit
from dis_scale.models.families import preset

B, T = 32, 256
HALF = torch.bfloat16
Block = Callable[[Tensor, Tensor], Tensor]


class Counts(TorchDispatchMode):
    """Operations that launch kernels, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or "empty" in name or name in ("detach", "device", "_unsafe_view")):
            self.launches += 1
            self.bytes += sum(map(_bytes, tree_leaves((args, kwargs, result))))
        return result


def _bytes(value: Any) -> int:
    """Return the bytes of a tensor; of a broadcast one those that exist."""
    if not isinstance(value, Tensor):
        return 0
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


class PublicBlock(nn.Module):
    """A block of the public code under CUDA's autocast: products in half precision, norms and the stream in float32."""

    def __init__(self, settings: Dit):
        super().__init__()
        D, self.heads = settings.width, settings.heads
        widths = {"qkv": (D, 3 * D), "out": (D, D), "up": (D, 4 * D), "down": (4 * D, D), "modulation": (D, 6 * D)}
        self.layers = nn.ModuleDict({name: nn.Linear(*width) for name, width in widths.items()})

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        D = x_BTD.shape[-1]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._product("modulation", F.silu(c_BD)).chunk(6, dim=1)
        q, k, v = (
            self._product("qkv", self._modulated(x_BTD, shift_a, scale_a))
            .reshape(-1, T, 3, self.heads, D // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind()
        )
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, T, D)
        x_BTD = x_BTD + gate_a.unsqueeze(1) * self._product("out", heads)
        hidden = F.gelu(self._product("up", self._modulated(x_BTD, shift_m, scale_m)), approximate="tanh")
        return x_BTD + gate_m.unsqueeze(1) * self._product("down", hidden)

    def _product(self, name: str, x: Tensor) -> Tensor:
        layer = self.layers[name]
        assert isinstance(layer, nn.Linear)
        return F.linear(x.to(HALF), layer.weight.to(HALF), layer.bias.to(HALF))

    def _modulated(self, x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
        normed = F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=1e-6)
        return normed * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


def both_passes(block: nn.Module, stream: torch.dtype, *, recomputed: bool) -> Counts:
    """Count the forward and the backward pass of a block whose input is of type `stream`."""
    width = next(module.in_features for module in block.modules() if isinstance(module, nn.Linear))
    x_BTD = torch.empty(B, T, width, dtype=stream, requires_grad=True)
    c_BD = torch.empty(B, width, dtype=HALF, requires_grad=True)
    counts = Counts()
    with counts:
        out = checkpoint(block, x_BTD, c_BD, use_reentrant=False) if recomputed else block(x_BTD, c_BD)
        torch.autograd.grad(out, [x_BTD, c_BD, *block.parameters()], torch.empty_like(out))
    return counts


def averages(parameters: list[Tensor]) -> Iterator[tuple[str, Counts]]:
    """Count one average: ours of one flat tensor, the public one parameter by parameter."""
    flat = [torch.cat([each.flatten() for each in parameters])]
    with Counts() as ours:
        torch._foreach_lerp_([torch.empty_like(flat[0])], flat, 1e-4)
    yield "ours", ours
    with Counts() as public:
        for each in parameters:
            torch.empty_like(each).mul_(0.9999).add_(each, alpha=1e-4)
    yield "fast-DiT", public


def main() -> None:
    settings = Dit(**preset("DiT-XL/2"))
    with FakeTensorMode():
        for recomputed in (False, True):
            for name, block, stream in (("ours", DiTBlock(settings), HALF), ("fast-DiT", PublicBlock(settings), torch.float32)):
                how = "recomputed" if recomputed else "kept"
                _print(f"block, {how}", name, both_passes(block, stream, recomputed=recomputed))
        blocks = [DiTBlock(settings) for _ in range(settings.depth)]
        parameters = [parameter.detach() for block in blocks for parameter in block.parameters()]
        for name, counts in averages(parameters):
            _print("average of the weights", name, counts)


def _print(what: str, code: str, counts: Counts) -> None:
    row = {"name": what, "code": code, "launches": counts.launches, "gbytes": round(counts.bytes / 1e9, 2)}
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
