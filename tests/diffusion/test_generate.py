"""Samples by number: the same noise for any split into batches; guidance; errors for bad input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dis_scale.diffusion import Process
from dis_scale.diffusion.generate import SampleNoise, batch_sizes, generate
from dis_scale.diffusion.guidance import Labelled, forward_images, guided
from dis_scale.process.errors import UserError
from dis_scale.recipe import Flow, Gaussian, LatentShape, Sampling
from dis_scale.recipe.evaluate import FLOW_SAMPLERS, GAUSSIAN_SAMPLERS, Autoguidance, Sampler
from tests.support.gaussian_data import build

PROCESSES: dict[str, Process] = {"gaussian": build(Gaussian(kind="gaussian")), "flow": build(Flow(kind="flow"))}
SAMPLERS = [("gaussian", name) for name in GAUSSIAN_SAMPLERS] + [("flow", name) for name in FLOW_SAMPLERS]


class Toy:
    """A backbone of one line, which treats each sample independently."""

    num_classes: int | None = 10
    shape = LatentShape(4, 3)
    calls: int = 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += len(x)
        assert y is not None
        return torch.cat([0.1 * x + (0.01 * y + 1e-4 * t)[:, None, None, None], torch.zeros_like(x)], dim=1)


def test_noise_is_the_same_bit_for_bit_at_any_split() -> None:
    whole = SampleNoise(0, range(5))
    parts = [SampleNoise(0, [0]), SampleNoise(0, [1, 2, 3]), SampleNoise(0, [4])]
    shape = (4, 3, 3)
    draws: tuple[Callable[[SampleNoise], Tensor], ...] = (
        lambda s: s(7, (len(s.numbers), *shape)), lambda s: s.start((len(s.numbers), *shape))
    )  # fmt: skip
    for draw in draws:
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts]))
        assert len({sample.numpy().tobytes() for sample in draw(whole)}) == 5
    assert not torch.equal(whole(7, (5, *shape)), whole(8, (5, *shape)))


def sampling(sampler: Sampler = "euler", steps: int = 1, **guidance: Any) -> Sampling:
    """Sampling settings as a program may make them: not checked."""
    return Sampling.model_construct(sampler=sampler, steps=steps, **guidance)


@pytest.mark.parametrize(("kind", "name"), SAMPLERS)
def test_samples_do_not_depend_on_the_split(kind: str, name: Sampler) -> None:
    def draw(labels: list[int], numbers: list[int]) -> Tensor:
        return generate(Toy(), PROCESSES[kind], labels, numbers, sampling(name, steps=4, guidance=1.5), seed=3)

    whole = draw([1, 7, 2, 10], [0, 1, 2, 3])
    assert torch.equal(whole, torch.cat([draw([1], [0]), draw([7, 2, 10], [1, 2, 3])]))
    assert bool(torch.isfinite(whole).all())


def test_progress_is_reported() -> None:
    reported = list[tuple[int, int]]()
    generate(Toy(), PROCESSES["flow"], [1], [0], sampling("euler", steps=3), progress=lambda *at: reported.append(at))
    assert reported == [(1, 3), (2, 3), (3, 3)]


def test_guidance_covers_all_noise_channels_or_the_official_three() -> None:
    model, y = Toy(), torch.tensor([1, 2])
    x, t = torch.randn(2, 4, 3, 3), torch.full((2,), 500.0)
    with_labels, without = model(x, t, y), model(x, t, torch.tensor([10, 10]))
    out = guided(model, y, sampling(guidance=3.0))(x, t)
    assert torch.allclose(out[:, :4], without[:, :4] + 3 * (with_labels - without)[:, :4], atol=1e-6)
    assert torch.equal(out[:, 4:], with_labels[:, 4:])
    three = guided(model, y, sampling(guidance=3.0, guidance_channels=3))(x, t)
    assert torch.equal(three[:, :3], out[:, :3])
    assert torch.equal(three[:, 3:], with_labels[:, 3:])
    assert torch.equal(guided(model, y, sampling(guidance=3.0, guidance_channels=8))(x, t), out), "the variance is never guided"
    assert torch.equal(guided(model, y, sampling(guidance=3.0, guidance_interval=(0.0, 400.0)))(x, t), with_labels)
    assert torch.equal(guided(model, y, sampling(guidance=3.0, guidance_interval=(400.0, 600.0)))(x, t), out)


class Other(Toy):
    """A worse model."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += len(x)
        label = 0 if y is None else 0.03 * y[:, None, None, None]
        return torch.cat([0.2 * x + label + 1e-4 * t[:, None, None, None], torch.ones_like(x)], dim=1)


def by(scale: float) -> Autoguidance:
    return Autoguidance(by="other", images=1, scale=scale)


