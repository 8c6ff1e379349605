"""The plan: derived sizes, rates across widths, and what is read in an epoch."""

import pytest
import torch

from dis_scale import diffusion
from dis_scale.diffusion.guidance import guided
from dis_scale.diffusion.samplers import sample
from dis_scale.planning import plan as plans
from dis_scale.planning.plan import price_sweep
from dis_scale.recipe import LatentShape, Recipe, reading
from tests.conftest import TINY
from tests.support.evaluations import SHAPE, shown


def test_the_plan_derives_the_batch_and_names_the_price(tiny: Recipe) -> None:
    text = shown(plans.table(price_sweep(tiny, SHAPE)))
    assert "batch 16 = 4 lanes x 4, up to 2 on each of 2 workers; 320 images = 20 steps; ZeRO stage 1, fp32" in text
    assert "22,304" in text


def test_the_plan_names_the_rates_of_a_base_width() -> None:
    recipe = reading.load(TINY, ["models.dit.train.base_width=8"])
    text = shown(plans.table(price_sweep(recipe, SHAPE)))
    assert "dit: learning rate of sums over the width x 0.5 (width 16, base_width 8)" in text
    assert "dis: learning rate" not in text


class Counting:
    """A model that counts the images of its calls."""

    num_classes: int | None = 10
    images = 0

    def __call__(self, x_BCHW: torch.Tensor, t_B: torch.Tensor, y_B: torch.Tensor | None = None, /) -> torch.Tensor:
        self.images += len(x_BCHW)
        return torch.cat([x_BCHW, x_BCHW], dim=1)


@pytest.mark.parametrize(
    ("process", "sampler"),
    [
        ("{kind: flow}", "euler"),
        ("{kind: flow}", "heun"),
        ("{kind: flow, shift: 3}", "euler"),
        ("{kind: flow, predicts: image}", "heun"),
        ("{kind: gaussian, steps: 100, betas: cosine}", "ddim"),
    ],
)
@pytest.mark.parametrize("interval", ["[100, 600]", "[500, 1000]", "[0, 450]", "null"])
def test_guidance_costs_a_pass_of_each_step_that_it_guides(process: str, sampler: str, interval: str) -> None:
    """Counted at the model's calls."""
    how = [f"diffusion={process}", f"evaluate.sampler={sampler}", "evaluate.steps=20", "evaluate.guidance=1.5"]
    recipe = reading.load(TINY, how if interval == "null" else [*how, f"evaluate.guidance_interval={interval}"])
    plan, model, label = price_sweep(recipe, SHAPE), Counting(), torch.zeros(1, dtype=torch.long)
    x_T = torch.zeros(1, SHAPE.channels, SHAPE.size, SHAPE.size)
    built = diffusion.build(recipe.diffusion, SHAPE)
    sample(guided(model, label, recipe.evaluate), built, sampler, 20, x_T, lambda _, shape: torch.zeros(*shape))
    of_one_image = 2e9 * plan.costs["dit"].gmacs_forward * recipe.evaluate.samples
    assert plan.sampling_flops("dit") == pytest.approx(model.images * of_one_image)


def test_a_model_that_guides_costs_its_own_pass() -> None:
    plan = price_sweep(reading.load(TINY, ["evaluate.guidance={by: dis, images: 0, scale: 2}", "evaluate.steps=20"]), SHAPE)
    each = plan.costs["dit"].gmacs_forward + plan.costs["dis"].gmacs_forward
    assert plan.sampling_flops("dit") == pytest.approx(2e9 * each * 20 * plan.recipe.evaluate.samples)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "a node's cache (20 GiB) holds 48% of them, and each node reads 38.32 GB an epoch after the first"),
        (["reader.cache_gib=60"], "holds 100% of them, and each node reads 0.00 GB an epoch after the first"),
        (["reader.cache_gib=0"], "each worker reads them all in every epoch, since a node has no cache"),
        (["reader.memory_gib=50"], "kept in each worker's memory, and read once"),
    ],
)
def test_the_plan_names_what_is_read_in_an_epoch(settings: list[str], words: str) -> None:
    priced = plans.price_reading(reading.load(TINY, settings), LatentShape(4, 32), 1_281_167)
    assert priced.startswith("1,281,167 images, ")
    assert priced.endswith(words)
