"""Joins the weights of each block into few parameters for training: DeepSpeed and autograd spend Python time on each parameter.

A DiS block has seven or nine weights, and a DeepSpeed hook takes 23 to 33 us (benchmarks/results/kernels.md#host-time). Joined
weights are views of one parameter while the block's `forward` runs, and their gradients are one tensor. Stored weights keep their
own names and shapes. Called by engine.py.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from dis_scale.models.tokens import Backbone


class Weight(NamedTuple):
    """A weight of the model: its name and its number of elements."""

    name: str
    size: int


Weights = dict[nn.Parameter, list[Weight]]
"""The weights that each parameter holds, one after the other."""
Groups = list[dict[str, Any]]
"""Groups of an optimizer: their `params`, which have one rate and one weight decay."""


class _Place(NamedTuple):
    """Where a block finds a weight: its module, its name there, and its shape."""

    module: nn.Module
    name: str
    shape: torch.Size


def weights_of(model: nn.Module) -> Weights:
    """Return the table of a model whose weights are not joined: each parameter holds one weight."""
    return {p: [Weight(name, p.numel())] for name, p in model.named_parameters()}


def join_blocks(model: Backbone, groups: Groups, most: int) -> Weights:
    """Join the weights of each block that one optimizer group holds into parameters of at most `most` elements.

    Changes the model and the groups. Returns the weights that each parameter holds. A block has its weights only while its
    `forward` runs: not before, in hooks or in its backward pass. No two modules may share a weight.
    """
    held = weights_of(model)
    assert isinstance(model.blocks, nn.ModuleList)
    for block in model.blocks:
        own = {p: (module, name) for module in block.modules() for name, p in module.named_parameters(recurse=False)}
        joined = list[tuple[str, list[_Place]]]()
        for group in groups:
            for weights in _parts([p for p in group["params"] if p in own], most):
                flat = nn.Parameter(torch.cat([p.detach().flatten() for p in weights]))
                held[flat] = [weight for p in weights for weight in held.pop(p)]
                gone = set(weights[1:])
                group["params"] = [flat if p is weights[0] else p for p in group["params"] if p not in gone]
                joined.append((f"joined_{len(joined)}", [_taken(*own[p], p) for p in weights]))
                block.register_parameter(joined[-1][0], flat)
        if joined:
            block.forward = _with_weights(block, block.forward, joined)
    return held


def _parts(weights: Sequence[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """Yield groups of two or more consecutive weights that have at most `most` elements together."""
    part, size = list[nn.Parameter](), 0
    for weight in weights:
        if size + weight.numel() > most:
            if len(part) > 1:
                yield part
            part, size = [], 0
        part.append(weight)
        size += weight.numel()
    if len(part) > 1:
        yield part


def _taken(module: nn.Module, name: str, weight: nn.Parameter) -> _Place:
    """Remove a weight from its module; return its place."""
    delattr(module, name)
    return _Place(module, name, weight.shape)


def _with_weights(block: nn.Module, plain: Callable[..., Any], joined: list[tuple[str, list[_Place]]]) -> Callable[..., Any]:
    """Return a `forward` during which the block's weights are views of its joined parameters."""
    split = [(name, [place.shape.numel() for place in places], places) for name, places in joined]

    def forward(*inputs: Any) -> Any:
        for name, sizes, places in split:
            for place, part in zip(places, getattr(block, name).split(sizes), strict=True):
                vars(place.module)[place.name] = part.view(place.shape)
        try:
            return plain(*inputs)
        finally:
            for _, _, places in split:
                for place in places:
                    vars(place.module).pop(place.name, None)

    return forward
