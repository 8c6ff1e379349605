"""Inputs of state-space duality, and its outputs and gradients by each backend."""

import torch
from torch import Tensor

from dis_scale.scan.duality import Way, ssd

Inputs = tuple[Tensor, Tensor, Way, Way]


def inputs(L: int, H: int, P: int, N: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """Of two images. Decays as in a trained mixer: some heads forget at once, some hardly. The same numbers in each type."""
    random = torch.Generator().manual_seed(L)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def way() -> Way:
        tensors = normal(2, L, H).exp() / 10, -normal(H).exp() * 4, normal(2, L, N), normal(2, L, N)
        return Way(*[x.to(dtype) for x in tensors])

    earlier, later = way(), way()
    return normal(2, L, H, P).to(dtype), normal(2, L, H).to(dtype), earlier, later


def outputs_and_gradients(given: tuple[Tensor, Tensor, Way | None, Way | None], *, exclusive: bool, backend: str) -> list[Tensor]:
    """y, and the gradients of x, own and of each direction's tensors; of the sum of y with cosines."""
    x, own, *ways = given
    leaves = [t.detach().requires_grad_() for t in (x, own, *[t for way in ways if way for t in way])]
    rest = iter(leaves[2:])
    earlier, later = (Way(*[next(rest) for _ in Way._fields]) if way else None for way in ways)
    y = ssd(leaves[0], leaves[1], earlier, later, exclusive, backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.cos(torch.arange(y.numel())).to(y).view_as(y))]
