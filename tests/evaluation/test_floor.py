"""The floor is the distance of a perfect model, and of the VAE's reconstructions, at the sizes at which models are measured."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dis_scale import vae
from dis_scale.data.sources import open_source
from dis_scale.errors import DisScaleError, StorageError
from dis_scale.evaluation import floor
from dis_scale.evaluation.features import Features
from dis_scale.evaluation.floor import REAL, RECONSTRUCTED, FloorBlock
from dis_scale.evaluation.metrics import Frechet, fit
from dis_scale.evaluation.reference import Reference
from dis_scale.evaluation.sampling import BlockSampler
from dis_scale.recipe import Evaluate, Recipe, TrainedVae
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from tests.evaluation.test_measure import evaluate
from tests.evaluation.test_reference import script, with_scripts

D, IMAGES, SAMPLES, DRAWS = 12, 3000, 500, 30


def images(seed: int, count: int = IMAGES) -> np.ndarray:
    """Return features (count, D) of real images, with a mean and scales of their own."""
    return (np.random.default_rng(seed).standard_normal((count, D)) * np.linspace(0.5, 3, D) + 2).astype(np.float32)


def blocks(kinds: dict[str, np.ndarray], weights: str = "seeded") -> Iterator[FloorBlock]:
    for first in range(0, len(kinds[REAL]), 250):
        yield {kind: {"digits": Features(weights, x[first : first + 250])} for kind, x in kinds.items()}


def measured(
    every: np.ndarray, settings: Evaluate, blur: float = 0.0, seed: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the floors of chosen images, and of ones whose features `blur` shifts."""
    chosen = np.random.default_rng(seed).permutation(len(every))[: min(settings.samples, len(every) // 2)]
    kinds = {REAL: every[chosen], RECONSTRUCTED: every[chosen] + np.float32(blur)}
    references = {"digits": Reference("seeded", fit(every))}
    values = floor.measure_floor(blocks(kinds), references, settings, len(chosen))
    return values[REAL], values[RECONSTRUCTED]


@pytest.mark.parametrize("samples", [SAMPLES, 2500], ids=["fewer than half", "more than half"])
def test_real_images_have_the_distance_of_a_perfect_model(samples: int) -> None:
    """That of other images of the same kind, as many as there are samples: the mean over 30 draws, within three errors."""
    settings, ours, theirs = evaluate(samples=samples), list[float](), list[float]()
    metric = settings.metric
    for seed in range(DRAWS):
        every = images(seed)
        ours.append(measured(every, settings)[0][metric])
        theirs.append(Frechet(fit(every))(fit(images(1000 + seed, samples))))
    error = np.hypot(np.std(ours), np.std(theirs)) / np.sqrt(DRAWS)
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=3 * error)
    assert error < 0.08 * np.mean(theirs), "otherwise the test would accept two halves of the images"


def test_reconstructions_keep_their_own_distance() -> None:
    """A shift by 0.5 of each feature adds D / 4 to what a perfect model has, at any number of images."""
    for samples in (SAMPLES, 2500):
        settings = evaluate(samples=samples)
        pairs = [measured(images(seed), settings, blur=0.5) for seed in range(DRAWS)]
        added = [moved[settings.metric] - real[settings.metric] for real, moved in pairs]
        assert np.mean(added) == pytest.approx(D / 4, rel=0.08)


def test_the_error_is_the_spread_over_other_choices() -> None:
    settings, every = evaluate(samples=SAMPLES), images(0)
    found = [measured(every, settings, blur=0.5, seed=seed) for seed in range(DRAWS)]
    for kind in (0, 1):
        values, errors = zip(
            *((each[kind][settings.metric], each[kind][f"{settings.metric}_error"]) for each in found), strict=True
        )
        assert np.mean(errors) == pytest.approx(np.std(values), rel=0.6)


def test_the_chosen_images_are_random_and_at_most_half() -> None:
    few, half = floor.chosen_images(100, 1000), floor.chosen_images(5000, 1000)
    assert (len(few), len(half), len(set(half.tolist()))) == (100, 500, 500)
    assert np.array_equal(few, half[:100])
    assert 300 < few.mean() < 700
    assert not np.array_equal(few, np.sort(few))


def test_features_of_other_weights_are_refused() -> None:
    every = {REAL: images(0)}
    with pytest.raises(StorageError, match=r"floor/block-00000.npz has features of another digits"):
        floor.measure_floor(blocks(every, "others"), {"digits": Reference("seeded", fit(images(0)))}, evaluate(), 3000)


def test_too_few_images_are_refused_before_any_is_read() -> None:
    with pytest.raises(DisScaleError, match="12 samples are too few for the covariance of 12 features"):
        floor.require_enough(12, {"digits": Reference("seeded", fit(images(0)))})


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    settings = {"samples": 300, "block_images": 40, "batch_images": 16}
    recipe = with_scripts(a=script(tmp_path / "a.pt"))
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=settings)})


@pytest.fixture
def sampler(tmp_path: Path, recipe: Recipe) -> BlockSampler:
    from dis_scale.evaluation.features import load_extractors

    torch.manual_seed(0)
    sweep = Sweep.below(open_folder(tmp_path) / "store", recipe)
    vae.save(sweep.vae, vae.new(TrainedVae(kind="trained", widths=(8, 8, 8)), 32))
    cpu = torch.device("cpu")
    return BlockSampler(sweep, vae.load(sweep), load_extractors(sweep, cpu), None, np.zeros(300, int), cpu)


def test_a_block_has_the_features_of_its_images_and_of_their_reconstructions(
    sampler: BlockSampler, recipe: Recipe
) -> None:
    source, (extractor,) = open_source(recipe.data), sampler.extractors
    block = floor.make_block(sampler, source, 1)
    chosen = np.sort(floor.chosen_images(300, len(source))[40:80]).tolist()
    pixels = np.stack([source.pixels(i, recipe.data.resolution) for i in chosen])
    assert np.array_equal(block[REAL]["a"].pooled, extractor(pixels).pooled)
    assert not np.array_equal(block[RECONSTRUCTED]["a"].pooled, block[REAL]["a"].pooled)
    again = floor.from_bytes(floor.to_bytes(floor.make_block(sampler, source, 1)), "here")
    for kind in (REAL, RECONSTRUCTED):
        assert again[kind]["a"].identity == extractor.identity
        assert np.array_equal(again[kind]["a"].pooled, block[kind]["a"].pooled)


def test_pixels_have_no_reconstructions(sampler: BlockSampler, recipe: Recipe) -> None:
    sampler.vae = vae.PixelVae()
    assert floor.make_block(sampler, open_source(recipe.data), 0).keys() == {REAL}
