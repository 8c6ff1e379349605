"""Blocks as CUDA graphs on a GPU. Skipped if PyTorch finds none. Needs no conftest."""

import itertools
import os
from typing import Any

import pytest
import torch

from dis_scale.training.graphs import CLOSE, graph_blocks
from dis_scale.training.joined import weights_of
from dis_scale.training.profile import process_group
from tests.support.graphs import FAMILIES, added_gradients, made, trained

if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU here", allow_module_level=True)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # bit-equal products, as in training
SSD = {"kind": "dis", "width": 64, "depth": 2, "patch": 2, "mixer": "ssd", "combine": "hydra", "state_size": 16}


@pytest.mark.parametrize("keeps_states", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [*FAMILIES, SSD], ids=lambda settings: f"{settings['kind']} {settings.get('mixer', '')}")
def test_graphs_of_blocks_have_the_gradients_of_blocks(settings: dict[str, Any], precision: str, keeps_states: bool) -> None:
    """Of two passes a step, twice; another number of images runs without graphs."""
    plain, model = made(settings, "cuda", precision), made(settings, "cuda", precision)
    plain.keeps_states = model.keeps_states = keeps_states
    assert "run as CUDA graphs" in graph_blocks(model, weights_of(model), 3, adds_up=True)
    for images in (3, 3, 2):
        for ours, expected in zip(added_gradients(model, images, 2), added_gradients(plain, images, 2), strict=True):
            assert (ours - expected).norm() <= CLOSE * expected.norm()


def test_deepspeed_trains_by_graphs_as_without() -> None:
    device = torch.device("cuda")
    with process_group(device):  # once in a process: DeepSpeed keeps its groups
        for settings, stage in itertools.product([*FAMILIES, SSD], (1, 2)):
            graphs = (None, torch.cuda.make_graphed_callables)
            plain, graphed = (trained(settings, device, "bf16", stage, make_graphs) for make_graphs in graphs)
            for a, b in zip(plain, graphed, strict=True):
                assert (a - b).norm() <= CLOSE * a.norm(), (settings, stage)
