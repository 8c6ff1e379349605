"""The floor is the distance of a perfect model, and of the VAE's reconstructions, at the sizes at which models are measured."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dis_scale import vae
from dis_scale.data.listing import Entry
from dis_scale.data.sources import open_source
from dis_scale.evaluation import floor
from dis_scale.evaluation.features import Features
from dis_scale.evaluation.floor import REAL, RECONSTRUCTED, FloorBlock
from dis_scale.evaluation.metrics import Frechet, MeanCovariance
from dis_scale.evaluation.reference import Reference
from dis_scale.evaluation.sampling import BlockSampler, sample_labels
from dis_scale.process.errors import DisScaleError, StorageError
from dis_scale.recipe import Evaluate, Recipe, TrainedVae, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from tests.conftest import TINY
from tests.support.evaluations import evaluate
from tests.support.metrics import fit
from tests.support.programs import export, with_exported

D, IMAGES, SAMPLES, DRAWS = 12, 3000, 500, 30
CLASSES = 4
TINY_RECIPE = reading.load(TINY)


def images(labels: np.ndarray, seed: int, features: int = D, apart: float = 2) -> np.ndarray:
    """Return features (N, features) of real images, with scales of their own, whose classes are `apart`."""
    noise = np.random.default_rng(seed).standard_normal((len(labels), features)) * np.linspace(0.5, 3, features)
    return (noise + apart * labels[:, None]).astype(np.float32)


def real_labels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(CLASSES, IMAGES, p=[0.1, 0.2, 0.3, 0.4])


def wanted_labels(sampled: Evaluate, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the labels of a model's samples."""
    return sample_labels(
        TINY_RECIPE.model_copy(update={"seed": seed, "evaluate": sampled}), np.bincount(labels, minlength=CLASSES).tolist()
    )


def blocks(kinds: dict[str, np.ndarray], weights: str = "seeded") -> Iterator[FloorBlock]:
    for first in range(0, len(kinds[REAL]), 250):
        part = {kind: {"digits": Features(weights, x[first : first + 250])} for kind, x in kinds.items()}
        yield FloorBlock(np.arange(first, first + len(part[REAL]["digits"].pooled)), part)


