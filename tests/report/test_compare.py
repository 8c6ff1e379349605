"""Two sweeps are compared point by point: what differs, by how much, and whether that can be chance."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dis_scale.evaluation.metrics import FOLDS, Frechet, Groups, MeanCovariance
from dis_scale.process.errors import UserError
from dis_scale.recipe import Precompute, Recipe, reading
from dis_scale.recipe.train import Flow, Gaussian
from dis_scale.report import Report, compare, figures
from dis_scale.report.points import Error
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import Metrics
from tests.conftest import TINY
from tests.support.documents import SAMPLING
from tests.support.evaluations import collect, compared, put, sweep_at, two_with_seeds


def test_differences_of_two_sweeps_have_errors(sweep: Sweep, tmp_path: Path, recipe: Recipe) -> None:
    other = sweep_at(tmp_path, "other", recipe)
    put(other, Sampled("dis", 160), 4.0, error=1.2)
    put(other, Sampled("dis64", 160), 5.5, error=1.2)
    a, b = collect(sweep), collect(other)
    found = compare.differences(a, b, compare.by_name(a, b))
    assert [(d.a.model, d.change, d.significant) for d in found] == [("dis", -5.0, False), ("dis64", 0.5, False)]
    assert [d.error for d in found] == pytest.approx([1.3, 1.3])
    text = compared(a, b)
    assert "-5 ± 1.3" in text
    assert "-3.8" in text
    assert "models with one seed: the error is of sampling alone" in text
    assert "not compared, since no pair has them in both: 4 points" in text


def test_only_a_difference_over_seeds_is_significant(tmp_path: Path) -> None:
    a, b = (collect(sweep) for sweep in two_with_seeds(tmp_path))
    found = {d.a.model: d for d in compare.differences(a, b, compare.by_name(a, b))}
    assert {model: d.significant for model, d in found.items()} == {"dit": True, "dis": False}
    assert "bold: Welch's test refuses at 5 %" in compared(a, b)
    over_seeds = np.hypot(np.std([9, 9.2, 9.4], ddof=1), np.std([5, 5.2, 5.1], ddof=1)) / np.sqrt(3)
    a, b = (with_lists(report, np.arange(20) % 2) for report in (a, b))
    (dit,) = compare.differences(a, b, {"dit": "dit"})
    assert dit.error == pytest.approx(over_seeds), "the samples of both sweeps have the same noise"
    points = [replace(p, evaluation=p.evaluation.changed(labels="random")) for p in b.points]
    (dit,) = compare.differences(a, replace(b, points=points), {"dit": "dit"})
    assert dit.error == pytest.approx(np.hypot(over_seeds, np.hypot(0.5, 0.5))), "and that of sampling, of both"


def with_lists(report: Report, left_out: np.ndarray) -> Report:
    lists = {report.metric: tuple(left_out.tolist())}
    return replace(report, points=[replace(p, evaluation=p.evaluation.changed(left_out=lists)) for p in report.points])


def test_a_comparison_names_all_that_differs(sweep: Sweep, tmp_path: Path) -> None:
    text = sweep.recipe.model_dump(mode="json")
    text["data"]["normalise"] = "channels"
    text["models"]["dis"]["drop_path"] = 0.3
    text["train"] |= {"batch_images": 32, "learning_rate": 2e-3, "resume_every_images": 77}
    other = sweep_at(tmp_path, "other", Recipe.model_validate(text, strict=False))
    put(other, Sampled("dis", 160), 4.0)
    for each, vae in ((sweep, "a" * 64), (other, "b" * 64)):
        state.use_latents(each, each.store / "latents/0", vae)
    a, b = collect(sweep), collect(other)
    words = compared(a, b)
    assert f"VAE differs: {'a' * 12} and {'b' * 12}" in words
    assert "data.normalise differs: vae and channels" in words
    assert "train.batch_images differs: 16 and 32" in words
    assert "train.learning_rate differs: 0.001 and 0.002" in words
    assert "resume_every_images" not in words
    assert "models.dis.drop_path differs: 0.1 and 0.3" in words
    assert "differs" not in compared(a, a)


def test_three_seeds_need_more_than_two_standard_errors() -> None:
    """Welch's test as scipy has it for the values themselves."""
    for shift in (0.6, 0.9):
        mine, theirs = np.array([9.0, 9.4, 9.8]), np.array([9.0, 9.3, 9.6]) - shift
        point: Any = SimpleNamespace(seeds=3)
        errors = [float(np.std(values, ddof=1) / np.sqrt(3)) for values in (mine, theirs)]
        made = compare.Difference(float(theirs.mean() - mine.mean()), tuple(Error(each, 3) for each in errors), point, point)
        assert made.significant == (stats.ttest_ind(mine, theirs, equal_var=False).pvalue < 0.05)
        assert abs(made.change) > 2 * (made.error or 0)


