"""Twenty steps under DeepSpeed against the same in plain PyTorch: releases of it have had wrong gradients and silent optimizers."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

from dis_scale import diffusion
from dis_scale.data.latents import Micro
from dis_scale.models import build
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dit.settings import Dit
from dis_scale.models.tokens import Backbone
from dis_scale.recipe import Flow, LatentShape, Train
from dis_scale.training import engine, loop, resume
from dis_scale.training.inputs import StepInput
from dis_scale.training.lanes import forward_passes, largest_share
from dis_scale.training.schedule import learning_rate
from dis_scale.weights import ema
from tests.support.ranks import at_each_stage, on_ranks

SHAPE, STEPS, LANES = LatentShape(3, 6), 20, 4
MODELS = {
    "dit": Dit(kind="dit", width=20, depth=2, heads=2, patch=2),
    "dis": Dis(kind="dis", width=20, depth=2, patch=2, state_size=4),
}
SETTINGS = Train(
    publish_images=(8 * STEPS,), batch_images=8, lanes=LANES, learning_rate=3e-3, warmup_images=64, weight_decay=0.1,
    base_width=10, ema=0.8, power_ema=(0.05, 0.1),
)  # fmt: skip
CLIP = {"dit": 0.5, "dis": 0.9}
PROCESS = diffusion.build(Flow(kind="flow"), SHAPE)
MOMENTS, MOVES, KEYS_MOVE = 1e-6, 2e-6, 8e-4
"""Largest relative errors. float32 rounds a gradient to 6e-8: moments agree to 1.4e-7, weights to 8e-7. Attention's keys alone move
otherwise, by up to 4e-4 of all movement: their bias has no gradient, and Adam divides its rounding errors by their own size, with a
quarter of the base width's eps."""


def initial_model(name: str, checkpointing: str = "none") -> Backbone:
    """No weight is zero: gradients that are, but for rounding, would move weights by a complete step of Adam."""
    model, random = build(MODELS[name], SHAPE, 10, checkpointing=checkpointing), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=random))
    return model


def lane_input(step: int, lane: int, weight: float = 1.0) -> StepInput:
    random = torch.Generator().manual_seed(100 * step + lane)
    x_BCHW, noise_BCHW = torch.randn(2, 2, 3, 6, 6, generator=random)
    return StepInput(Micro(x_BCHW, torch.tensor([lane, step % 10]), noise_BCHW), torch.rand(2, generator=random), None, weight)


def loss_of_lane(model: Backbone, step: int, lane: int) -> torch.Tensor:
    micro, t_B, drop, _ = lane_input(step, lane)
    return loop._loss(model, PROCESS, micro, t_B, drop)


class Plain:
    """The weights, moments and averages after each step of PyTorch's own AdamW, and the norms of the gradients."""

    def __init__(self, name: str) -> None:
        self.model, self.clip = initial_model(name), CLIP[name]
        self.names = [name for name, _ in self.model.named_parameters()]
        groups = engine.parameter_groups(self.model, SETTINGS)
        self.optimizer = torch.optim.AdamW(groups, betas=SETTINGS.betas, fused=True)
        self.averages = {name: self.weights() for name in ema.names(SETTINGS)}
        self.norms = [self.step(step) for step in range(STEPS)]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone().flatten() for name, p in self.model.named_parameters()}

    def step(self, step: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(SETTINGS, 8 * step) * group["rate"]
        self.optimizer.zero_grad()
        for lane in range(LANES):
            (loss_of_lane(self.model, step, lane) / LANES).backward()
        norm = float(clip_grad_norm_(self.model.parameters(), self.clip))
        self.optimizer.step()
        for name, decay in ema.decays(SETTINGS, step + 1).items():
            for parameter, weight in self.weights().items():
                self.averages[name][parameter].lerp_(weight, 1 - decay)
        return norm

    def state(self, kind: str) -> dict[str, torch.Tensor]:
        if kind in engine.MOMENTS:
            moments = (self.optimizer.state[p][kind] for p in self.model.parameters())
            return dict(zip(self.names, (moment.flatten() for moment in moments), strict=True))
        return self.averages.get(kind) or self.weights()


@functools.cache
def plain(name: str) -> Plain:
    return Plain(name)


@pytest.mark.parametrize(("world", "name"), [(1, "dit"), (3, "dit"), (1, "dis"), (3, "dis")])
def test_deepspeed_takes_the_steps_of_plain_pytorch(world: int, name: str) -> None:
    """At each stage, with 4 and 2 forward passes a step; of three workers' six one repeats a lane with the weight 0.

    DiS has several vectors in one parameter, with rates and weight decay of their own.
    """
    on_ranks(world, at_each_stage, functools.partial(takes_the_same_steps, name, "none"))


@pytest.mark.parametrize(("name", "checkpointing"), [("dis", "block"), ("dit", "selective")])
def test_recomputed_blocks_have_the_same_gradients(name: str, checkpointing: str) -> None:
    """With two workers. DeepSpeed's hooks of a parameter run in several graphs of one backward pass (its issue 8224)."""
    on_ranks(2, at_each_stage, functools.partial(takes_the_same_steps, name, checkpointing))


def takes_the_same_steps(name: str, checkpointing: str, stage: int) -> None:
    engine.LEAST_BUCKET = 0  # eight reductions a pass, as a published size has; the process ends with this check
    settings = SETTINGS.model_copy(update={"zero_stage": stage, "clip": CLIP[name]})
    model = initial_model(name, checkpointing)
    begin = {name: p.detach().clone().flatten() for name, p in model.named_parameters()}
    world = dist.get_world_size()
    passes = forward_passes(LANES, dist.get_rank(), world, largest_share(LANES, world))
    state = engine.start(model, settings, torch.device("cpu"), resume.fresh(model), 0, len(passes))
    state.set_learning_rate(learning_rate(settings, 0))
    norms = []
    for step in range(STEPS):
        inputs = [lane_input(step, lanes[0], weight) for lanes, weight in passes]
        loop.train_step(state, PROCESS, settings, inputs, 8 * step)
        norms.append(state.gradient_norm)
    assert norms == pytest.approx(plain(name).norms, rel=MOMENTS)
    assert {group["eps"] for group in state.optimizer.param_groups} == {1e-8 / 4}
    assert min(norms) < settings.clip < max(norms), "some steps are clipped"
    for kind in state.kinds:
        expected, error, of_keys, size = plain(name).state(kind), 0.0, 0.0, 0.0
        for s, flat in state.segments(kind).items():
            exact, before = (x[s.name][s.start : s.end].double() for x in (expected, begin))
            squares, at, width = (flat - exact).square(), torch.arange(s.start, s.end), model.settings.width
            keys = (at // width == 1) & s.name.endswith("qkv.bias")
            error += float(squares[~keys].sum())
            of_keys += float(squares[keys].sum())
            size += float((exact - (0 if kind in engine.MOMENTS else before)).square().sum())
        assert size > 0, (stage, kind)
        assert (error / size) ** 0.5 < (MOMENTS if kind in engine.MOMENTS else MOVES), (stage, kind)
        assert (of_keys / size) ** 0.5 < (MOMENTS if kind in engine.MOMENTS else KEYS_MOVE), (stage, kind)
