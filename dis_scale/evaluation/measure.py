"""Computes metrics from blocks of features: one pass in block order, in bounded memory except for metrics of all features.

The result is bit-equal for any workers and order of sampling. Each metric's mathematics is in its own file: metrics.py (distances),
score.py, sets.py.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from dis_scale.evaluation import inception, metrics, score, sets
from dis_scale.evaluation.features import Features
from dis_scale.evaluation.metrics import Estimate, Frechet, Groups
from dis_scale.evaluation.reference import Reference
from dis_scale.evaluation.sampling import SampleBlock
from dis_scale.evaluation.score import Score
from dis_scale.process.errors import StorageError
from dis_scale.recipe import Evaluate
from dis_scale.recipe.evaluate import INCEPTION_METRICS


class Measured(NamedTuple):
    """Metrics by name, each with its `<name>_error` if it can be estimated, and their values without each jackknife group."""

    values: dict[str, float]
    left_out: dict[str, tuple[float, ...]]


def measure_blocks(blocks: Iterable[SampleBlock], references: Mapping[str, Reference], settings: Evaluate) -> Measured:
    """Return the Frechet distance of each extractor, and the other metrics that `settings.metrics` names.

    `blocks` are all blocks of one evaluation, in order. With a judge, `class_accuracy` is included. StorageError if a block lacks
    an extractor or has features of other weights than the reference; DisScaleError for too few samples or features that are not
    finite.
    """
    passes = {e.name: _Pass(e.name, references[e.name], settings) for e in settings.extractors}
    right, held = list[np.ndarray](), 0
    for number, block in enumerate(blocks):
        right.append(block.right)
        if (held := held + len(block.right)) > settings.samples:
            break
        for name, one_pass in passes.items():
            one_pass.add(_features(block, number, name, references[name]))
    if held != settings.samples:  # a metric's name states the number
        raise StorageError(f"the blocks hold {held:,} samples, the recipe's evaluate.samples expects {settings.samples:,}")
    measured = Measured({}, {})
    for name, one_pass in passes.items():
        for stem, (value, error, left_out) in one_pass.estimates():
            metric = settings.metric_name(stem, name)
            measured.values[metric] = value
            if error is not None:
                measured.values[f"{metric}_error"] = error
            if left_out is not None:
                measured.left_out[metric] = tuple(left_out.tolist())
    judged = np.concatenate(right)
    if (judged >= 0).all():
        measured.values["class_accuracy"] = float((judged == 1).mean())
    return measured


def notes(references: Mapping[str, Reference], settings: Evaluate) -> list[str]:
    """Return remarks for readers of the metrics, a line each."""
    lines = []
    for name, reference in references.items():
        metric, d = settings.metric_name("fid", name), len(reference.pooled.mean)
        if name == "inception":
            lines.append(f"{metric}: {inception.UNVERIFIED}")
        if not metrics.has_error(settings.samples, d):
            left = 100 - 100 / metrics.FOLDS
            lines.append(
                f"{metric}: no standard error: the jackknife leaves {left:.0f} % of {settings.samples:,} samples "
                f"and needs more than {d:,}"
            )
    return lines


class _Pass:
    """Accumulates one extractor's features over the blocks."""

    def __init__(self, name: str, reference: Reference, settings: Evaluate) -> None:
        self._reference, self._settings = reference, settings
        self._requested = set(settings.metrics)
        if name != "inception":
            self._requested -= INCEPTION_METRICS
        if name not in settings.of_images:
            self._requested.discard("copy_rate")
        self._sums, self._spatial = Groups(settings.samples), Groups(settings.samples)
        cuts = {"inception_score": score.shuffled_splits, "inception_score_adm": score.adm_splits}
        self._scores = {m: Score(cuts[m](settings.samples), inception.CLASSES) for m in cuts if m in self._requested}
        self._kept: list[np.ndarray] = []

    def add(self, features: Features) -> None:
        self._sums.add(features.pooled)
        if "sfid" in self._requested and features.spatial is not None:
            self._spatial.add(features.spatial)
        for one_score in self._scores.values():
            assert features.logits is not None
            one_score.add(features.logits)
        if self._requested & {"kid", "precision_recall", "distance_infinity", "copy_rate"}:
            self._kept.append(features.pooled)

    def estimates(self) -> Iterator[tuple[str, Estimate]]:
        """Yield each metric's stem (`fid`, `kid`) and estimate."""
        frechet, spatial = self._reference.frechet, self._reference.spatial_frechet
        yield "fid", self._sums.distance(frechet)
        if "sfid" in self._requested and spatial:
            yield "sfid", self._spatial.distance(spatial)
        for metric, one_score in self._scores.items():
            yield "is" if metric == "inception_score" else "is_adm", Estimate(*one_score.result())
        if self._kept:
            yield from self._of_all_features(np.concatenate(self._kept), frechet)

    def _of_all_features(self, features_ND: np.ndarray, frechet: Frechet) -> Iterator[tuple[str, Estimate]]:
        real, n = self._reference.kept, len(features_ND)
        if "kid" in self._requested and real is not None:
            yield "kid", Estimate(sets.kid(features_ND, real))
        if "precision_recall" in self._requested and real is not None:
            precision, recall = sets.precision_recall(features_ND, real)
            # The balls around the real images are fixed, so the error of precision is binomial; those of recall vary.
            yield "precision", Estimate(precision, float(np.sqrt(precision * (1 - precision) / n)))
            yield "recall", Estimate(recall)
        if "copy_rate" in self._requested and real is not None:
            ratios, nearest = sets.nearest_ratios(features_ND, real)
            yield "copy_rate", Estimate(*sets.copy_rate(ratios, nearest, len(real), self._reference.pooled.count))
            yield "nearest_ratio", Estimate(float(np.median(ratios)))
        if "distance_infinity" in self._requested:
            yield "fid_infinity", metrics.infinity(features_ND, frechet, seed=self._settings.samples)


def _features(block: SampleBlock, number: int, name: str, reference: Reference) -> Features:
    if name not in block.features:
        raise StorageError(
            f"block-{number:05d}.npz has no features of extractor {name}: delete this file and run the same command again"
        )
    features = block.features[name]
    if features.identity != reference.identity:
        raise StorageError(
            f"block-{number:05d}.npz has features of {name} with weights {features.identity[:12]}, the reference of "
            f"{reference.identity[:12]}: delete this file and run the same command again"
        )
    return features
