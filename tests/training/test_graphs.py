"""Blocks as CUDA graphs: on a CPU against a stand-in for PyTorch's capture that overwrites its memory as graphs do.

tests/training/test_graphs_gpu.py has the same on a GPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dis_scale.models.cost import price_model
from dis_scale.recipe import LatentShape
from dis_scale.training.graphs import graph_blocks
from dis_scale.training.memory import worker_bytes
from tests.support.graphs import FAMILIES, added_gradients, capturing_nothing, made, parsed
from tests.training.test_memory import train


class Static(torch.autograd.Function):
    """A captured block: inputs, outputs and gradients are always in the same memory."""

    @staticmethod
    def forward(ctx: Any, memory: dict[str, Any], function: Callable[..., Any], count: int, *inputs: Tensor) -> Any:
        ctx.memory = memory
        with torch.no_grad():
            for to, x in zip(memory["inputs"], inputs[:count], strict=True):
                to.copy_(x)
        with torch.enable_grad():
            out = function(*memory["inputs"])
        memory["graph"] = out if isinstance(out, tuple) else (out,)
        outputs = memory.setdefault("outputs", [x.detach().clone() for x in memory["graph"]])
        with torch.no_grad():
            for to, x in zip(outputs, memory["graph"], strict=True):
                to.copy_(x)
        given = tuple(x.detach() for x in outputs)
        return given if isinstance(out, tuple) else given[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        memory = ctx.memory
        surface = [*memory["inputs"], *memory["weights"]]
        wanted = [x for x in surface if x.requires_grad]
        found = iter(torch.autograd.grad(memory["graph"], wanted, gradients, allow_unused=True))
        results = [next(found) if x.requires_grad else None for x in surface]
        kept = memory.setdefault("gradients", [None if g is None else g.clone() for g in results])
        for to, g in zip(kept, results, strict=True):
            if to is not None:
                to.copy_(g)
        return None, None, None, *[None if g is None else g.detach() for g in kept]


def stand_in(wrapped: tuple[nn.Module, ...], samples: tuple[tuple[Tensor, ...], ...], allow_unused_input: bool) -> tuple[Any, ...]:
    """`torch.cuda.make_graphed_callables` on a CPU."""
    assert allow_unused_input

    def graphed(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
        weights, forward = tuple(module.parameters()), module.forward
        memory = {"inputs": inputs, "weights": weights}
        plain = module.block.forward  # what is captured; the block's own `forward` is replaced later

        def captured(*static: Tensor) -> Any:
            later, module.block.forward = module.block.forward, plain
            try:
                return forward(*static)
            finally:
                module.block.forward = later

        return lambda *given: Static.apply(memory, captured, len(inputs), *given, *weights)

    return tuple(graphed(module, inputs) for module, inputs in zip(wrapped, samples, strict=True))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("settings", FAMILIES, ids=lambda settings: str(settings["kind"]))
def test_graphs_of_blocks_have_the_gradients_of_blocks(
    settings: dict[str, Any], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, since a graph's memory is used again; with another number of images, or without drop path, a block runs as it did."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    plain, model = made(settings), made(settings)
    assert graph_blocks(model, 3, passes) == f"{len(model.blocks)} blocks run as CUDA graphs in passes of 3 images"
    for images in (3, 3, 2):
        for ours, expected in zip(added_gradients(model, images, passes), added_gradients(plain, images, passes), strict=True):
            assert torch.equal(ours, expected)
    inputs = torch.randn(3, 4, 8, 8), torch.rand(3), torch.arange(3)
    assert torch.equal(model(*inputs), plain(*inputs))


def test_without_copies_the_second_pass_overwrites_the_gradients_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stand-in is for: blocks that were told of one pass add up two."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    plain, model = made(FAMILIES[0]), made(FAMILIES[0])
    graph_blocks(model, 3, passes=1)
    pairs = zip(added_gradients(model, 3, 2), added_gradients(plain, 3, 2), strict=True)
    assert not all(torch.equal(ours, expected) for ours, expected in pairs)


def wrong(*given: Any, **options: Any) -> tuple[Any, ...]:
    return tuple(lambda *inputs, one=one: tuple(1.5 * x for x in one(*inputs)) for one in stand_in(*given, **options))


def failing(*_: object, **__: object) -> tuple[Any, ...]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")


@pytest.mark.parametrize(
    ("capture", "line"), [(wrong, "its graph computes another output"), (failing, "CUDA out of memory. Tried")]
)
def test_blocks_stay_as_they_are_if_their_graphs_are_wrong_or_fail(
    capture: Callable[..., Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    plain, model = made(FAMILIES[0]), made(FAMILIES[0])
    assert graph_blocks(model, 3, 1).startswith(f"each kernel of a block is launched by itself: {line}")
    pairs = zip(added_gradients(model, 3, 1), added_gradients(plain, 3, 1), strict=True)
    assert all(torch.equal(ours, expected) for ours, expected in pairs)


@pytest.mark.parametrize("settings", FAMILIES, ids=lambda settings: str(settings["kind"]))
def test_pytorch_takes_the_blocks_of_each_family(settings: dict[str, Any]) -> None:
    """Its own function captures them all; gradients of a capture that computes nothing are then found to be wrong."""
    model = made(settings)
    with capturing_nothing():
        assert graph_blocks(model, 3, 1).endswith("its graph computes another gradient")


def test_memory_has_room_for_what_graphs_hold() -> None:
    """At least the copies of each block's inputs and outputs, and one more of the weights' gradients."""
    blocks = len(made(FAMILIES[0]).blocks)
    cost = price_model(parsed(FAMILIES[0]), LatentShape(4, 8), 10)
    more = [worker_bytes(cost, train(graphs=graphs), 1, 64) for graphs in (False, True)]
    assert more[1] - more[0] >= 4 * cost.parameters + 64 * blocks * 18 * 64 * 3 * 4