def two_sweeps(root: Path) -> list[Report]:
    """Return two sweeps of three seeds of a DiT, with values that a test replaces."""
    sweeps = [sweep_at(root, name, reading.load(TINY, ["models.dit.seeds=3"])) for name in ("a", "b")]
    for made in sweeps:
        for model in ("dit", "dit-seed-1", "dit-seed-2"):
            put(made, Sampled(model, 320), 100.0)
    return [collect(made) for made in sweeps]


def study(reports: list[Report], truth: float, rng: np.random.Generator, across: float, within: float) -> compare.Difference:
    """Return the difference of a simulated study whose models differ by `truth`.

    Trainings have a standard deviation of 2; sampling one of 3, correlated between two models' trainings and between one model's.
    """
    metric, common, studies = reports[0].metric, rng.standard_normal(FOLDS), []
    for report, mean in zip(reports, (100, 100 + truth), strict=True):
        own, points = rng.standard_normal(FOLDS), []
        for p in report.points:
            noise = across**0.5 * common + (within - across) ** 0.5 * own
            noise += (1 - within) ** 0.5 * rng.standard_normal(FOLDS)
            groups = mean + 2 * rng.standard_normal() + 3 * FOLDS**0.5 * noise
            lists = {metric: tuple(((groups.sum() - groups) / (FOLDS - 1)).tolist())}
            evaluation, values = p.evaluation.changed(left_out=lists), {metric: groups.mean(), f"{metric}_error": 3.0}
            points.append(replace(p, values=values, evaluation=evaluation))
        studies.append(replace(report, points=points))
    a, b = studies
    return compare.differences(a, b, {"dit": "dit"})[0]


@pytest.mark.parametrize(("across", "within"), [(0.9, 0.9), (0.87, 0.95), (0.5, 0.95), (0, 0.9)])
def test_seeds_find_a_difference_and_invent_none_though_samples_share_their_noise(
    across: float, within: float, tmp_path: Path
) -> None:
    """Noise of a model's own samples, which all its seeds have, is no difference: the spread over the seeds does not know it."""
    reports, rng = two_sweeps(tmp_path), np.random.default_rng(0)
    equal = [study(reports, 0, rng, across, within) for _ in range(1000)]
    assert np.mean([each.significant for each in equal]) < 0.06
    assert np.mean([each.error for each in equal]) == pytest.approx(np.std([each.change for each in equal]), rel=0.15)
    if across > 0.8:
        assert np.mean([study(reports, 4 * 2, rng, across, within).significant for _ in range(1000)]) > 0.75


def test_one_training_against_several_has_the_paired_error_too(tmp_path: Path) -> None:
    """Without the spread of the single one, which nothing tells."""
    several, one = two_sweeps(tmp_path)
    rng, reports = np.random.default_rng(0), [several, replace(one, points=one.points[:1])]
    found = [study(reports, 0, rng, 0.9, 0.9) for _ in range(1000)]
    unknown = np.hypot(np.std([each.change for each in found]), 0) ** 2 - 2**2
    assert np.sqrt(np.mean([(each.error or 0) ** 2 for each in found])) == pytest.approx(unknown**0.5, rel=0.2)
    assert not any(each.significant for each in found)


