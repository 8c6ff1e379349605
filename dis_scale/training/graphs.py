"""Each block's forward and backward pass as two CUDA graphs: two launches instead of some forty that Python makes one by one.

For models whose blocks are so short that Python sets the pace (benchmarks/results/kernels.md#host-time). Everything around the
blocks runs as without graphs. Called by attempt.py after DeepSpeed has moved the weights to where they stay.
"""

import math
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dis_scale.models.tokens import Backbone
from dis_scale.process.errors import UserError
from dis_scale.scan.backend import KeepingStates
from dis_scale.training.devices import lacks_memory
from dis_scale.training.joined import Weights

CLOSE = 1e-3
"""Largest difference of a weight's gradient by graphs, relative to its norm or, if that is larger, to CLOSE times the norm of all
gradients. Gradients may differ because attention adds in no fixed order."""

Inputs = tuple[Tensor | None, ...]
MakeGraphs = Callable[..., tuple[Callable[..., Any], ...]]
"""`torch.cuda.make_graphed_callables`."""
Results = tuple[Tensor, list[Tensor]]


def graph_blocks(
    model: Backbone, weights: Weights, images: int, *, adds_up: bool,
    make_graphs: MakeGraphs = torch.cuda.make_graphed_callables,
) -> str:  # fmt: skip
    """Run the blocks of a model on a GPU as graphs in passes of this many images; return a line for the log.

    `weights` lists the weights that each parameter holds: gradients are compared by weight. `adds_up`: the gradients of several
    passes are added up in `.grad`. Raises UserError if PyTorch cannot capture the blocks, or if their graphs compute other numbers.
    Raises OutOfMemoryError if memory is too small. A failed capture leaves CUDA unusable for this process.
    """
    assert isinstance(model.blocks, nn.ModuleList)
    blocks, inputs = list(model.blocks), _random_inputs(model, images)
    kept = [weight.detach().clone() for weight in model.parameters()]
    with torch.no_grad():
        for weight in model.parameters():  # at first the output of some models does not depend on their blocks
            weight.add_(0.02 * torch.randn_like(weight))
    calls, expected = _record(blocks, model, weights, inputs)
    try:
        capture(blocks, calls, keeps_states=model.keeps_states, images=images, make_graphs=make_graphs)
    except RuntimeError as error:
        if lack := next((each for each in (error, error.__context__) if each and lacks_memory(each)), None):
            raise torch.OutOfMemoryError(str(lack)) from error
        reason = str(error.__context__ or error).partition("\n")[0]
        raise UserError(f"train.graphs: the blocks cannot be captured ({reason}): set train.graphs=false") from error
    if wrong := _difference(_results(model, weights, inputs), expected):
        raise UserError(f"train.graphs: the blocks' graphs compute another {wrong} than the blocks: set train.graphs=false")
    with torch.no_grad():
        for weight, before in zip(model.parameters(), kept, strict=True):
            weight.copy_(before)
    for weight in model.blocks.parameters() if adds_up else ():
        weight.register_hook(lambda g, weight=weight: g.clone() if weight.grad is None else None)
    return f"{len(blocks)} blocks run as CUDA graphs in passes of {images} images"


def _random_inputs(model: Backbone, images: int) -> Inputs:
    device, (channels, size) = next(model.parameters()).device, model.shape
    random = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(images, channels, size, size, generator=random).to(device)
    t_B = torch.rand(images, generator=random).to(device)
    y_B = None if model.num_classes is None else torch.arange(images, device=device) % model.num_classes
    drop = torch.ones(len(model.drop_rates), images, device=device) if model.drop_rates else None
    return x_BCHW, t_B, y_B, drop