def measured(
    seed: int,
    sampled: Evaluate,
    blur: float = 0.0,
    choice: int | None = None,
    features: int = D,
    apart: float = 2,
    labels: np.ndarray | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the floors of one set of real images, and of ones whose features `blur` shifts, if it does.

    `choice` takes other images of the set, by another order of its positions.
    """
    labels = real_labels(seed) if labels is None else labels
    every = images(labels, seed, features, apart)
    if choice is not None:
        order = np.random.default_rng(choice).permutation(IMAGES)
        labels, every = labels[order], every[order]
    chosen = floor.chosen_images(labels, sampled.samples)
    weights = floor.sample_weights(labels[chosen], wanted_labels(sampled, labels, seed))
    kinds = {REAL: every[chosen]} | ({RECONSTRUCTED: every[chosen] + np.float32(blur)} if blur else {})
    references = {"digits": Reference("seeded", fit(every))}
    values, _ = floor.measure_floor(blocks(kinds), references, sampled, weights)
    return values[REAL], values.get(RECONSTRUCTED, {})


@pytest.mark.parametrize("labels_setting", ["balanced", "random", "uniform"])
@pytest.mark.parametrize("samples", [SAMPLES, 2500], ids=["fewer than half", "more than half"])
@pytest.mark.parametrize(("features", "apart"), [(D, 2.0), (48, 0.1)], ids=["classes apart", "classes alike"])
def test_real_images_have_the_distance_of_a_perfect_model(features: int, apart: float, samples: int, labels_setting: str) -> None:
    """That of new images of the samples' classes: the mean over 60 sets, within three errors.

    Classes that are alike have a distance of finite sets alone, and weights make the sets smaller.
    """
    sampled, ours, theirs = evaluate(samples=samples, labels=labels_setting), list[float](), list[float]()
    metric = sampled.metric
    for seed in range(2 * DRAWS):
        labels = real_labels(seed)
        ours.append(measured(seed, sampled, features=features, apart=apart)[0][metric])
        perfect = images(wanted_labels(sampled, labels, seed), 1000 + seed, features, apart)
        theirs.append(Frechet(fit(images(labels, seed, features, apart)))(fit(perfect)))
    error = np.hypot(np.std(ours), np.std(theirs)) / np.sqrt(2 * DRAWS)
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=3 * error)
    assert error < 0.08 * np.mean(theirs), "otherwise the test would accept two halves of the images"


def test_a_class_with_too_few_images_for_its_share_of_the_samples_has_no_floor() -> None:
    """Of 18 images a quarter of all samples: their noise is most of the distance."""
    rare = np.random.default_rng(0).choice(CLASSES, IMAGES, p=[0.98, 0.012, 0.004, 0.004])
    assert measured(0, evaluate(samples=SAMPLES, labels="balanced"), labels=rare)
    with pytest.raises(DisScaleError, match=r"500 real images, weighted .*, are worth \d+, and a floor of 12 features takes 24"):
        measured(0, evaluate(samples=SAMPLES, labels="uniform"), labels=rare)


def test_a_class_of_the_samples_without_a_chosen_image_has_no_floor() -> None:
    """A quarter of all samples: without them the floor would be a hundredth of a perfect model's distance."""
    rare = np.repeat([0, 1, 2, 3], [999, 999, 1000, 2])
    with pytest.raises(DisScaleError, match=r"125 of 500 samples are of classes without an image among the 500 .*, such as 3"):
        measured(0, evaluate(samples=SAMPLES, labels="uniform"), labels=rare)


@pytest.mark.parametrize("samples", [13, 17, 23])
def test_few_images_of_nearly_equal_weights_have_a_floor(samples: int) -> None:
    """Between one and two for each feature; the samples' classes are nearly those of the images."""
    assert measured(0, evaluate(samples=samples, labels="balanced"))[0][evaluate(samples=samples).metric] > 0


def test_statistics_of_an_unknown_number_of_images_give_a_floor() -> None:
    """Those of ADM's files: as if they were of infinitely many."""
    every = images(real_labels(0), 0)
    chosen = {REAL: every[:SAMPLES]}
    sampled = evaluate(samples=SAMPLES, reference="adm.npz", metrics=["distance"])
    exact = fit(every)
    distances = [
        floor.measure_floor(
            [FloorBlock(np.arange(SAMPLES), {REAL: {"inception": Features("seeded", chosen[REAL])}})],
            {"inception": Reference("seeded", MeanCovariance(count, exact.mean, exact.covariance))}, sampled, np.ones(SAMPLES),
        )[0][REAL]["fid_500"]
        for count in (0, 10**9)
    ]  # fmt: skip
    assert distances[0] == pytest.approx(distances[1], rel=1e-6)
    assert distances[0] == pytest.approx(Frechet(exact)(fit(every[:SAMPLES])), rel=1e-6)


def test_images_that_are_not_decoded_have_no_weight() -> None:
    every, weights = images(real_labels(0), 0), np.ones(SAMPLES)
    weights[100:300] = 0
    left = np.delete(np.arange(SAMPLES), np.arange(100, 300))
    references, sampled = {"digits": Reference("seeded", fit(every))}, evaluate(samples=SAMPLES)
    some = FloorBlock(left, {REAL: {"digits": Features("seeded", every[left])}})
    plain = FloorBlock(np.arange(300), {REAL: {"digits": Features("seeded", every[left])}})
    one = floor.measure_floor([some], references, sampled, weights)[0][REAL]
    other = floor.measure_floor([plain], references, sampled, np.ones(300))[0][REAL]
    assert one[sampled.metric] == pytest.approx(other[sampled.metric], rel=1e-9)


def test_reconstructions_keep_their_own_distance() -> None:
    """A shift by 0.5 of each feature adds D / 4 to what a perfect model has, at any number of images."""
    for samples in (SAMPLES, 2500):
        sampled = evaluate(samples=samples)
        pairs = [measured(seed, sampled, blur=0.5) for seed in range(DRAWS)]
        added = [moved[sampled.metric] - real[sampled.metric] for real, moved in pairs]
        assert np.mean(added) == pytest.approx(D / 4, rel=0.08)


def test_the_error_is_the_spread_over_other_choices() -> None:
    sampled = evaluate(samples=SAMPLES)
    found = [measured(0, sampled, blur=0.5, choice=choice) for choice in range(DRAWS)]
    for kind in (0, 1):
        values, errors = zip(*((each[kind][sampled.metric], each[kind][f"{sampled.metric}_error"]) for each in found), strict=True)
        assert np.mean(errors) == pytest.approx(np.std(values), rel=0.6)


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(0, 3), min_size=2, max_size=40), samples=st.integers(1, 60))
def test_each_class_has_its_share_of_the_chosen_images(labels: list[int], samples: int) -> None:
    chosen = floor.chosen_images(np.array(labels), samples).tolist()
    assert len(set(chosen)) == len(chosen) == min(samples, len(labels) // 2)
    counts, every = Counter(labels[i] for i in chosen), Counter(labels)
    for label, count in every.items():
        assert abs(counts[label] - len(chosen) * count / len(labels)) <= 2


def test_the_weights_have_the_shares_of_the_samples() -> None:
    weights = floor.sample_weights(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1, 2, 2]))
    assert weights == pytest.approx([1 / 3, 1 / 3, 2, 4 / 3])
    assert floor.sample_weights(np.zeros(4, int), np.zeros(9, int)).tolist() == [1] * 4
    with pytest.raises(DisScaleError, match="250 of 500 samples are of classes without an image among the 500"):
        floor.sample_weights(np.zeros(500, int), np.repeat([0, 1], 250))  # though it looks like a set without classes


