"""Two sweeps side by side: the differences of their models, with errors, and everything else in which the sweeps differ."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from dis_scale.evaluation.metrics import FOLDS, jackknife_error
from dis_scale.process import tables
from dis_scale.process.errors import UserError, counted
from dis_scale.recipe.evaluate import HELD_OUT
from dis_scale.recipe.identity import as_yaml, differing
from dis_scale.report.points import ALIKE, Change, Error, Point, Report
from dis_scale.report.tables import SAMPLING, UNFINISHED, TableColumn, with_error
from dis_scale.sweep.documents import Metrics

LONGEST_NAME = 16
"""Most characters of a sweep's name that a column of the terminal has space for."""


@dataclass(frozen=True)
class Difference(Change):
    """One model at one count in both sweeps: b - a."""

    a: Point
    b: Point
    shared: bool = False
    """Whether the errors leave out the noise and the labels that the samples of both points share."""

    def to_json(self) -> dict[str, Any]:
        """Return the difference with plain values."""
        points = {name: {"model": p.model, "seeds": p.seeds, "eflops": p.eflops} for name, p in (("a", self.a), ("b", self.b))}
        found = {"images": self.a.images_seen, "variant": self.a.variant, "change": self.change, "error": self.error}
        return points | found | {"significant": self.significant}

    @property
    def over_seeds(self) -> bool:
        """Whether the error holds the spread between trainings on both sides."""
        return min(self.a.seeds, self.b.seeds) > 1

    @property
    def significant(self) -> bool:
        """Whether Welch's test over the seeds refuses, at 5 %, that both are equal."""
        return self.over_seeds and super().significant


def by_name(a: Report, b: Report) -> dict[str, str]:
    """Return the pairs of models that have the same name."""
    theirs = {p.group for p in b.points}
    return {p.group: p.group for p in a.points if p.group in theirs}


def by_cost(a: Report, b: Report) -> dict[str, str]:
    """Return pairs of models of `a` and `b`, the nearest in multiply-adds and those of one name first, within `ALIKE`.

    Branches are paired with branches that end at the same count.
    """
    ours, theirs = ({p.group: p for p in report.points} for report in (a, b))
    near = sorted(
        (max(p.gmacs, q.gmacs) / min(p.gmacs, q.gmacs), name != other, name, other)
        for name, p in ours.items() for other, q in theirs.items() if _end(a, p) == _end(b, q)
    )  # fmt: skip
    pairs: dict[str, str] = {}
    for ratio, _, name, other in near:
        if ratio <= 1 + ALIKE and name not in pairs and other not in pairs.values():
            pairs[name] = other
    return pairs


def _end(report: Report, p: Point) -> int | None:
    """Return the count at which a branch ends, None for another model."""
    return report.recipe.train_of(p.group).images if p.trunk != p.group else None


def differences(a: Report, b: Report, pairs: Mapping[str, str]) -> list[Difference]:
    """Return the differences between points of both sweeps, for these pairs of models' names.

    Raises UserError if the sweeps measure different quantities, lack a named model, or have no common point.
    """
    _require_comparable(a, b)
    for name, report in [(x, a) for x in pairs] + [(y, b) for y in pairs.values()]:
        if name not in report.recipe.models:
            raise UserError(f"{report.sweep} has no model {name!r}: it has {', '.join(report.recipe.models)}")
    theirs = {_key(p): p for p in b.means}
    keys = ((p, (pairs.get(p.group, ""), p.variant, p.images_seen)) for p in a.means)
    found = [(p, theirs[key]) for p, key in keys if key in theirs]
    if not found:
        raise UserError(
            f"{a.sweep} and {b.sweep} have no model at one image count in common: name pairs (--pair NAME=NAME), or pair models "
            "of about one cost (--by-cost)"
        )
    return [_difference(a, p, b, q) for p, q in found]


