"""Blocks to named metrics: bit-equal for any workers, two extractors in one pass, and blocks that cannot be measured."""

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from dis_scale.evaluation import metrics, score, sets
from dis_scale.evaluation.features import Features
from dis_scale.evaluation.measure import measure_blocks, notes
from dis_scale.evaluation.metrics import Frechet
from dis_scale.evaluation.reference import Reference
from dis_scale.evaluation.sampling import SampleBlock, require_finite
from dis_scale.process.errors import DisScaleError, StorageError, UserError
from dis_scale.recipe import Evaluate, ExportedExtractor, InceptionExtractor, Recipe, reading
from dis_scale.recipe.evaluate import Metric
from dis_scale.recipe.identity import identity_differences
from dis_scale.storage import npy
from tests.conftest import TINY
from tests.support.evaluations import evaluate
from tests.support.metrics import fit, frechet

EVERY = get_args(Metric)


def inception_settings(**changed: Any) -> Evaluate:
    return evaluate(extractor=InceptionExtractor(kind="inception"), **changed)


def seen(count: int, seed: int, d: int = 8, shift: float = 0.0, spatial: bool = False) -> Features:
    """Make one extractor's features, of few dimensions, so that errors and limits are cheap."""
    rng = np.random.default_rng(seed)
    pooled = (rng.standard_normal((count, d)) + shift).astype(np.float32)
    if not spatial:
        return Features("seeded", pooled)
    maps, logits = rng.standard_normal((count, 5)), 3 * rng.standard_normal((count, 1008))
    return Features("seeded", pooled, maps.astype(np.float32), logits.astype(np.float32))


def cut(features: Features, sizes: list[int]) -> list[Features]:
    parts, first = [], 0
    for size in sizes:
        rows = slice(first, first + size)
        arrays = [None if x is None else x[rows] for x in (features.pooled, features.spatial, features.logits)]
        parts.append(Features(features.identity, *arrays))  # type: ignore[arg-type]
        first += size
    return parts


def blocks(sizes: list[int], **by_name: Features) -> list[SampleBlock]:
    parts = {name: cut(features, sizes) for name, features in by_name.items()}
    right = np.full(max(sizes), -1, np.int8)
    pictures = np.zeros((0, 4, 4, 3), np.uint8)
    return [SampleBlock({n: p[i] for n, p in parts.items()}, right[:size], pictures) for i, size in enumerate(sizes)]


def reference(features: Features) -> Reference:
    spatial = None if features.spatial is None else fit(features.spatial)
    return Reference("seeded", fit(features.pooled), spatial, features.pooled)


UNEQUAL = [150] * 7 + [100, 50]
"""Images of each block: 1,200 in all."""


@pytest.fixture(scope="module")
def images() -> tuple[Features, Features]:
    return seen(1200, 0, shift=0.4, spatial=True), seen(1500, 1, spatial=True)


@pytest.fixture(scope="module")
def values(images: tuple[Features, Features]) -> dict[str, float]:
    """Every metric, measured from blocks of unequal sizes."""
    generated, real = images
    settings = inception_settings(samples=1200, metrics=EVERY)
    return measure_blocks(blocks(UNEQUAL, inception=generated), {"inception": reference(real)}, settings).values


def test_each_metric_has_its_name_its_value_and_its_error(images: tuple[Features, Features], values: dict[str, float]) -> None:
    generated, real = images
    pooled, kept = generated.pooled, real.pooled
    target, precision = Frechet(fit(kept)), sets.precision_recall(pooled, kept)
    limit, limit_error, _ = metrics.infinity(pooled, target, 1200)
    cuts = {"is_1200": score.shuffled_splits(1200), "is_adm_1200": score.adm_splits(1200)}
    assert generated.spatial is not None
    assert real.spatial is not None
    expected = {
        "fid_1200": target(fit(pooled)), "sfid_1200": frechet(fit(real.spatial), fit(generated.spatial)),
        "kid_1200": sets.kid(pooled, kept), "precision_1200": precision[0], "recall_1200": precision[1],
        "precision_1200_error": np.sqrt(precision[0] * (1 - precision[0]) / 1200),
        "fid_infinity_1200": limit, "fid_infinity_1200_error": limit_error,
        "copy_rate_1200": 0, "copy_rate_1200_error": 1 / 1200,
        "nearest_ratio_1200": float(np.median(sets.nearest_ratios(pooled, kept)[0])),
    } | {name: inception_score(generated.logits, splits) for name, splits in cuts.items()}  # fmt: skip
    errors = {"fid_1200_error", "sfid_1200_error", "is_1200_error"}  # ADM's score is of one split here
    assert values.keys() == expected.keys() | errors
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert all(values[name] > 0 for name in errors)


