"""Every backend against the loop that defines the scan: outputs and all gradients."""

import pytest
import torch

from dis_scale.scan import Direction, two_way_scan


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_equals_the_reference(backend: str) -> None:
    torch.manual_seed(0)
    B, L, E, N = 2, 66, 33, 16
    shapes = [(B, L, E), (B, L, E), (E, N), (B, L, N), (B, L, N), (E,), (E,)]
    tensors = [torch.randn(s) for s in [*shapes, *shapes, (B, L, E)]]
    tensors[2], tensors[9] = -tensors[2].exp(), -tensors[9].exp()
    for x in tensors:
        x.requires_grad_()

    def run(name: str) -> list[torch.Tensor]:
        y = two_way_scan(Direction(*tensors[:7]), Direction(*tensors[7:14]), tensors[14], backend=name)
        return [y, *torch.autograd.grad(y.square().sum(), tensors)]

    for got, expected in zip(run(backend), run("reference"), strict=True):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
