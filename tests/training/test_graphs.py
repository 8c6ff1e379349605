"""Blocks as CUDA graphs: on a CPU against a stand-in for PyTorch's capture that overwrites its memory as graphs do.

tests/training/test_graphs_gpu.py has the same on a GPU.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dis_scale import models
from dis_scale.models.cost import price_model
from dis_scale.process.errors import UserError
from dis_scale.recipe import LatentShape
from dis_scale.training import attempt as attempts
from dis_scale.training.graphs import MakeGraphs, graph_blocks
from dis_scale.training.joined import weights_of
from dis_scale.training.lanes import image_counts_of_all
from dis_scale.training.memory import worker_bytes
from tests.support.graphs import FAMILIES, added_gradients, capturing_nothing, made, parsed, stand_in, trained
from tests.support.prices import train
from tests.support.ranks import on_ranks


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("settings", FAMILIES, ids=lambda settings: str(settings["kind"]))
def test_graphs_of_blocks_have_the_gradients_of_blocks(settings: dict[str, Any], passes: int) -> None:
    """Twice, since a graph's memory is used again; with another number of images, or without drop path, a block runs as it did."""
    plain, model = made(settings), made(settings)
    assert isinstance(model.blocks, torch.nn.ModuleList)
    line = graph_blocks(model, weights_of(model), 3, adds_up=passes > 1, make_graphs=stand_in)
    assert line == f"{len(model.blocks)} blocks run as CUDA graphs in passes of 3 images"
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), plain.parameters(), strict=True)), "weights are as before"
    for images in (3, 3, 2):
        for ours, expected in zip(added_gradients(model, images, passes), added_gradients(plain, images, passes), strict=True):
            assert torch.equal(ours, expected)
    inputs = torch.randn(3, 4, 8, 8), torch.rand(3), torch.arange(3)
    assert torch.equal(model(*inputs), plain(*inputs))


def test_without_copies_the_second_pass_overwrites_the_gradients_of_the_first() -> None:
    """What the stand-in is for: blocks whose gradients are not said to be added up."""
    plain, model = made(FAMILIES[0]), made(FAMILIES[0])
    graph_blocks(model, weights_of(model), 3, adds_up=False, make_graphs=stand_in)
    pairs = zip(added_gradients(model, 3, 2), added_gradients(plain, 3, 2), strict=True)
    assert not all(torch.equal(ours, expected) for ours, expected in pairs)


def test_deepspeed_trains_by_graphs_as_without() -> None:
    on_ranks(1, trains_by_graphs_as_without)


def trains_by_graphs_as_without() -> None:
    """Two passes a step. Nothing captured has a node of the model's own weights, which DeepSpeed holds on another stream."""

    def checked(functions: tuple[Any, ...], samples: tuple[tuple[Tensor, ...], ...], **_: bool) -> tuple[Any, ...]:
        for function, inputs in zip(functions, samples, strict=True):
            assert not any(isinstance(leaf, torch.nn.Parameter) for leaf in leaves(function(*inputs)))
        return stand_in(functions, samples)

    for stage, settings in ((1, FAMILIES[0]), (2, FAMILIES[0]), (1, FAMILIES[1]), (1, FAMILIES[2])):
        plain, graphed = (trained(settings, torch.device("cpu"), "fp32", stage, graphs) for graphs in (None, checked))
        assert all(torch.equal(a, b) for a, b in zip(plain, graphed, strict=True))


