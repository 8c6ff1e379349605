"""Small models of each family, and the gradients that passes of training add up. Needs no conftest."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dis_scale import models
from dis_scale.models import families
from dis_scale.models.settings import FamilySettings
from dis_scale.models.tokens import Backbone
from dis_scale.recipe import LatentShape, Train
from dis_scale.training import engine, resume
from dis_scale.training.graphs import MakeGraphs, graph_blocks

FAMILIES: list[dict[str, Any]] = [
    {"kind": "dis", "width": 64, "depth": 4, "patch": 2, "drop_path": 0.2},
    {"kind": "dit", "width": 64, "depth": 2, "patch": 2, "heads": 2},
    {"kind": "diffussm", "width": 64, "depth": 3, "patch": 1},
]


def parsed(settings: dict[str, Any]) -> FamilySettings:
    return families.find(settings["kind"]).settings.model_validate(settings)


def made(settings: dict[str, Any], device: str = "cpu", precision: Any = "fp32") -> Backbone:
    """A model whose outputs depend on all weights."""
    return stirred(models.build(parsed(settings), LatentShape(4, 8), 10, precision=precision, seed=0)).to(device)


def stirred(model: Backbone) -> Backbone:
    """Change each weight, so that output and gradients depend on all: those of the last product, and others, are zero at first."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def added_gradients(model: Backbone, images: int, passes: int) -> list[Tensor]:
    """The gradients of all weights after some backward passes, as training has them."""
    random, device = torch.Generator().manual_seed(images), next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    for _ in range(passes):
        x_BCHW, t_B = torch.randn(images, 4, 8, 8, generator=random), torch.rand(images, generator=random)
        drop = torch.rand(len(model.drop_rates), images, generator=random).to(device) if model.drop_rates else None
        model(x_BCHW.to(device), t_B.to(device), torch.arange(images, device=device), drop).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def trained(
    settings: dict[str, Any], device: torch.device, precision: Any, stage: int, make_graphs: MakeGraphs | None = None
) -> list[Tensor]:
    """The weights after three steps of two passes under DeepSpeed, on this process alone, of graphs or without."""
    recipe: Any = {
        "publish_images": (60,),
        "batch_images": 6,
        "lanes": 2,
        "zero_stage": stage,
        "precision": precision,
        "graphs": make_graphs is not None,
    }
    train, model, random = Train(**recipe), made(settings, "cpu", precision), torch.Generator().manual_seed(0)
    read = resume.fresh(model)  # on the host, as in training
    state = engine.start(model.to(device), train, device, read, 0, passes=2)
    if make_graphs:
        graph_blocks(model, state.weights, 3, adds_up=stage == 1, make_graphs=make_graphs)
    for _ in range(6):
        x_BCHW, t_B = torch.randn(3, 4, 8, 8, generator=random), torch.rand(3, generator=random)
        drop = torch.rand(len(model.drop_rates), 3, generator=random).to(device) if model.drop_rates else None
        out_BCHW = state.deepspeed(x_BCHW.to(device), t_B.to(device), torch.arange(3, device=device), drop)
        state.micro_step(out_BCHW.square().mean())
    return [flat.detach().clone() for flat in state.flats]


class NoGraph:
    """A CUDA graph that computes nothing."""

    def replay(self) -> None:
        pass


@contextmanager
def capturing_nothing() -> Iterator[None]:
    """PyTorch's own `make_graphed_callables` on a CPU: it runs each block once, and what comes of that is then all there is."""
    nothing = {
        "synchronize": None,
        "Stream": None,
        "graphs.graph_pool_handle": None,
        "graph": nullcontext(),
        "stream": nullcontext(),
    }
    with ExitStack() as patched:
        patched.enter_context(mock.patch("torch.cuda.CUDAGraph", NoGraph))
        for name, result in nothing.items():
            patched.enter_context(mock.patch(f"torch.cuda.{name}", return_value=result))
        yield


class Static(torch.autograd.Function):
    """A captured block: inputs, outputs and gradients are always in the same memory."""

    @staticmethod
    def forward(ctx: Any, memory: dict[str, Any], function: Callable[..., Any], *inputs: Tensor) -> Any:
        ctx.memory = memory
        for to, x in zip(memory["inputs"], inputs, strict=True):
            if to.data_ptr() != x.data_ptr():
                to.detach().copy_(x)
        with torch.enable_grad():
            out = function(*memory["inputs"])
        memory["graph"] = out if isinstance(out, tuple) else (out,)
        outputs = memory.setdefault("outputs", [x.detach().clone() for x in memory["graph"]])
        for to, x in zip(outputs, memory["graph"], strict=True):
            to.copy_(x.detach())
        given = tuple(x.detach() for x in outputs)
        return given if isinstance(out, tuple) else given[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        memory = ctx.memory
        wanted = [x for x in memory["inputs"] if x.requires_grad]
        found = iter(torch.autograd.grad(memory["graph"], wanted, gradients, allow_unused=True))
        results = [next(found) if x.requires_grad else None for x in memory["inputs"]]
        kept = memory.setdefault("gradients", [None if g is None else g.clone() for g in results])
        for to, g in zip(kept, results, strict=True):
            if to is not None:
                to.copy_(g)
        return None, None, *[None if g is None else g.detach() for g in kept]


def stand_in(functions: tuple[Callable[..., Any], ...], samples: tuple[tuple[Tensor, ...], ...], **_: bool) -> tuple[Any, ...]:
    """`torch.cuda.make_graphed_callables` on a CPU."""
    memories: list[dict[str, Any]] = [{"inputs": inputs} for inputs in samples]
    return tuple(partial(Static.apply, memory, function) for memory, function in zip(memories, functions, strict=True))
