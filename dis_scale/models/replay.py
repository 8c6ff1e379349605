"""A model's forward pass on a GPU as a CUDA graph: one launch from Python instead of thousands.

Sampling needs no gradients and has few input shapes. The pass of each frequent shape is captured and then replayed. A pass that
cannot be captured, or whose graph computes other numbers, runs without a graph; a warning is logged.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dis_scale.models.tokens import Backbone

log = logging.getLogger(__name__)
Forward = Callable[..., Tensor]
Capture = Callable[[Forward, list[Tensor], Any], Forward]
AFTER = 200
"""Passes of a shape before its capture. A capture takes the time of five passes; it saved 1 % of each pass with 64 images, 3 %
with 16."""
WARM_UP = 2
"""Passes before a capture: all kernels must be compiled and all libraries' memory allocated before it begins."""


class Replayed:
    """A model for sampling that uses CUDA graphs after `after` passes of each shape. Its weights must not move in memory."""

    def __init__(self, model: Backbone, after: int = AFTER, capture: Capture | None = None):
        self.model, self.num_classes, self.shape = model, model.num_classes, model.shape
        self._after, self._calls, self._capture = after, Counter[tuple[object, ...]](), capture or captured
        self._passes: dict[tuple[object, ...], Forward] = {}
        self._pool: Any = None
        """Memory pool shared by all graphs: they run one after the other, and outputs are copied. PyTorch does not accept a pool
        whose graphs no longer exist."""

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None) -> Tensor:
        inputs = [x for x in (x_BCHW, t_B, y_B) if x is not None]
        kind = tuple((x.shape, x.dtype) for x in inputs)
        self._calls[kind] += 1
        if self._calls[kind] <= self._after:
            return self.model(*inputs)
        if kind not in self._passes:
            self._passes[kind] = self._replay(inputs)
        return self._passes[kind](*inputs)

    def _replay(self, inputs: list[Tensor]) -> Forward:
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            replay = self._capture(self.model, [torch.zeros_like(x) for x in inputs], self._pool)  # not the compared inputs
            if torch.equal(replay(*inputs), self.model(*inputs)):
                return replay
            reason = "its CUDA graph computes other numbers"
        except RuntimeError as error:  # includes out of memory
            reason = str(error.__context__ or error).partition("\n")[0]
        if all(taken is self.model for taken in self._passes.values()):
            self._pool = None  # no graph is left in it
        log.warning("sampling launches each kernel of a pass of %d images by itself: %s", len(inputs[0]), reason)
        return self.model


def captured(model: Forward, inputs: list[Tensor], pool: Any) -> Forward:
    """Capture a model's pass on inputs of these shapes and types as one CUDA graph in `pool`. Each call returns a copy."""
    static, device = [x.clone() for x in inputs], inputs[0].device
    side, graph = _side_stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # restores the stream also if the capture is invalid, which `graph` does not
            for _ in range(WARM_UP):
                model(*static)
            with torch.cuda.graph(graph, pool=pool, stream=side):
                out = model(*static)
        torch.cuda.current_stream().wait_stream(side)

    def replay(*given: Tensor) -> Tensor:
        for to, x in zip(static, given, strict=True):
            to.copy_(x)
        graph.replay()
        return out.clone()

    return replay


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of all captures. Libraries keep memory for each stream."""
    return torch.cuda.Stream(device)


def replayed(model: Backbone, device: torch.device, after: int = AFTER) -> Backbone | Replayed:
    """Return the model for sampling on a device: on a GPU, one that replays CUDA graphs."""
    return Replayed(model, after) if device.type == "cuda" else model
