"""Blocks of features to figures: one pass in block order, bounded memory but for features that a metric asks to be kept.

The same bits come whoever drew the blocks and in whatever order they arrived. Each metric's mathematics stands in its own file:
metrics.py (distances), score.py, kernel.py, neighbours.py.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from dis_scale.errors import StorageError
from dis_scale.evaluation import inception, kernel, metrics, neighbours, score
from dis_scale.evaluation.features import Features
from dis_scale.evaluation.metrics import Frechet, Groups
from dis_scale.evaluation.reference import Reference
from dis_scale.evaluation.sampling import Block
from dis_scale.evaluation.score import Score
from dis_scale.recipe import Evaluate

Figure = tuple[str, float, float | None]
"""A metric's stem (`fid`, `kid`), its value and, where there is one, its standard error."""


def measure(blocks: Iterable[Block], references: Mapping[str, Reference], settings: Evaluate) -> dict[str, float]:
    """All metrics of the recipe by name, each with `<name>_error` where it has one, the distances with `<name>_floor`.

    `blocks` are all blocks of one evaluation, in order; `class_accuracy` is among the figures where a judge looked. StorageError
    for a block that lacks an extractor or was seen through other weights than the reference; DisScaleError names too few samples
    and features that are not finite.
    """
    passes = {e.name: _Pass(e.name, references[e.name], settings) for e in settings.extractors}
    right: list[np.ndarray] = []
    for number, block in enumerate(blocks):
        right.append(block.right)
        if sum(map(len, right)) > settings.samples:
            break
        for name, one in passes.items():
            one.add(_seen(block, number, name, references[name]))
    _require_all(sum(map(len, right)), settings.samples)
    measured: dict[str, float] = {}
    for one in passes.values():
        measured |= one.named()
    judged = np.concatenate(right)
    return measured | ({"class_accuracy": float((judged == 1).mean())} if (judged >= 0).all() else {})


def notes(references: Mapping[str, Reference], settings: Evaluate) -> list[str]:
    """What a reader of the figures must know, a line each."""
    lines = []
    for name, reference in references.items():
        metric, d = settings.metric_name("fid", name), len(reference.gaussian.mean)
        if name == "inception":
            lines.append(f"{metric}: {inception.UNVERIFIED}")
        if not metrics.has_error(settings.samples, d):
            lines.append(
                f"{metric}: no error: a twentieth less of {settings.samples:,} samples are not more than {d:,} features"
            )
    return lines


def _require_all(samples: int, expected: int) -> None:
    """StorageError where the blocks hold other than all samples: a figure's name says how many it is of."""
    if samples != expected:
        raise StorageError(f"the blocks hold {samples:,} samples, the recipe's evaluate.samples expects {expected:,}")


class _Pass:
    """One extractor's way through the blocks."""

    def __init__(self, name: str, reference: Reference, settings: Evaluate) -> None:
        self.name, self._reference, self._settings = name, reference, settings
        self._asked = set(settings.metrics)
        if name != "inception":
            self._asked -= {"sfid", "inception_score", "inception_score_adm"}
        self._sums, self._spatial = Groups(settings.samples), Groups(settings.samples)
        cuts = {"inception_score": score.shuffled_splits, "inception_score_adm": score.adm_splits}
        self._scores = {m: Score(cuts[m](settings.samples), inception.CLASSES) for m in cuts if m in self._asked}
        self._kept: list[np.ndarray] = []

    def add(self, seen: Features) -> None:
        self._sums.add(seen.pooled)
        if "sfid" in self._asked and seen.spatial is not None:
            self._spatial.add(seen.spatial)
        for one in self._scores.values():
            assert seen.logits is not None
            one.add(seen.logits)
        if self._asked & {"kid", "precision_recall", "distance_infinity"}:
            self._kept.append(seen.pooled)

    def named(self) -> dict[str, float]:
        """The figures under their names, with errors and the floor."""
        found: dict[str, float] = {}
        for stem, value, error in self._figures():
            metric = self._settings.metric_name(stem, self.name)
            found[metric] = value
            if error is not None:
                found[f"{metric}_error"] = error
        if self._reference.floor is not None:
            found[f"{self._settings.metric_name('fid', self.name)}_floor"] = self._reference.floor
        return found

    def _figures(self) -> Iterator[Figure]:
        frechet, asked = Frechet(self._reference.gaussian), self._asked
        yield ("fid", *self._sums.distance(frechet))
        if "sfid" in asked and self._reference.spatial is not None:
            yield ("sfid", *self._spatial.distance(Frechet(self._reference.spatial)))
        for metric, one in self._scores.items():
            yield ("is" if metric == "inception_score" else "is_adm", *one.result())
        if self._kept:
            yield from self._of_features(np.concatenate(self._kept), frechet)

    def _of_features(self, features_ND: np.ndarray, frechet: Frechet) -> Iterator[Figure]:
        real, n = self._reference.kept, len(features_ND)
        if "kid" in self._asked and real is not None:
            yield "kid", kernel.kid(features_ND, real), None
        if "precision_recall" in self._asked and real is not None:
            precision, recall = neighbours.precision_recall(features_ND, real)
            # Given the real images, each sample is inside or not: a binomial share. Recall's balls vary with the samples.
            yield "precision", precision, float(np.sqrt(precision * (1 - precision) / n))
            yield "recall", recall, None
        if "distance_infinity" in self._asked:
            yield ("fid_infinity", *metrics.infinity(features_ND, frechet, self._settings.samples))


def _seen(block: Block, number: int, name: str, reference: Reference) -> Features:
    if name not in block.features:
        raise StorageError(f"block {number} lacks extractor {name}: it was drawn before the recipe named it: delete it")
    seen = block.features[name]
    if seen.identity != reference.identity:
        raise StorageError(
            f"block {number} was seen through {name} with weights {seen.identity[:12]}, the reference through "
            f"{reference.identity[:12]}: delete the block and evaluate again"
        )
    return seen