def test_without_classes_the_chosen_images_are_random() -> None:
    few, more = (floor.chosen_images(np.zeros(1000, int), samples) for samples in (100, 400))
    assert (len(few), len(more)) == (100, 400)
    assert np.array_equal(few, more[:100])
    assert 300 < few.mean() < 700


def test_features_of_other_weights_are_refused() -> None:
    some = images(real_labels(0), 0)
    every = {REAL: some}
    with pytest.raises(StorageError, match=r"floor/block-00000.npz has features of another digits"):
        floor.measure_floor(blocks(every, "others"), {"digits": Reference("seeded", fit(some))}, evaluate(), np.ones(3000))


def test_too_few_images_are_refused_before_any_is_read() -> None:
    few = {"digits": Reference("seeded", fit(images(real_labels(0), 0)))}
    with pytest.raises(DisScaleError, match=r"12 images are too few .* of 12 features: expected at least 13, which are half of"):
        floor.require_enough(12, few)


def test_an_extractor_with_too_many_features_takes_no_floor_from_the_others() -> None:
    labels = real_labels(0)
    every = {"digits": images(labels, 0), "inception": images(labels, 0, features=SAMPLES)}
    references = {name: Reference("seeded", fit(each)) for name, each in every.items()}
    floor.require_enough(SAMPLES, references)
    features = {name: Features("seeded", each[:SAMPLES]) for name, each in every.items()}
    both, one = (FloorBlock(np.arange(SAMPLES), {REAL: each}) for each in (features, {"digits": features["digits"]}))
    values, missing = floor.measure_floor([both], references, evaluate(samples=SAMPLES), np.ones(SAMPLES))
    assert (values, {}) == floor.measure_floor([one], references, evaluate(samples=SAMPLES), np.ones(SAMPLES))
    assert [why.partition(" are")[0] for why in missing.values()] == [f"{SAMPLES:,} images"]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    settings = {"samples": 300, "block_images": 40, "batch_images": 16}
    recipe = with_exported(a=export(tmp_path / "a.pt2"))
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=settings)})


@pytest.fixture
def sampler(tmp_path: Path, recipe: Recipe) -> BlockSampler:
    from dis_scale.evaluation.features import load_extractors

    torch.manual_seed(0)
    sweep = Sweep.below(open_folder(tmp_path) / "store", recipe)
    vae.save(sweep.vae, vae.new(TrainedVae(kind="trained", widths=(8, 8, 8)), 32))
    cpu = torch.device("cpu")
    return BlockSampler(sweep, vae.load(sweep), load_extractors(sweep, cpu), None, np.arange(300) % 10, cpu)


