"""Each block's forward and backward pass as two CUDA graphs: two launches instead of some forty that Python makes one by one.

For models whose blocks are so short that Python sets the pace (benchmarks/results/kernels.md#host-time). Everything around the
blocks runs as it does without. Called by loop.py after DeepSpeed has moved the weights to where they stay.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dis_scale.models.tokens import Backbone
from dis_scale.scan.backend import KeepingStates

CLOSE = 1e-3
"""Largest relative difference of a gradient by graphs: a GPU's attention adds gradients in no fixed order."""


class _Tensors(nn.Module):
    """A block as a function of the tensors among its inputs, those that `present` names: PyTorch captures only such."""

    def __init__(self, block: nn.Module, keeps_states: bool, present: list[bool]):
        super().__init__()
        self.block, self.keeps_states, self.present = block, keeps_states, present

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        inputs = [next(given) if there else None for there in self.present]
        if not self.keeps_states:
            return self.block(*inputs)
        with KeepingStates():
            return self.block(*inputs)


def graph_blocks(model: Backbone, images: int, passes: int) -> str:
    """Let the blocks of a model on a GPU run as graphs in passes of this many images; return what came of it, as a line.

    A step adds up the gradients of `passes` passes. Blocks stay as they are if they cannot be captured, or a graph computes other
    numbers.
    """
    x_BCHW, t_B, y_B, drop = _random_inputs(model, images)

    def results() -> tuple[Tensor, tuple[Tensor | None, ...]]:
        out_BCHW = model(x_BCHW, t_B, y_B, drop)
        weights = list(model.parameters())
        return out_BCHW.detach(), torch.autograd.grad(out_BCHW.float().square().mean(), weights, allow_unused=True)

    assert isinstance(model.blocks, nn.ModuleList)
    blocks = list(model.blocks)
    calls = _record(blocks, results)
    expected = results()
    plain = [block.forward for block in blocks]
    try:
        capture(blocks, calls, model.keeps_states, images)
        wrong = _difference(results(), expected)
    except RuntimeError as error:  # also if memory lacks
        wrong = str(error.__context__ or error).partition("\n")[0]
    if wrong:
        for block, forward in zip(blocks, plain, strict=True):
            block.forward = forward
        return f"each kernel of a block is launched by itself: {wrong}"
    if passes > 1:
        for block in blocks:
            for weight in block.parameters():  # else the next pass would overwrite what `.grad` took without a copy
                weight.register_hook(torch.clone)
    return f"{len(blocks)} blocks run as CUDA graphs in passes of {images} images"


def _random_inputs(model: Backbone, images: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    device, (channels, size) = next(model.parameters()).device, model.shape
    random = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(images, channels, size, size, generator=random).to(device)
    t_B = torch.rand(images, generator=random).to(device)
    y_B = None if model.num_classes is None else torch.arange(images, device=device) % model.num_classes
    drop = torch.ones(len(model.drop_rates), images, device=device) if model.drop_rates else None
    return x_BCHW, t_B, y_B, drop


def _record(blocks: list[nn.Module], run: Callable[[], object]) -> list[tuple[Tensor | None, ...]]:
    """Return each block's inputs in a pass, as tensors of their own that need gradients if the inputs did."""
    calls: dict[nn.Module, tuple[Tensor | None, ...]] = {}

    def keep(block: nn.Module, inputs: tuple[Tensor | None, ...]) -> None:
        calls[block] = tuple(x if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)

    hooks = [block.register_forward_pre_hook(keep) for block in blocks]
    run()
    for hook in hooks:
        hook.remove()
    return [calls[block] for block in blocks]


def capture(blocks: list[nn.Module], calls: list[tuple[Tensor | None, ...]], keeps_states: bool, images: int) -> None:
    """Replace the blocks' `forward`, for training with this many images, by graphs that share memory in the order of a pass."""
    present = [[x is not None for x in inputs] for inputs in calls]
    wrapped = [_Tensors(block, keeps_states, there) for block, there in zip(blocks, present, strict=True)]
    samples = tuple(tuple(x for x in inputs if x is not None) for inputs in calls)
    graphed = torch.cuda.make_graphed_callables(tuple(wrapped), samples, allow_unused_input=True)
    for block, graph, there in zip(blocks, graphed, present, strict=True):
        block.forward = _either(graph, block.forward, images, there)


def _either(graph: Callable[..., Any], plain: Callable[..., Any], images: int, present: list[bool]) -> Callable[..., Any]:
    """The graph for inputs as it was captured with, where gradients are needed; otherwise the block as it is."""

    def forward(*inputs: Tensor | None) -> Any:
        tensors = [x for x in inputs if x is not None]
        if torch.is_grad_enabled() and len(tensors[0]) == images and [x is not None for x in inputs] == present:
            return graph(*tensors)
        return plain(*inputs)

    return forward


def _difference(found: tuple[Tensor, tuple[Tensor | None, ...]], expected: tuple[Tensor, tuple[Tensor | None, ...]]) -> str | None:
    """What differs, if anything does."""
    if not torch.equal(found[0], expected[0]):
        return "its graph computes another output"
    for a, b in zip(found[1], expected[1], strict=True):
        if (a is None) != (b is None) or (a is not None and b is not None and (a - b).norm() > CLOSE * b.norm()):
            return "its graph computes another gradient"
    return None