def test_a_copy_counts_for_the_images_that_were_not_compared(images: tuple[Features, Features]) -> None:
    """Of ImageNet's 1.28 million 10,000 are kept."""
    generated, real = images
    known, settings = reference(Features(real.identity, real.pooled)), inception_settings(samples=1200, metrics=("copy_rate",))
    sampled = blocks(UNEQUAL, inception=generated)
    for each, error in ((known, 1 / 1200), (replace(known, kept=real.pooled[:150]), 10 / 1200)):
        found = measure_blocks(sampled, {"inception": each}, settings).values
        assert found["copy_rate_1200_error"] == pytest.approx(error)


def test_copies_are_of_the_images_that_are_trained_on(images: tuple[Features, Features]) -> None:
    """Not of those of a published reference."""
    generated, real = images
    dino = ExportedExtractor(kind="exported", name="dino", path="x")
    settings = inception_settings(samples=1200, metrics=("distance", "copy_rate"), also=(dino,), reference="x.npz")
    both = {name: reference(real) for name in ("inception", "dino")}
    values = measure_blocks(blocks(UNEQUAL, inception=generated, dino=generated), both, settings).values
    assert "copy_rate_dino_1200" in values
    assert "copy_rate_1200" not in values


def inception_score(logits: Any, splits: np.ndarray) -> float:
    """Compute exp of the mean divergence by its definition."""
    p = torch.from_numpy(logits).double().softmax(1).numpy()
    scores = []
    for split in range(splits.max() + 1):
        part = p[splits == split]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    return float(np.mean(scores))