def test_the_error_of_a_difference_is_its_spread_if_samples_share_their_noise() -> None:
    """Two models that make nearly the same of one noise: their distances vary by far more than the difference does."""
    reference, rng = Frechet(MeanCovariance(10**6, np.zeros(4), np.eye(4))), np.random.default_rng(0)
    distances, errors = [], []
    for _ in range(60):
        noise, other = rng.standard_normal((2, 400, 4))
        one, another = evaluation_of(1.5 * noise + 0.5, reference), evaluation_of(1.5 * noise + 0.7 * other + 0.6, reference)
        distances.append([one.values["fid"], another.values["fid"]])
        errors.append([compare.paired_error(one, another, "fid"), np.hypot(one.values["fid_error"], another.values["fid_error"])])
    a, b = np.transpose(distances)
    assert np.corrcoef(a, b)[0, 1] == pytest.approx(0.9, abs=0.07)
    paired, independent = np.mean(errors, axis=0)
    assert paired == pytest.approx(np.std(b - a), rel=0.25)  # 60 sets give a spread to 9 %
    assert independent > 2 * np.std(b - a)
    assert compare.paired_error(one, one, "fid") == 0


def evaluation_of(features: np.ndarray, reference: Frechet) -> Metrics:
    groups = Groups(len(features))
    groups.add(features)
    value, error, left_out = groups.distance(reference)
    assert left_out is not None
    values, lists = {"fid": value, "fid_error": error}, {"fid": tuple(left_out.tolist())}
    return Metrics(sampling=SAMPLING, metrics=("distance",), values=values, left_out=lists)


def test_one_training_each_has_the_paired_error_only_of_shared_noise(sweep: Sweep, tmp_path: Path, recipe: Recipe) -> None:
    a = collect(sweep)
    lists = {a.metric: tuple(9 + 0.1 * (-1.0) ** np.arange(20))}
    points = [replace(p, evaluation=p.evaluation.changed(left_out=lists)) for p in a.points]
    a, other = replace(a, points=points), sweep_at(tmp_path, "other", recipe)
    put(other, Sampled("dis32", 160), 8.0)
    b = collect(other)
    assert compare.differences(a, b, {"dis": "dis32"})[0].error == pytest.approx(0.5**0.5), "its groups are not known"
    (point,) = b.points
    b = replace(b, points=[replace(point, evaluation=point.evaluation.changed(left_out=lists))])
    assert compare.differences(a, b, {"dis": "dis32"})[0].error == 0
    assert "by the paired jackknife" in compared(a, b, {"dis": "dis32"})
    for changed in ({"samples": 61}, {"labels": "random"}, {"sampling": SAMPLING}):
        unlike = replace(b, points=[replace(p, evaluation=p.evaluation.changed(**changed)) for p in b.points])
        assert compare.differences(a, unlike, {"dis": "dis32"})[0].error == pytest.approx(0.5**0.5), changed


def test_a_model_does_not_differ_from_itself(sweep: Sweep, tmp_path: Path) -> None:
    for report in (collect(sweep), two_sweeps(tmp_path / "seeds")[0]):
        itself = compare.differences(report, collect_again(report), compare.by_name(report, report))
        assert {(d.change, d.error, d.significant) for d in itself} == {(0, 0, False)}
        assert "+0 ± 0" in compared(report, report)


def collect_again(report: Report) -> Report:
    return replace(report, points=[replace(p) for p in report.points])


def test_branches_are_paired_with_branches(tmp_path: Path) -> None:
    sweeps = []
    for name in ("a", "b"):
        made = sweep_at(tmp_path, name, reading.load(TINY, ["train.cooldowns={images: [160, 320], share: 0.5}"]))
        for model, images in [("dit", 320), ("dit-at-160", 160), ("dit-at-320", 320)]:
            put(made, Sampled(model, images), 9.0)
        sweeps.append(collect(made))
    assert compare.by_cost(*sweeps) == {name: name for name in ("dit", "dit-at-160", "dit-at-320")}


