"""One family against another's curve: known ratios are found as often as their errors say, and what cannot be known is said."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from dis_scale.evaluation.metrics import FOLDS
from dis_scale.process.errors import UserError
from dis_scale.recipe import Recipe
from dis_scale.report import Report, families
from dis_scale.report.families import Comparison, Gap, Size
from dis_scale.report.figures import gflops_distance
from dis_scale.sweep import Sampled
from dis_scale.sweep.documents import Metrics, RunCost
from tests.support.commands import answer, invoke
from tests.support.evaluations import collect, put, sweep_at

COSTS = np.array([6.0, 23.0, 80.0, 118.0])
OTHERS = np.array([8.0, 30.0, 105.0])
TRIES = 1000


def size(cost: float, values: list[float], left_out: Any = ()) -> Size:
    unused: Any = None
    return Size(unused, float(cost), tuple(values), tuple(left_out))


class Noise(NamedTuple):
    """Standard deviations of logarithms: of a group of samples of all models, of one family's and of one model's; of trainings."""

    shared: float
    family: float
    own: float
    training: float
    seeds: int


def simulated(costs: np.ndarray, ratio: float, rng: np.random.Generator, shared: np.ndarray, noise: Noise) -> list[Size]:
    """Return sizes of known values, each with its values without each group of samples; the largest has one training."""
    family, made = noise.family * rng.standard_normal(FOLDS), []
    for cost in costs:
        seeds = 1 if cost == costs.max() else noise.seeds
        groups = np.log(ratio * 100 * cost**-0.4) + shared + family + noise.own * rng.standard_normal((seeds, FOLDS))
        groups += noise.training * rng.standard_normal((seeds, 1))
        left_out = np.exp((groups.sum(1, keepdims=True) - groups) / (FOLDS - 1)).mean(0)
        made.append(size(cost, np.exp(groups.mean(1)).tolist(), left_out))
    return made


def found(noise: Noise, ratio: float) -> list[Gap]:
    gaps = []
    for seed in range(TRIES):
        rng = np.random.default_rng(seed)
        shared = noise.shared * rng.standard_normal(FOLDS)
        gap = families.gap(*(simulated(c, r, rng, shared, noise) for c, r in ((OTHERS, ratio), (COSTS, 1.0))))
        assert gap
        gaps.append(gap)
    return gaps


@pytest.mark.parametrize(
    "noise",
    [Noise(0.5, 0, 0.05, 0.04, 3), Noise(0.5, 0, 0.15, 0, 1), Noise(0.5, 0, 0.05, 0.04, 1), Noise(0.5, 0.1, 0.05, 0.02, 3)],
    ids=["seeds", "one sampling", "one training each", "noise of a family"],
)
def test_a_known_ratio_is_found_within_its_error(noise: Noise) -> None:
    """Errors that took the models' noise for independent would be 3 times as large, and would find none of these differences."""
    equal, better = found(noise, 1.0), found(noise, 0.85)
    assert np.mean([gap.change for gap in better]) == pytest.approx(np.log(0.85), abs=0.01)
    errors = np.array([gap.error for gap in equal], float)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std([gap.change for gap in equal]), rel=0.6)
    assert np.mean([gap.significant for gap in equal]) < 0.08
    assert np.mean([gap.significant for gap in better]) > 0.8


@pytest.mark.parametrize("counts", [(3, 3), (4, 4)], ids=str)
def test_the_spread_over_seeds_is_counted_once(counts: tuple[int, int]) -> None:
    """The sizes leave their line by it as well: added to that, errors were 1.4 times too large, and few differences were found."""
    gaps = []
    for seed in range(600):
        rng = np.random.default_rng(seed)
        made = ([size(c, (100 * c**-0.4 * np.exp(0.05 * rng.standard_normal(3))).tolist()) for c in COSTS[:n]] for n in counts)
        gap = families.gap(*made)
        assert gap
        gaps.append(gap)
    errors = np.array([gap.error for gap in gaps], float)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std([gap.change for gap in gaps]), rel=0.15)
    assert np.mean([gap.significant for gap in gaps]) == pytest.approx(0.05, abs=0.025)


def test_sizes_that_leave_the_curve_widen_the_error() -> None:
    seeds = [np.array([1.0, 1.001, 0.999]) * 100 * c**-0.4 for c in COSTS]
    straight = [size(c, list(v)) for c, v in zip(COSTS, seeds, strict=True)]
    bent = [size(c, list(v * f)) for c, v, f in zip(COSTS, seeds, (1, 1.2, 1, 1.2), strict=True)]
    ours = [size(30.0, [25.0, 25.1, 24.9])]
    one, other = families.gap(ours, straight), families.gap(ours, bent)
    assert one
    assert other
    assert one.error is not None
    assert other.error is not None
    assert other.error > 10 * one.error


