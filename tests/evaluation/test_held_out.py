"""The held-out loss sees exactly the images held out, with the same noise each time."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dis_scale import diffusion
from dis_scale.data.latents import Latents
from dis_scale.data.shards import unpack
from dis_scale.evaluation import held_out
from dis_scale.process.threads import batched
from dis_scale.recipe import Flow, Gaussian, Recipe
from dis_scale.storage.folder import open_folder
from tests.support.ranks import make_latents


class Echo(torch.nn.Module):
    """Returns a multiple of its input and records the labels."""

    num_classes = 10

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.seen, self.times = list[int](), set[float]()

    def forward(self, x_BCHW: torch.Tensor, t_B: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        assert x_BCHW.shape == (len(y_B), 4, 8, 8)
        self.seen += y_B.tolist()
        self.times |= set(t_B.tolist())
        return torch.cat([self.scale * x_BCHW, torch.zeros_like(x_BCHW)], 1)


@pytest.fixture
def latents(tiny: Recipe, tmp_path: Path) -> Latents:
    return Latents(make_latents(open_folder(tmp_path), tiny), seed=0, held_out=11)


def held_out_losses(latents: Latents, batch: int, scale: float = 0.0, process: Flow | Gaussian | None = None) -> dict[str, float]:
    built = diffusion.build(process or Flow(kind="flow"), latents.shape)
    return held_out.losses(Echo(scale), built, latents, seed=0, batch=batch)  # type: ignore[arg-type]


def test_each_held_out_image_is_seen_at_each_level(latents: Latents) -> None:
    model = Echo(0.0)
    held_out.losses(model, diffusion.build(Flow(kind="flow"), latents.shape), latents, seed=0, batch=4)  # type: ignore[arg-type]
    shards = {entry.name: unpack(latents.folder.read(entry.name), entry.name) for entry in latents.manifest.shards}
    places = zip(*latents.order.held_out, strict=True)
    expected = [(each.moments[row, 0], int(each.labels[row])) for shard, row in places for each in [[*shards.values()][shard]]]
    assert len(expected) == 11
    assert all(np.array_equal(a[0][: len(b[0])], b[0]) for a, b in zip(latents.held_out(), expected, strict=True))
    assert model.seen == [label for batch in batched([y for _, y in expected], 4) for label in held_out.LEVELS * batch]
    assert len(model.times) == held_out.LEVELS


def test_a_batch_is_read_at_a_time(latents: Latents) -> None:
    """Fifty thousand images of 512 pixels, and their noise, would take 5 GB."""
    read, model, process = list[int](), Echo(0.0), diffusion.build(Flow(kind="flow"), latents.shape)

    def one_by_one() -> Iterator[tuple[np.ndarray, int]]:
        for moments, label in latents.held_out():
            assert len(read) - len(model.seen) // held_out.LEVELS < 4
            read.append(label)
            yield moments, label

    part: Any = SimpleNamespace(held_out=one_by_one, order=latents.order, scaling=latents.scaling)
    held_out.losses(model, process, part, seed=0, batch=4)  # type: ignore[arg-type]
    assert len(read) == 11


def test_the_same_noise_at_any_batch(latents: Latents) -> None:
    once, again = held_out_losses(latents, batch=4), held_out_losses(latents, batch=11)
    assert once == pytest.approx(again, rel=1e-6)
    assert sorted(once)[:3] == ["held_out_loss", "held_out_loss/t0062", "held_out_loss/t0188"]


def test_the_loss_is_the_models(latents: Latents) -> None:
    """A model that predicts zero has the mean square of velocity (or noise) as its loss; the mean is over the levels."""
    silent = held_out_losses(latents, batch=11)
    assert silent["held_out_loss/t0062"] == pytest.approx(silent["held_out_loss/t0938"], rel=1e-6)
    assert held_out_losses(latents, batch=11, scale=1.0)["held_out_loss"] > silent["held_out_loss"]
    noise = held_out_losses(latents, batch=11, process=Gaussian(kind="gaussian"))
    assert noise["held_out_loss"] == pytest.approx(sum(v for k, v in noise.items() if "/" in k) / held_out.LEVELS)


def test_the_latents_are_scaled_as_those_of_training(tiny: Recipe, tmp_path: Path) -> None:
    """The velocity of noise and of scaled latents has the square of 2."""
    scaled = Latents(make_latents(open_folder(tmp_path), tiny), seed=0, held_out=11, normalise="channels")
    assert held_out_losses(scaled, batch=11)["held_out_loss"] == pytest.approx(2, abs=0.4)