def _results(model: Backbone, weights: Weights, inputs: Inputs) -> Results:
    """Return the output, and the gradients of the weights that it depends on."""
    out_BCHW, parameters = model(*inputs), list(model.parameters())
    found = torch.autograd.grad(out_BCHW.float().square().mean(), parameters, allow_unused=True)
    sizes = ([weight.size for weight in weights[parameter]] for parameter in parameters)
    return out_BCHW.detach(), [part for g, of in zip(found, sizes, strict=True) if g is not None for part in g.flatten().split(of)]


def _record(blocks: list[nn.Module], model: Backbone, weights: Weights, inputs: Inputs) -> tuple[list[Inputs], Results]:
    """Return copies of each block's inputs in a pass, which need gradients if the inputs did, and the results of the pass."""
    calls: dict[nn.Module, Inputs] = {}

    def keep(block: nn.Module, given: Inputs) -> None:
        calls[block] = tuple(x if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in given)

    hooks = [block.register_forward_pre_hook(keep) for block in blocks]
    results = _results(model, weights, inputs)
    for hook in hooks:
        hook.remove()
    return [calls[block] for block in blocks], results


def capture(
    blocks: list[nn.Module],
    calls: list[Inputs],
    *,
    keeps_states: bool,
    images: int,
    make_graphs: MakeGraphs = torch.cuda.make_graphed_callables,
) -> None:
    """Replace the blocks' `forward`, for training with this many images, by graphs that share memory in the order of a pass.

    The graphs are captured with aliases of the weights as inputs. The weights' own autograd nodes, which DeepSpeed holds, belong to
    the stream that created them, and a capture must not wait for another stream.
    """
    present = [[x is not None for x in inputs] for inputs in calls]
    functions = tuple(_of_tensors(block, there, keeps_states=keeps_states) for block, there in zip(blocks, present, strict=True))
    samples = []
    for block, inputs in zip(blocks, calls, strict=True):
        aliases = [weight.detach().requires_grad_() for weight in block.parameters()]
        samples.append((*[x for x in inputs if x is not None], *aliases))
    graphed = make_graphs(functions, tuple(samples), allow_unused_input=True)
    for block, graph, there in zip(blocks, graphed, present, strict=True):
        block.forward = _either(graph, block.forward, list(block.parameters()), images, there)


def _of_tensors(block: nn.Module, present: list[bool], *, keeps_states: bool) -> Callable[..., Any]:
    """Return a block as a function of its weights and of those inputs that are tensors, which `present` marks."""
    names, count = [name for name, _ in block.named_parameters()], sum(present)
    plain = copy(block)  # keeps the original `forward`

    def function(*tensors: Tensor) -> Any:
        given, weights = iter(tensors[:count]), dict(zip(names, tensors[count:], strict=True))
        inputs = tuple(next(given) if there else None for there in present)
        if not keeps_states:
            return functional_call(plain, weights, inputs)
        with KeepingStates():
            return functional_call(plain, weights, inputs)

    return function


def _either(
    graph: Callable[..., Any], plain: Callable[..., Any], weights: list[nn.Parameter], images: int, present: list[bool]
) -> Callable[..., Any]:
    """Return a `forward` that runs the graph if gradients are needed and the inputs fit it, otherwise the block's own one."""

    def forward(*inputs: Tensor | None) -> Any:
        tensors = [x for x in inputs if x is not None]
        if torch.is_grad_enabled() and len(tensors[0]) == images and [x is not None for x in inputs] == present:
            return graph(*tensors, *weights)
        return plain(*inputs)

    return forward


def _difference(found: Results, expected: Results) -> str:
    """Return the name of the part that differs; empty if none. NaN differs from NaN."""
    if not torch.equal(found[0], expected[0]):
        return "output"
    if len(found[1]) != len(expected[1]):
        return "gradient"
    norms = [g.norm().item() for g in expected[1]]
    least, pairs = CLOSE * math.hypot(*norms), zip(found[1], expected[1], norms, strict=True)
    within = [(a - b).norm().item() <= CLOSE * max(norm, least) for a, b, norm in pairs]
    return "" if all(within) else "gradient"
