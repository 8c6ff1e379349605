"""Host time of the Triton backend: `python -m benchmarks.host_time [rounds]`. Needs no GPU.

The time that a call keeps Python busy before the GPU can have its work. Every call takes the path of a launch, with a driver of
an H100 that launches nothing; tensors are on the CPU and small. The time of Triton's launcher and of CUDA comes in addition. A row
has the least time of all rounds, in us, and the launches: of Triton's kernels, and of PyTorch's operations that would launch one or
more kernels on a GPU.

The last rows are medians of training steps of a DiS of 24 + 1 and 48 + 1 narrow blocks with DeepSpeed, of one worker: each pass,
with DeepSpeed's hooks, and its `step()`; with the CPU's scan, with these kernels, and as graphs that launch nothing. A block takes
1/24 of the difference: embeddings, the loss and what DeepSpeed does once are in both.
"""

import json
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks import bringup
from benchmarks.dit_counts import Counts
from dis_scale import models
from dis_scale.models.dis.network import DiSBlock
from dis_scale.models.dis.settings import Dis
from dis_scale.recipe import LatentShape, Train
from dis_scale.scan import Direction
from dis_scale.scan.triton import backend
from dis_scale.training import engine, graphs, resume
from dis_scale.training.profile import process_group
from tests.support.graphs import capturing_nothing

B, L, E, N, R = 2, 24, 64, 2, 4
"""R: columns of the product before B and C, as in the mixer."""
SMALL = Dis(kind="dis", width=E // 2, depth=2, patch=2, state_size=N)
HYDRA = SMALL.model_copy(update={"width": 128, "mixer": "ssd", "combine": "hydra", "state_size": 16})
"""The least that Hydra's mixer takes as one function: four heads of 64 channels."""


class NoLaunch:
    """A driver of an H100 that compiles and launches nothing. `launches` counts."""

    launches = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    @property
    def utils(self) -> "NoLaunch":
        return self

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spilled registers, most threads of a program."""
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *_: Any) -> None:
        self.launches += 1


def direction() -> Direction:
    """Inputs of one direction as in the mixer: B and C are columns of a product, parameters float32."""
    u, delta = (torch.randn(B, L, E, dtype=torch.bfloat16) for _ in range(2))
    product = torch.randn(B, L, R + 2 * N, dtype=torch.bfloat16)
    parameters = -torch.ones(E, N), torch.ones(E), torch.ones(E)
    leaves = [x.requires_grad_() for x in (u, delta, product, *parameters)]
    b, c = leaves[2].split((R, N, N), -1)[1:]
    return Direction(leaves[0], leaves[1], leaves[3], b, c, leaves[4], leaves[5])


def scan() -> tuple[Callable[[], Sequence[Tensor]], list[Tensor]]:
    """The two-way scan, and the inputs that have gradients."""
    front, back = direction(), direction()
    z = torch.randn(B, L, 2 * E, dtype=torch.bfloat16)[..., E:].requires_grad_()
    return lambda: [backend.two_way_scan(front, back, z)], [*front, *back, z]


def conv() -> tuple[Callable[[], Sequence[Tensor]], list[Tensor]]:
    x = torch.randn(B, L, 2 * E, dtype=torch.bfloat16)[..., :E].requires_grad_()
    weights = [torch.ones(shape).requires_grad_() for shape in ((E, 4), (E,)) * 2]
    return lambda: backend.two_way_conv_silu(x, *weights), [x, *weights]


def block(settings: Dis, *, as_graphs: bool = False) -> tuple[Callable[[], Sequence[Tensor]], list[Tensor]]:
    """A block of DiS without a skip. Products are float32's, which start faster on a CPU; ten casts of bfloat16 are left out.

    `as_graphs`: its passes as CUDA graphs that launch nothing.
    """
    made = DiSBlock(settings, "triton", skip=False)
    h_BLD, r_BLD = (torch.randn(B, L, settings.width).requires_grad_() for _ in range(2))
    if as_graphs:
        copies = [x.detach().clone().requires_grad_() for x in (h_BLD, r_BLD)]
        with capturing_nothing():
            graphs.capture([made], [(*copies, None, None, None)], keeps_states=False, images=B)
    return lambda: made(h_BLD, r_BLD, None, None, None), [h_BLD, r_BLD, *made.parameters()]


def training_steps(scan: str, depth: int, *, as_graphs: bool, steps: int = 40) -> dict[str, float]:
    """Median ms of the parts of a step."""
    device = torch.device("cpu")
    model = models.build(Dis(kind="dis", width=16, depth=depth, patch=2), LatentShape(4, 8), 10, seed=0, scan=scan)
    train = Train(publish_images=(B,), batch_images=B, lanes=1, workers=1)
    state = engine.start(model, train, device, resume.fresh(model), 0)
    if as_graphs:
        with capturing_nothing(), mock.patch("dis_scale.training.graphs._difference", return_value=None):
            graphs.graph_blocks(model, state.weights, B, adds_up=False)
    inputs = torch.randn(B, 4, 8, 8), torch.rand(B), torch.arange(B), torch.ones(len(model.drop_rates), B)
    times: dict[str, list[float]] = {"forward": [], "backward": [], "step()": []}
    for _ in range(steps):
        began = time.perf_counter()
        loss = state.deepspeed(*inputs).square().mean()
        forward = time.perf_counter()
        state.deepspeed.backward(loss)
        backward = time.perf_counter()
        state.deepspeed.step()
        for name, seconds in zip(times, (forward - began, backward - forward, time.perf_counter() - backward), strict=True):
            times[name].append(seconds)
    return {name: round(1e3 * statistics.median(seconds), 2) for name, seconds in times.items()}


def least_us(job: Callable[[], Any], rounds: int) -> float:
    return 1e6 * min(timeit.repeat(job, number=1, repeat=rounds))


def _both_passes(forward: Callable[[], Any], inputs: Any, dys: Any) -> None:
    torch.autograd.grad(forward(), inputs, dys)


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    driver.set_active(none := NoLaunch())
    mock.patch("dis_scale.scan.problem", return_value=None).start()  # as if the kernels could run here
    jobs_of = {
        "two-way scan": scan(),
        "two-way convolution": conv(),
        "block of DiS": block(SMALL),
        "block of DiS as graphs": block(SMALL, as_graphs=True),
        "block of DiS2": block(HYDRA),
    }
    for name, (forward, inputs) in jobs_of.items():
        dys = [torch.ones_like(y) for y in forward()]
        jobs: dict[str, Callable[[], Any]] = {
            "forward": forward,
            "forward and backward": partial(_both_passes, forward, inputs, dys),
        }
        for passes, job in jobs.items():
            job()
            none.launches = 0
            with Counts() as operations:
                job()
            counts = {"kernels": none.launches, "operations": operations.launches}
            print(json.dumps({"name": f"{name}, {passes}", "us": round(least_us(job, rounds), 1), **counts}), flush=True)
    with process_group(torch.device("cpu")):
        for depth, (by, as_graphs) in product((24, 48), (("chunked", False), ("triton", False), ("chunked", True))):
            name = f"step of {depth + 1} blocks with DeepSpeed, {by}" + as_graphs * ", as graphs"
            ms = training_steps(by, depth, as_graphs=as_graphs)
            if as_graphs or by == "triton":  # what launches nothing leaves any gradients behind, of which `step()` may take none
                del ms["step()"]
            print(json.dumps({"name": name, "ms": ms}), flush=True)


if __name__ == "__main__":
    main(bringup.rounds(__doc__, 3000))