def test_the_splits_are_those_of_torch_fidelity_and_adm() -> None:
    order = np.random.RandomState(2020).permutation(1003)
    shuffled = score.shuffled_splits(1003)
    for split in range(10):
        assert set(order[split * 1003 // 10 : (split + 1) * 1003 // 10]) == set(np.flatnonzero(shuffled == split))
    assert np.bincount(score.adm_splits(12_000)).tolist() == [5000, 5000, 2000]


def test_metrics_of_stored_blocks_are_bit_equal(images: tuple[Features, Features], values: dict[str, float]) -> None:
    generated, real = images
    settings, real_ones = inception_settings(samples=1200, metrics=EVERY), {"inception": reference(real)}
    sampled = blocks(UNEQUAL, inception=generated)
    again = (SampleBlock.from_bytes(block.to_bytes(), "here") for block in sampled)
    assert measure_blocks(again, real_ones, settings).values == values


def test_two_extractors_in_one_pass_each_under_its_name() -> None:
    script = ExportedExtractor(kind="exported", name="dino", path="none")
    settings = evaluate(samples=2000, also=(script,), metrics=("distance", "precision_recall"))
    generated = {"digits": seen(2000, 0, shift=0.2), "dino": seen(2000, 2, d=4, shift=1.0)}
    real = {"digits": reference(seen(900, 1)), "dino": reference(seen(900, 3, d=4))}
    values = measure_blocks(blocks([1000, 1000], **generated), real, settings).values
    assert values["fd_dino_2k"] == pytest.approx(frechet(real["dino"].pooled, fit(generated["dino"].pooled)), rel=1e-9)
    assert values.keys() == {
        "fd_digits_2k", "fd_digits_2k_error", "precision_digits_2k", "precision_digits_2k_error",
        "recall_digits_2k", "fd_dino_2k", "fd_dino_2k_error", "precision_dino_2k", "precision_dino_2k_error", "recall_dino_2k",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("samples", "extractor", "stem", "name"),
    [
        (50_000, "inception", "fid", "fid"),
        (5_000, "inception", "fid", "fid_5k"),
        (5_120, "inception", "sfid", "sfid_5120"),
        (50_000, "digits", "fid", "fd_digits"),
        (1_000, "digits", "kid", "kid_digits_1k"),
        (5_000, "digits", "fid_infinity", "fd_digits_infinity_5k"),
        (5_000, "inception", "fid_infinity", "fid_infinity_5k"),
    ],
)
def test_names(samples: int, extractor: str, stem: str, name: str) -> None:
    assert evaluate(samples=samples).metric_name(stem, extractor) == name


def test_a_judge_gives_the_share_of_requested_classes() -> None:
    sampled = blocks([30, 50], digits=seen(80, 0))
    judged = [replace(b, right=np.arange(len(b.right)) % 2 == 0) for b in sampled]
    judged = [replace(b, right=b.right.astype(np.int8)) for b in judged]
    assert measure_blocks(judged, {"digits": reference(seen(90, 1))}, evaluate()).values["class_accuracy"] == 0.5


def test_notes_for_readers() -> None:
    settings = inception_settings(samples=2100)
    line = "fid_2100: no standard error: the jackknife leaves 95 % of 2,100 samples and needs more than 2,048"
    wide = Reference("seeded", metrics.MeanCovariance(9, np.zeros(2048), np.zeros((1, 1))))
    assert notes({"inception": wide}, settings) == ["fid_2100: not verified against published tables", line]
    assert notes({"digits": reference(seen(90, 1))}, evaluate()) == []


def test_features_that_are_not_finite_are_named() -> None:
    bad = seen(80, 0)
    bad.pooled[61, 3] = np.nan
    with pytest.raises(DisScaleError, match="features of sample 61 are not finite"):
        measure_blocks(blocks([50, 30], digits=bad), {"digits": reference(seen(90, 1))}, evaluate())


def test_blocks_of_other_weights_or_without_an_extractor_are_refused() -> None:
    real = {"digits": reference(seen(90, 1))}
    other = replace(seen(80, 0), identity="another")
    with pytest.raises(
        StorageError, match=r"block-00000\.npz has features of digits with weights another, the reference of seeded"
    ):
        measure_blocks(blocks([80], digits=other), real, evaluate())
    with pytest.raises(StorageError, match=r"block-00000\.npz has no features of extractor digits: delete this file"):
        measure_blocks(blocks([80], dino=other), real, evaluate())


@pytest.mark.parametrize("samples", [79, 81])
def test_another_number_of_samples_is_refused(samples: int) -> None:
    with pytest.raises(StorageError, match=f"the blocks hold {samples} samples, the recipe's evaluate.samples expects 80"):
        measure_blocks(blocks([40, samples - 40], digits=seen(samples, 0)), {"digits": reference(seen(90, 1))}, evaluate())


def test_too_few_images_for_a_metric_say_how_many() -> None:
    settings = evaluate(metrics=("distance", "kid"))
    with pytest.raises(DisScaleError, match="kid: subsets of 1,000 from 80 generated and 90 real images: expected at least 1,000"):
        measure_blocks(blocks([80], digits=seen(80, 0)), {"digits": reference(seen(90, 1))}, settings)
    with pytest.raises(DisScaleError, match="precision_recall: 3 neighbours need at least 4 images of each set"):
        sets.precision_recall(seen(3, 0).pooled, seen(9, 1).pooled)


class Distances(TorchFunctionMode):
    """Notes the rows of each matrix of distances."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = list[int]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.cdist:
            self.rows.append(len(args[0]))
        return function(*args, **(kwargs or {}))


def test_precision_and_recall_never_have_all_distances_in_memory() -> None:
    a, b = seen(90, 0, d=3).pooled, seen(70, 1, d=3, shift=0.7).pooled
    expected = sets.precision_recall(a, b)
    with Distances() as distances:
        assert sets.precision_recall(a, b, rows=16) == expected
    assert max(distances.rows) == 16
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1


@pytest.mark.parametrize("damage", [lambda x: x[:-40], lambda x: x[:900] + bytes([x[900] ^ 1]) + x[901:], lambda x: b""])
def test_a_damaged_block_is_named(damage: Any) -> None:
    data = blocks([80], digits=seen(80, 0))[0].to_bytes()
    assert np.array_equal(SampleBlock.from_bytes(data, "here").features["digits"].pooled, seen(80, 0).pooled)
    with pytest.raises(StorageError, match=r"sweep/block-00003\.npz: damaged"):
        SampleBlock.from_bytes(damage(data), "sweep/block-00003.npz")


def test_a_block_that_grows_when_unpacked_is_not_unpacked() -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, features=np.zeros(10**6))
    with pytest.raises(StorageError, match=r"block-00003\.npz: damaged: unpacked it has 8,000,128 bytes, and at most 8,004"):
        npy.unsealed(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest(), "block-00003.npz")


def test_samples_that_are_not_finite_are_named_before_they_become_pixels() -> None:
    latents = torch.zeros(4, 2, 2, 2)
    latents[1, 0, 0, 0], latents[3, 1, 1, 1] = torch.nan, torch.inf
    with pytest.raises(DisScaleError, match="samples that are not finite: 2, the first number 51: did"):
        require_finite(latents, range(50, 54))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evaluate.extractor={kind: inception}", "evaluate.samples=2048"], "too few for the covariance of 2,048 features"),
        (["evaluate.metrics=[distance, sfid]"], "sfid needs Inception: add {kind: inception} to also"),
        (["evaluate.metrics=[kid]"], "metrics: distance is always measured"),
        (["evaluate.reference=x.npz"], "an ADM file has Inception's statistics only, and the extractors are ['digits']"),
        (
            [
                "evaluate.extractor={kind: inception}", "evaluate.samples=5000", "evaluate.reference=x.npz",
                "evaluate.metrics=[distance, copy_rate]",
            ],
            "metrics: copy_rate compares with the images that are trained on, and reference has others: remove it, or add an",
        ),
        (["evaluate.also=[{kind: exported, name: digits, path: x}]"], "extractors need names of their own"),
        (["evaluate.also=[{kind: trained, name: more}]"], "one trained extractor at most"),
        (["evaluate.curve=distance_infinity"], "curve: distance_infinity is not measured: add it to metrics"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_measured_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        reading.load(TINY, settings)
    assert message in str(caught.value)


def test_the_curve_may_be_of_endless_samples() -> None:
    both = ("distance_infinity", "distance")
    assert inception_settings(samples=50_000, metrics=both).metric == "fid"
    assert inception_settings(samples=50_000, metrics=both, curve="distance_infinity").metric == "fid_infinity"


def test_metrics_may_be_added_and_extractors_may_not(tiny: Recipe) -> None:
    more = reading.load(TINY, ["evaluate.metrics=[distance, precision_recall]"])
    assert identity_differences(tiny, more) == []
    other = reading.load(TINY, ["evaluate.also=[{kind: exported, name: dino, path: x}]"])
    assert len(identity_differences(tiny, other)) == 1


def test_the_distance_is_measured_in_one_pass_over_a_generator(tmp_path: Path) -> None:
    features, real = seen(80, 0), reference(seen(90, 1))
    measured = measure_blocks(iter(blocks([40, 40], digits=features)), {"digits": real}, evaluate())
    assert measured.values["fd_digits_80"] == pytest.approx(frechet(real.pooled, fit(features.pooled)), rel=1e-9)
    without_last = frechet(real.pooled, fit(features.pooled[:76]))
    assert measured.left_out["fd_digits_80"][-1] == pytest.approx(without_last, rel=1e-9), "its groups have 4 samples"