@pytest.mark.parametrize("scatter", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("counts", [(3, 3), (4, 3), (4, 4)], ids=str)
def test_sizes_of_both_families_that_leave_a_line_are_no_difference(counts: tuple[int, int], scatter: float) -> None:
    """Two equal families whose sizes scatter about one line by one to ten times their seeds' noise."""
    significant = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        ours, theirs = (
            [size(c, list(100 * c**-0.4 * np.exp(scatter * rng.standard_normal() + 0.01 * rng.standard_normal(3)))) for c in costs]
            for costs in (COSTS[: counts[0]] * 1.1, COSTS[: counts[1]])
        )
        gap = families.gap(ours, theirs)
        assert gap
        significant.append(gap.significant)
    assert np.mean(significant) < 0.09


def test_too_few_sizes_and_other_costs_have_no_curve() -> None:
    ours, theirs = ([size(c, [1.0]) for c in costs] for costs in (OTHERS, COSTS))
    assert families.gap(ours, theirs[:2]) is None
    assert families.gap([size(500, [1.0])], theirs) is None
    unknown = families.gap(ours, theirs)
    assert unknown
    assert unknown.error is None
    assert not unknown.significant


@pytest.fixture
def sweep(tmp_path: Path, recipe: Recipe) -> Any:
    """Four sizes of DiS, and one of DiT, whose cost is within theirs."""
    text = recipe.model_dump(mode="json")
    text["models"]["dit"] |= {"width": 64, "depth": 2}
    made = sweep_at(tmp_path, "both", Recipe.model_validate(text, strict=False))
    made.save_recipe()
    for model, distance in (("dis", 9.0), ("dis32", 6.0), ("dis64", 4.0), ("dis128", 2.7), ("dit", 7.0)):
        put(made, Sampled(model, 160), distance)
    return made


def comparisons(report: Report, ours: str, theirs: str) -> list[Comparison]:
    """Return those of a sweep that is no study."""
    found = []
    for each in families.comparisons(report, ours, theirs):
        assert isinstance(each, Comparison)
        found.append(each)
    return found


def test_a_sweep_says_what_its_families_show(sweep: Any) -> None:
    report = collect(sweep)
    by_cost = {(each.metric, each.cost): each for each in comparisons(report, "dit", "dis")}
    gap = by_cost[report.metric, "Gflops"].found
    assert gap
    assert [s.point.model for s in gap.sizes] == ["dit"]
    assert "cannot be compared: worker hours or" in by_cost[report.metric, "worker hours"].sentence
    sentence = by_cost[report.metric, "Gflops"].sentence
    assert sentence.startswith(f"{report.metric} at equal Gflops: dit is ")
    assert sentence.endswith("its error is not known")
    (other,) = families.sentences(report)
    assert other == sentence, "dit has no curve, and dis has one"
    with pytest.raises(UserError, match=r"--families: both has no points of mamba: it has dis, dit"):
        list(families.comparisons(report, "dis", "mamba"))


def test_hours_of_other_machines_are_not_compared(sweep: Any) -> None:
    for model, machine in (("dis", "A"), ("dis32", "A"), ("dis64", "A"), ("dis128", "A"), ("dit", "B")):
        folder = sweep.evaluation(Sampled(model, 160))
        cost = RunCost(worker_hours=1.0, trained_on=(machine,))
        Metrics.read(folder).changed(cost=cost).write(folder)
    found = {each.cost: each.sentence for each in comparisons(collect(sweep), "dit", "dis")}
    assert found["worker hours"].endswith("dit and dis cannot be compared: their worker hours are of A and B")
    assert "dit is " in found["Gflops"]


def test_without_an_extractor_each_comparison_is_listed_once(sweep: Any, recipe: Recipe) -> None:
    none = recipe.evaluate.model_dump() | {"extractor": {"kind": "none"}, "variants": {}}
    made = sweep_at(
        Path(str(sweep)).parent.parent, "none", sweep.recipe.model_copy(update={"evaluate": recipe.evaluate.model_validate(none)})
    )
    for model, loss in (("dis", 0.9), ("dis32", 0.6), ("dis64", 0.4), ("dis128", 0.27), ("dit", 0.7)):
        put(made, Sampled(model, 160), loss)
    assert len(families.comparisons(collect(made), "dit", "dis")) == len(families.COSTS)


def test_another_mixer_or_other_parts_are_another_curve(tmp_path: Path, recipe: Recipe) -> None:
    """Though of one kind; and the figures draw both."""
    text = recipe.model_dump(mode="json")
    text["models"]["ssd"] = text["models"]["dis64"] | {"mixer": "ssd", "combine": "hydra", "state_size": 8}
    text["models"]["dit"] |= {"modern": ["swiglu"]}
    made = sweep_at(tmp_path, "mixers", Recipe.model_validate(text, strict=False))
    made.save_recipe()
    for model, distance in (("dis", 9.0), ("dis32", 6.0), ("dis64", 4.0), ("dis128", 2.7), ("ssd", 7.0), ("dit", 8.0)):
        put(made, Sampled(model, 160), distance)
    report = collect(made)
    assert report.families == ["dis", "dit + swiglu", "dis + ssd hydra"]
    assert [p.model for p in report.family("dis + ssd hydra", 160)] == ["ssd"]
    assert any(each.found for each in comparisons(report, "dis + ssd hydra", "dis"))
    lines = {tuple(np.atleast_1d(line.get_ydata()).tolist()) for line in gflops_distance(report).axes[0].lines}
    assert {(9.0, 6.0, 4.0, 2.7), (7.0,), (8.0,)} <= lines


def test_the_command_shows_every_size_beside_the_curve(sweep: Any) -> None:
    code, output = invoke("compare", str(sweep), "--families", "dit", "dis")
    assert code == 0, output
    assert "dit against dis" in output
    assert set(answer("compare", str(sweep), "--families", "dit", "dis", "--json")) == {"comparisons", "not_compared"}
    code, output = invoke("compare", str(sweep))
    assert code == 2
    assert "expected two sweeps, or one with --families A B" in output