def test_a_worse_model_guides_by_equation_5_with_the_same_labels() -> None:
    model, worse, y = Toy(), Other(), torch.tensor([1, 2])
    x, t = torch.randn(2, 4, 3, 3), torch.full((2,), 500.0)
    good, bad = model(x, t, y), worse(x, t, y)
    out = guided(model, y, sampling(guidance=by(2.5)), worse)(x, t)
    assert torch.allclose(out[:, :4], bad[:, :4] + 2.5 * (good - bad)[:, :4], atol=1e-6)
    assert torch.equal(out[:, 4:], good[:, 4:]), "the variance is never guided"
    assert torch.allclose(guided(model, y, sampling(guidance=by(2.5)), model)(x, t), good, atol=1e-6), "by itself"
    early = sampling(guidance=by(2.5), guidance_interval=(0.0, 400.0))
    assert torch.equal(guided(model, y, early, worse)(x, t), good)
    worse.calls = 0
    assert torch.equal(guided(model, y, sampling(guidance=by(1)), worse)(x, t), good)
    assert worse.calls == 0, "at scale 1 it is not computed"
    assert forward_images({4}, sampling(guidance=by(2.5)), by_model=True) == {4}


def test_a_worse_model_guides_one_without_classes() -> None:
    model, worse = Other(), Other()
    model.num_classes = worse.num_classes = None
    x, t = torch.randn(2, 4, 3, 3), torch.full((2,), 500.0)

    def draw(guide: Labelled | None, scale: float) -> Tensor:
        return guided(model, None, sampling(guidance=by(scale)), guide)(x, t)

    nothing = draw(lambda *_: torch.zeros(2, 8, 3, 3), 3)  # type: ignore[arg-type]  # only called
    assert torch.allclose(nothing[:, :4], 3 * draw(None, 1)[:, :4], atol=1e-6)
    with pytest.raises(UserError, match="guidance 3 by other at 1 images: that model is not given"):
        draw(None, 3)


def test_guidance_of_one_costs_one_pass() -> None:
    model = Toy()
    guided(model, torch.tensor([1, 2]), sampling())(torch.randn(2, 4, 3, 3), torch.zeros(2))
    assert model.calls == 2


@pytest.mark.parametrize(("scale", "interval"), [(1.0, (100, 600)), (1.5, None), (1.5, (100, 600))])
def test_the_images_of_each_call_are_known_before(scale: float, interval: tuple[float, float] | None) -> None:
    """Seven samples in batches of three, at times inside and outside of the interval."""
    calls = list[int]()

    class Counting(Toy):
        def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            calls.append(len(x))
            return super().__call__(x, t, y)

    settings = sampling("euler", steps=5, guidance=scale, guidance_interval=interval)
    for numbers in (range(3), range(3, 6), range(6, 7)):
        generate(Counting(), PROCESSES["flow"], [1] * len(numbers), numbers, settings)
    assert set(calls) == forward_images(batch_sizes(7, 3), settings)


@pytest.mark.parametrize("total", [0, 2, 5, 6, 12])
def test_the_sizes_of_batches(total: int) -> None:
    assert batch_sizes(total, 5) == {len(range(first, min(first + 5, total))) for first in range(0, total, 5)}


def test_bad_input_is_one_clear_line_before_any_work() -> None:
    model = Toy()
    rows: list[tuple[dict[str, Any], str]] = [
        ({"sampler": "euler"}, "sampler euler does not fit the process gaussian: choose ddpm, ddim, dpm_solver"),
        ({"sampler": "ddmp"}, "unknown sampler 'ddmp' .did you mean 'ddpm'"),
        ({"sampler": "ddpm", "steps": 0}, "steps 0: expected 1 or more"),
        ({"sampler": "ddpm", "steps": 1001}, "steps 1001: expected 1 to 1000"),
        ({"sampler": "ddpm", "labels": [11]}, r"label 11 is out of range: expected 0 to 9"),
        ({"sampler": "ddpm", "labels": None}, "labels and model do not fit"),
    ]
    for kwargs, message in rows:
        settings = sampling(kwargs.pop("sampler"), steps=kwargs.pop("steps", 2))
        with pytest.raises(UserError, match=message):
            generate(model, PROCESSES["gaussian"], **({"labels": [1], "numbers": [0]} | kwargs), sampling=settings)
    assert model.calls == 0


class Unconditional(Toy):
    num_classes: int | None = None

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is None
        return super().__call__(x, t, torch.zeros(len(x)))


def test_an_unconditional_model_is_sampled_without_labels_and_not_guided() -> None:
    def draw(**more: Any) -> Tensor:
        return generate(Unconditional(), PROCESSES["flow"], None, [0, 1], sampling("euler", steps=2, **more))

    assert draw().shape == (2, 4, 3, 3)
    with pytest.raises(UserError, match=r"guidance 1.5: an unconditional model cannot be guided without another one, expected 1"):
        draw(guidance=1.5)


def test_only_the_first_channels_are_guided_if_asked() -> None:
    def draw(**more: Any) -> Tensor:
        return generate(Toy(), PROCESSES["flow"], [1, 7], [0, 1], sampling("euler", steps=3, **more))

    all_channels, three, none = draw(guidance=3.0), draw(guidance=3.0, guidance_channels=3), draw()
    assert torch.equal(three[:, :3], all_channels[:, :3])
    assert torch.equal(three[:, 3:], none[:, 3:])
    assert not torch.equal(all_channels[:, 3:], none[:, 3:])
