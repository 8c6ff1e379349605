"""Blocks whose weights are views of few parameters: the same function, the same gradients, and nothing of it in what is stored."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dis_scale.models.dis.network import DiS
from dis_scale.process.errors import UserError
from dis_scale.recipe import Train
from dis_scale.training.engine import parameter_groups
from dis_scale.training.graphs import graph_blocks
from dis_scale.training.joined import Weights, join_blocks
from tests.support.graphs import FAMILIES, added_gradients, made, stand_in

SETTINGS = Train(publish_images=(8,), batch_images=8, lanes=1, weight_decay=0.1, base_width=32)


def by_weight(held: Weights, model: nn.Module, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Split tensors, one for each parameter, into those of the weights."""
    found = dict[str, Tensor]()
    for parameter, tensor in zip(model.parameters(), tensors, strict=True):
        weights = held[parameter]
        found |= dict(zip((w.name for w in weights), tensor.flatten().split([w.size for w in weights]), strict=True))
    return found


@pytest.mark.parametrize("most", [10**9, 20_000])
@pytest.mark.parametrize("as_graphs", [False, True])
@pytest.mark.parametrize("settings", FAMILIES, ids=lambda settings: str(settings["kind"]))
def test_a_block_has_a_parameter_for_each_group_or_several_that_fit_a_bucket(
    settings: dict[str, Any], as_graphs: bool, most: int
) -> None:
    plain, model = made(settings), made(settings)
    names, groups = [name for name, _ in plain.named_parameters()], parameter_groups(model, SETTINGS)
    held = join_blocks(model, groups, most)
    assert {p for group in groups for p in group["params"]} == {*model.parameters()} == held.keys()
    assert sorted(weight.name for weights in held.values() for weight in weights) == sorted(names)
    assert all(parameter.numel() <= most for parameter, weights in held.items() if len(weights) > 1)
    assert isinstance(model.blocks, nn.ModuleList)
    counts = [len(list(block.parameters())) for block in model.blocks]
    assert max(counts) <= len(groups) if most > 20_000 else max(counts) > len(groups)
    if as_graphs:
        graph_blocks(model, held, 3, adds_up=True, make_graphs=stand_in)
    expected = dict(zip(names, added_gradients(plain, 3, 2), strict=True))
    found = by_weight(held, model, added_gradients(model, 3, 2))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient.flatten()) for name, gradient in expected.items())


def test_a_graph_that_loses_the_gradient_of_a_small_weight_is_found_beside_large_ones() -> None:
    """Its share of the block's gradient is 4e-5, far below what may differ of one tensor."""
    model = made(FAMILIES[0])
    held = join_blocks(model, parameter_groups(model, Train(publish_images=(8,), batch_images=8, lanes=1)), 10**9)
    assert isinstance(model, DiS)
    (joined,) = model.blocks[0].parameters()
    names, sizes = zip(*held[joined], strict=True)
    lost = names.index("blocks.0.mixer.dt_proj")

    def losing(functions: Any, samples: Any, **_: bool) -> Any:
        def first(*inputs: Tensor) -> Any:
            parts = [part.detach() if i == lost else part for i, part in enumerate(inputs[-1].split(sizes))]
            return graphs[0](*inputs[:-1], torch.cat(parts))

        graphs = stand_in(functions, samples)
        return (first, *graphs[1:])

    with pytest.raises(UserError, match="graphs compute another gradient than the blocks"):
        graph_blocks(model, held, 3, adds_up=False, make_graphs=losing)