def _difference(a: Report, p: Point, b: Report, q: Point) -> Difference:
    """Return a difference with its errors.

    If the samples of both points share noise and labels, which move both alike, the errors are the spreads over the seeds and the
    paired jackknife of the means: the samples of one model's trainings may be more alike than those of two models.
    """
    change = b.distance(q) - a.distance(p)
    if p == q:
        return Difference(change, (Error(0.0, FOLDS),), p, q, shared=True)
    paired = paired_error(p.evaluation, q.evaluation, a.metric) if _noise(a, p) == _noise(b, q) else None
    if paired is not None:
        spreads = [Error(each.spread, each.seeds) for each in (p, q) if each.spread is not None]
        return Difference(change, (*spreads, Error(paired, FOLDS)), p, q, shared=True)
    error_a, error_b = a.error(p), b.error(q)
    if error_a is None or error_b is None:
        return Difference(change, (), p, q)
    return Difference(change, (*_parts(p, error_a), *_parts(q, error_b)), p, q)


def _parts(p: Point, error: float) -> tuple[Error, Error]:
    """Return the parts of a point's error: the spread over its seeds, and the error of sampling, from `FOLDS` values."""
    spread = p.spread or 0.0
    return Error(spread, p.seeds), Error(math.sqrt(max(error**2 - spread**2, 0)), FOLDS)


def _noise(report: Report, p: Point) -> tuple[Any, ...]:
    """Return the inputs of the labels and of all noise of a point's samples."""
    made = p.evaluation
    return report.recipe.seed, p.cost.shape, made.samples, made.labels, made.sampling.sampler, made.sampling.steps


def paired_error(a: Metrics, b: Metrics, metric: str) -> float | None:
    """Return the standard error of b - a by the jackknife of the difference, if both have their values without each group."""
    if metric not in a.left_out or metric not in b.left_out:
        return None
    return jackknife_error(np.subtract(b.left_out[metric], a.left_out[metric]))


def _require_comparable(a: Report, b: Report) -> None:
    """Raise UserError if the distances of the two sweeps are different quantities."""
    if a.metric != b.metric:
        raise UserError(f"{a.sweep} was measured by {a.metric}, {b.sweep} by {b.metric}: these cannot be compared")
    images, others, one, other = a.recipe.data, b.recipe.data, a.recipe.evaluate, b.recipe.evaluate
    facts = [
        ("data.resolution", images.resolution, others.resolution),
        ("data.num_classes", images.num_classes, others.num_classes),
        ("evaluate.reference", *(each.reference_of(each.extractor.name) for each in (one, other))),
        *((f"evaluate.extractor.{key}", x, y) for key, x, y in differing(one.extractor, other.extractor)),
    ]
    if one.reference_of(one.extractor.name) is None:  # the reference is computed from these
        facts += [("data.source", images.source, others.source), ("data.crop", images.crop, others.crop)]
    if a.metric == HELD_OUT:  # the loss depends on latents and process; flows share one, whatever they predict
        facts += [("VAE", a.vae, b.vae), ("diffusion.kind", a.recipe.diffusion.kind, b.recipe.diffusion.kind)]
        facts.append(("seed", a.recipe.seed, b.recipe.seed))  # it chooses the held-out images and their noise, among the shards
        facts.append(("precompute.shard_images", a.recipe.precompute.shard_images, b.recipe.precompute.shard_images))
        facts += [(f"data.{key}", getattr(images, key), getattr(others, key)) for key in ("held_out_images", "normalise")]
        if a.recipe.diffusion.kind == "gaussian":
            facts += [(f"diffusion.{key}", x, y) for key, x, y in differing(a.recipe.diffusion, b.recipe.diffusion)]
    if (weights := _weights(a)) and (other_weights := _weights(b)):
        facts.append((f"weights of extractor {one.extractor.name}", weights, other_weights))
    what_differs = "losses" if a.metric == HELD_OUT else "distances"
    for what, x, y in facts:
        if x != y:
            raise UserError(
                f"{what}: {a.sweep} has {as_yaml(x)}, {b.sweep} has {as_yaml(y)}: their {what_differs} cannot be compared"
            )


def _weights(report: Report) -> list[str]:
    """Return the identity of the main extractor's weights, which a recipe with a trained extractor leaves open; [] if not known."""
    known = {p.evaluation.weights.get(report.recipe.evaluate.extractor.name, "") for p in report.points} - {""}
    return sorted(identity[:12] for identity in known)