def test_models_of_other_names_are_compared_by_pairs_or_by_cost(sweep: Sweep, tmp_path: Path, recipe: Recipe) -> None:
    text = recipe.model_dump(mode="json")
    text["models"] = {"large": text["models"]["dis64"], "other": text["models"]["dis"] | {"width": 256}}
    made = sweep_at(tmp_path, "renamed", Recipe.model_validate(text, strict=False))
    put(made, Sampled("large", 160), 4.0)
    put(made, Sampled("other", 160), 3.0)
    a, b = collect(sweep), collect(made)
    assert compare.by_cost(a, b) == {"dis64": "large"}
    (difference,) = compare.differences(a, b, compare.by_cost(a, b))
    assert difference.change == -1.0
    assert "dis64 = other" in compared(a, b, {"dis64": "other"})
    with pytest.raises(UserError, match=r"renamed has no model 'dis': it has large, other"):
        compare.differences(a, b, {"dis": "dis"})
    legend = figures.both(a, b).axes[0].get_legend()
    assert legend
    assert [line.get_text() for line in legend.get_texts()] == ["tiny: dis at 160", "renamed: dis at 160"]


def test_sweeps_that_cannot_be_compared_are_refused(sweep: Sweep, tmp_path: Path, recipe: Recipe) -> None:
    a, empty = collect(sweep), collect(sweep_at(tmp_path, "empty", recipe))
    with pytest.raises(UserError, match="tiny and empty have no model at one image count in common: name pairs"):
        compare.differences(a, empty, {})
    for changes, words in (
        ({"evaluate": {"samples": 81}}, "tiny was measured by fd_digits_80, tiny by fd_digits_81: these cannot"),
        ({"data": {"crop": (0, 0, 8)}}, r"data.crop: tiny has null, tiny has \[0, 0, 8\]: their distances cannot be compared"),
        ({"data": {"resolution": 64}}, "data.resolution: tiny has 32, tiny has 64: their distances cannot be compared"),
    ):
        parts = {part: getattr(recipe, part).model_copy(update=change) for part, change in changes.items()}
        other = sweep_at(tmp_path, "tiny", recipe.model_copy(update=parts))
        with pytest.raises(UserError, match=words):
            compare.differences(a, collect(other), {})


def test_held_out_losses_of_other_quantities_are_refused(tmp_path: Path, recipe: Recipe) -> None:
    """A loss of the noise at a Gaussian's times is not one of a flow's velocity, nor that of other images."""
    changes = {"extractor": {"kind": "none"}, "variants": {}}
    made = recipe.model_copy(update={"evaluate": recipe.evaluate.model_validate(recipe.evaluate.model_dump() | changes)})
    a = collect(sweep_at(tmp_path, "tiny", made))
    for part, other, words in (
        ("data", made.data.model_copy(update={"held_out_images": 7}), "data.held_out_images: tiny has .*, tiny has 7"),
        ("diffusion", Gaussian(kind="gaussian", steps=500), "diffusion.steps: tiny has 1000, tiny has 500"),
        ("diffusion", Flow(kind="flow"), "diffusion.kind: tiny has gaussian, tiny has flow"),
        ("precompute", Precompute(shard_images=7), "precompute.shard_images: tiny has .*, tiny has 7"),
        ("seed", made.seed + 1, f"seed: tiny has {made.seed}, tiny has {made.seed + 1}"),
    ):
        b = collect(sweep_at(tmp_path, "tiny", made.model_copy(update={part: other})))
        with pytest.raises(UserError, match=f"{words}: their losses cannot be compared"):
            compare.differences(a, b, {})


def test_distances_under_other_weights_of_one_extractor_are_refused(sweep: Sweep, tmp_path: Path, recipe: Recipe) -> None:
    """A sweep trains its extractor itself: another seed, CPU or number of threads gives other weights, and another distance."""
    other = sweep_at(tmp_path, "other", recipe.model_copy(update={"seed": recipe.seed + 1}))
    put(other, Sampled("dis", 160), 4.0)
    a, b = (of_weights(collect(each), "ca653956" + "0" * 56) for each in (sweep, other))
    assert compare.differences(a, b, {"dis": "dis"})[0].change == -5
    words = r"weights of extractor digits: tiny has \[ca6539560000\], other has \[28185ea20000\]: their distances cannot"
    with pytest.raises(UserError, match=words):
        compare.differences(a, of_weights(b, "28185ea2" + "0" * 56), {"dis": "dis"})


def of_weights(report: Report, identity: str) -> Report:
    points = [replace(p, evaluation=p.evaluation.changed(weights={"digits": identity})) for p in report.points]
    return replace(report, points=points)