def leaves(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors that these depend on and that no operation made."""
    nodes, found = [x.grad_fn for x in (outputs if isinstance(outputs, tuple) else (outputs,))], list[Tensor]()
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is not None and hasattr(node, "variable"):
            found.append(node.variable)
        more = {each for each, _ in getattr(node, "next_functions", ()) if each} - seen
        seen |= more
        nodes += more
    return found


def of_another_size(functions: tuple[Any, ...], samples: Any, **_: bool) -> tuple[Any, ...]:
    def times(one: Any, *inputs: Tensor) -> Any:
        out = one(*inputs)
        return tuple(1.5 * x for x in out) if isinstance(out, tuple) else 1.5 * out

    return tuple(partial(times, one) for one in stand_in(functions, samples))


def failing(*_: object, **__: object) -> tuple[Any, ...]:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nSee the documentation")


@pytest.mark.parametrize(
    ("capture", "line"),
    [
        (of_another_size, "graphs compute another output than the blocks: set train.graphs=false"),
        (failing, r"cannot be captured \(CUDA error: operation not permitted when stream is capturing\): set train.graphs=false"),
    ],
)
@pytest.mark.parametrize("settings", FAMILIES, ids=lambda settings: str(settings["kind"]))
def test_graphs_that_are_wrong_or_fail_end_the_training(settings: dict[str, Any], capture: MakeGraphs, line: str) -> None:
    """Of new models too, the output of some of which does not depend on their blocks."""
    model = models.build(parsed(settings), LatentShape(4, 8), 10, seed=0)
    with pytest.raises(UserError, match=line):
        graph_blocks(model, weights_of(model), 3, adds_up=False, make_graphs=capture)


@pytest.mark.parametrize("settings", FAMILIES, ids=lambda settings: str(settings["kind"]))
def test_pytorch_takes_the_blocks_of_each_family(settings: dict[str, Any]) -> None:
    """Its own function captures them all; gradients of a capture that computes nothing, which may be NaN, are found to be wrong."""
    with capturing_nothing(), pytest.raises(UserError, match="compute another gradient"):
        graph_blocks(model := made(settings), weights_of(model), 3, adds_up=False)


@pytest.mark.parametrize("error", [torch.AcceleratorError("CUDA error: out of memory"), RuntimeError("capture failed")], ids=str)
def test_memory_that_lacks_for_a_capture_is_no_mistake(error: RuntimeError) -> None:
    """The next attempt has no graphs. The end of a capture fails for another reason, after memory lacked inside."""

    def capture(*_: object, **__: object) -> tuple[Any, ...]:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        except torch.OutOfMemoryError:
            raise error  # noqa: B904

    with pytest.raises(torch.OutOfMemoryError):
        graph_blocks(model := made(FAMILIES[1]), weights_of(model), 3, adds_up=False, make_graphs=capture)


@pytest.mark.parametrize(
    ("lanes", "line"), [(4, "the blocks' graphs compute another gradient"), (5, "no CUDA graphs: forward passes differ in images")]
)
def test_no_device_is_blamed_where_a_ranks_passes_differ(lanes: int, line: str) -> None:
    """Of two ranks with five lanes one has passes of one size, the other of two: they decide alike."""
    on_ranks(2, graphs_of_a_rank, lanes, line)


def graphs_of_a_rank(lanes: int, line: str) -> None:
    attempt: Any = SimpleNamespace(device=torch.device("cuda"), short=False, recipe=SimpleNamespace(train=train()))
    try:
        with capturing_nothing():
            model = made(FAMILIES[1])
            words = attempts._graphed(attempt, model, weights_of(model), image_counts_of_all(lanes, 2, 2, 1), 2)
    except UserError as error:
        words = str(error)
    assert line in words, (dist.get_rank(), words)


def test_memory_has_room_for_what_graphs_hold() -> None:
    """At least the copies of each block's inputs and outputs, and one more of the weights' gradients."""
    model = made(FAMILIES[0])
    assert isinstance(model.blocks, torch.nn.ModuleList)
    cost = price_model(parsed(FAMILIES[0]), LatentShape(4, 8), 10)
    more = [worker_bytes(cost, train(graphs=graphs), 1, 64) for graphs in (False, True)]
    assert more[1] - more[0] >= 4 * cost.parameters + 64 * len(model.blocks) * 18 * 64 * 3 * 4