def comparison_table(a: Report, b: Report, found: Sequence[Difference]) -> Table:
    """Return a table with a row for each common point, bold if the difference is significant over seeds."""
    both = (a.sweep, b.sweep) if max(len(a.sweep), len(b.sweep)) <= LONGEST_NAME else ("the first", "the second")
    out = tables.table(
        "model", "sampling", "images", *both, "difference", "in errors", left=("model", "sampling"), caption_justify="left",
        title=f"{a.sweep} against {b.sweep}: {a.metric}", caption=Text("\n".join(_notes(a, b, found))),
    )  # fmt: skip
    for difference in found:
        p, q, change, error = difference.a, difference.b, difference.change, difference.error
        cells = [f"{each.distance(s):.4g}{UNFINISHED if s.unfinished else ''}" for each, s in ((a, p), (b, q))]
        name = p.model if p.model == q.model else f"{p.model} = {q.model}"
        out.add_row(
            name, p.variant or "main", f"{p.images_seen:,}", *cells,
            with_error(change, error, "+.3g"), f"{change / error:+.1f}" if error else "",
            style="bold" if difference.significant else "",
        )  # fmt: skip
    return out


def _notes(a: Report, b: Report, found: Sequence[Difference]) -> list[str]:
    """Return the table's footnotes: what the errors hold, points of one sweep only, and all other differences."""
    lines = []
    if any(each.over_seeds for each in found):
        lines.append("bold: Welch's test refuses at 5 % that both are equal; its errors are those over the seeds and of sampling")
    if not all(each.over_seeds for each in found):
        lines.append(
            "models with one seed: the error is of sampling alone. Trainings of other seeds usually differ by more (seeds: 3)"
        )
    if any(each.shared for each in found):
        lines.append("samples of the same noise and labels: their error is that of the difference, by the paired jackknife")
    if any(each.a.unfinished or each.b.unfinished for each in found):
        lines.append(f"{UNFINISHED.strip()} measured before the learning rate had fallen to its end")
    of_a, of_b = ({_key(p) for p in report.means} for report in (a, b))
    compared_a, compared_b = {_key(each.a) for each in found}, {_key(each.b) for each in found}
    if others := len(of_a - compared_a) + len(of_b - compared_b):
        lines.append(f"not compared, since no pair has them in both: {counted(others, 'point')}")
    return lines + _unlike_words(a, b, found)


def _key(p: Point) -> tuple[str, str, int]:
    return p.group, p.variant, p.images_seen


def _unlike_words(a: Report, b: Report, found: Sequence[Difference]) -> list[str]:
    """Return a line for each setting that differs between the points of these differences."""
    vae = [f"VAE differs: {a.vae[:12]} and {b.vae[:12]}"] if a.vae and b.vae and a.vae != b.vae else []
    unlike = {line for difference in found for line in _unlike(a, b, difference)}
    return vae + [f"{key} differs: {x} and {y}" for key, x, y in sorted(unlike)]


def _unlike(a: Report, b: Report, pair: Difference) -> Iterator[tuple[str, str, str]]:
    """Yield key and values of each setting of data, diffusion, training and sampling that differs."""
    x, y = a.recipe, b.recipe
    mine, theirs = x.train_of(pair.a.model), y.train_of(pair.b.model)
    settings = (
        ("data", x.data, y.data),
        ("precompute", x.precompute, y.precompute),
        ("diffusion", x.diffusion, y.diffusion),
        ("train", mine, theirs),
        (f"models.{pair.a.model}", x.models[pair.a.model], y.models[pair.b.model]),
    )
    for part, own, others in settings:
        for key, one, other in differing(own, others):
            if not key.startswith(("train.", "seed")):
                yield f"{part}.{key}", as_yaml(one), as_yaml(other)
    if x.seed != y.seed:
        yield "seed", str(x.seed), str(y.seed)
    if mine.images != theirs.images and {mine.decay, theirs.decay} != {"none"}:
        yield "end of the schedule", f"{mine.images:,}", f"{theirs.images:,}"
    for column in (*SAMPLING, TableColumn("forked_from", lambda p: p.forked_from or None)):
        if (one := column.value(pair.a)) != (other := column.value(pair.b)):
            yield column.name, as_yaml(one), as_yaml(other)
