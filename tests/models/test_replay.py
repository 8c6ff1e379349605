"""Sampling by CUDA graphs, with a capture in place of CUDA's: a graph is of one shape, owns its inputs, and repeats its pass."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dis_scale.models import build
from dis_scale.models.dis.settings import Dis
from dis_scale.models.replay import Replayed, replayed
from dis_scale.models.tokens import Backbone
from dis_scale.recipe import LatentShape

Forward = Callable[..., Tensor]


@pytest.fixture
def model() -> Backbone:
    return build(Dis(kind="dis", width=16, depth=2, patch=2), LatentShape(4, 8), 10).requires_grad_(False)


class Capture:
    """Captures that keep their shapes. A replay computes on the memory of its capture, as a graph does."""

    def __init__(self) -> None:
        self.shapes = list[tuple[int, ...]]()

    def __call__(self, model: Forward, given: list[Tensor], _: tuple[int, int]) -> Forward:
        static = [x.clone() for x in given]
        self.shapes.append(tuple(static[0].shape))

        def again(*now: Tensor) -> Tensor:
            for to, x in zip(static, now, strict=True):
                to.copy_(x)
            return model(*static)

        return again


def inputs(batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x_BCHW, t_B = torch.randn(batch, 4, 8, 8, generator=random), torch.rand(batch, generator=random) * 999
    return x_BCHW, t_B, torch.randint(0, 11, (batch,), generator=random)


def test_a_pass_is_captured_once_for_a_shape(model: Backbone) -> None:
    """The whole batch, a doubled one, and the last one, in turn: each output is that of its own inputs."""
    drawn, kept = Replayed(model, after=0, capture=(captured := Capture())), list[tuple[Tensor, Tensor]]()
    for seed, batch in enumerate((3, 6, 3, 2, 6)):
        given = inputs(batch, seed)
        kept.append((drawn(*given), model(*given)))
    assert all(torch.equal(got, expected) for got, expected in kept)
    assert captured.shapes == [(3, 4, 8, 8), (6, 4, 8, 8), (2, 4, 8, 8)]
    assert (drawn.num_classes, drawn.shape) == (10, LatentShape(4, 8))


def test_the_graphs_of_a_model_share_memory_that_no_other_model_gets(model: Backbone) -> None:
    """PyTorch refuses a pool whose graphs are gone: an evaluator's second checkpoint would have none."""
    pools = list[tuple[int, int]]()

    def captured(model: Forward, _: list[Tensor], pool: tuple[int, int]) -> Forward:
        pools.append(pool)
        return model

    for _ in range(2):
        drawn = Replayed(model, after=0, capture=captured)
        for batch in (3, 6):
            drawn(*inputs(batch, 0))
    assert pools[0] == pools[1] != pools[2] == pools[3]


def test_after_a_rejected_graph_the_next_one_gets_memory_of_its_own(model: Backbone) -> None:
    """The pool's only graph is gone with it."""
    pools = list[tuple[int, int]]()

    def captured(model: Forward, _: list[Tensor], pool: tuple[int, int]) -> Forward:
        pools.append(pool)
        return model if len(pools) > 1 else lambda *given: model(*given) + 1

    drawn = Replayed(model, after=0, capture=captured)
    for batch in (3, 6, 2):
        drawn(*inputs(batch, 0))
    assert pools[0] != pools[1] == pools[2]


def test_a_shape_that_is_used_for_a_few_passes_only_is_not_captured(model: Backbone) -> None:
    drawn = Replayed(model, after=2, capture=(captured := Capture()))
    for seed, batch in enumerate((3, 3, 2, 3, 2, 3)):
        given = inputs(batch, seed)
        assert torch.equal(drawn(*given), model(*given))
    assert captured.shapes == [(3, 4, 8, 8)]


def test_a_pass_that_cannot_be_captured_runs_as_it_is(model: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: object) -> Forward:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")

    def of_other_numbers(model: Forward, *_: object) -> Forward:
        return lambda *given: model(*given) + 1

    given = inputs(3, 0)
    for capture, reason in ((fails, "not permitted when stream is capturing"), (of_other_numbers, "other numbers")):
        drawn = Replayed(model, after=0, capture=capture)
        with caplog.at_level(logging.WARNING):
            assert torch.equal(drawn(*given), model(*given))
        drawn(*given)
        (line,) = caplog.messages
        assert line.startswith("sampling launches each kernel of a pass of 3 images by itself: ")
        assert reason in line
        assert "\n" not in line
        caplog.clear()


def test_on_a_cpu_nothing_is_captured(model: Backbone) -> None:
    assert replayed(model, torch.device("cpu")) is model
    assert isinstance(replayed(model, torch.device("cuda")), Replayed)