def test_a_block_has_the_features_of_its_images_and_of_their_reconstructions(sampler: BlockSampler, recipe: Recipe) -> None:
    source, (extractor,) = open_source(recipe.data), sampler.extractors
    every = floor.chosen_images(source.listing.labels(), len(sampler.labels))
    block = floor.make_block(sampler, source, every, 1)
    chosen = np.sort(every)[40:80].tolist()
    assert every[block.numbers].tolist() == chosen, "in the source's order"
    pixels = np.stack([source.pixels(i, recipe.data.resolution) for i in chosen])
    assert np.array_equal(block.features[REAL]["a"].pooled, extractor(pixels).pooled)
    assert not np.array_equal(block.features[RECONSTRUCTED]["a"].pooled, block.features[REAL]["a"].pooled)
    again = FloorBlock.from_bytes(floor.make_block(sampler, source, every, 1).to_bytes(), "here")
    assert np.array_equal(again.numbers, block.numbers)
    for kind in (REAL, RECONSTRUCTED):
        assert again.features[kind]["a"].identity == extractor.identity
        assert np.array_equal(again.features[kind]["a"].pooled, block.features[kind]["a"].pooled)


def test_undecodable_images_are_left_out_also_all_of_a_block(sampler: BlockSampler, recipe: Recipe) -> None:
    data = recipe.data.model_copy(update={"undecodable": "skip"})
    sampler.sweep = replace(sampler.sweep, recipe=recipe.model_copy(update={"data": data}))
    source = open_source(data)
    every = floor.chosen_images(source.listing.labels(), len(sampler.labels))
    chosen = np.sort(every)
    broken = {source.names[i] for i in [*chosen[:40], chosen[41]]}

    def read(entries: Sequence[Entry]) -> list[bytes | None]:
        return [b"" if each.name in broken else data for each, data in zip(entries, source.read(entries), strict=True)]

    damaged = replace(source, read=read)
    none, some = (FloorBlock.from_bytes(floor.make_block(sampler, damaged, every, n).to_bytes(), "here") for n in (0, 1))
    assert (len(none.numbers), none.features) == (0, {})
    assert len(some.numbers) == len(some.features[REAL]["a"].pooled) == 39


def test_the_order_of_the_blocks_does_not_change_the_error() -> None:
    """Blocks have images that are stored together; the jackknife's groups are by the samples' numbers."""
    every = images(real_labels(0), 0)
    order = np.argsort(every[:SAMPLES, 0])
    references, sampled = {"digits": Reference("seeded", fit(every))}, evaluate(samples=SAMPLES)
    mixed = FloorBlock(order, {REAL: {"digits": Features("seeded", every[:SAMPLES][order])}})
    plain = FloorBlock(np.arange(SAMPLES), {REAL: {"digits": Features("seeded", every[:SAMPLES])}})
    weights = np.linspace(0.5, 1.5, SAMPLES)
    one, other = (floor.measure_floor([block], references, sampled, weights)[0][REAL] for block in (mixed, plain))
    assert one == pytest.approx(other, rel=1e-9)


def test_pixels_have_no_reconstructions(sampler: BlockSampler, recipe: Recipe) -> None:
    sampler.vae, source = vae.PixelVae(), open_source(recipe.data)
    assert floor.make_block(sampler, source, np.arange(100), 0).features.keys() == {REAL}


def test_a_stored_block_keeps_the_order_of_kinds_and_extractors() -> None:
    """The report takes the last floor for that of a perfect model."""
    names = ["digits", *"fedcba"]
    made = FloorBlock(np.arange(3), {k: {n: Features(n, np.zeros((3, 2))) for n in names} for k in (REAL, RECONSTRUCTED)})
    again = FloorBlock.from_bytes(made.to_bytes(), "here")
    assert [(k, n) for k, by_name in again.features.items() for n in by_name] == [
        (k, n) for k in (REAL, RECONSTRUCTED) for n in names
    ]
