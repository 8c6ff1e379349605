"""A study of compute budgets: image counts follow from the budgets, and the recipe is written out once."""

import io
import re

import pytest
from rich.console import Console

from dis_scale.planning import isoflop
from dis_scale.planning.plan import Plan, price_sweep
from dis_scale.process.errors import UserError
from dis_scale.recipe import LatentShape, Recipe, reading
from dis_scale.recipe.identity import identity_differences
from dis_scale.training import fork
from tests.support.studies import study

SHAPE = LatentShape(4, 8)


def written_out(*overrides: str) -> Plan:
    return price_sweep(isoflop.written_out(study(*overrides), SHAPE), SHAPE)


def test_a_branch_ends_within_half_a_step_of_its_budget() -> None:
    plan = written_out()
    branches = [name for name, model in plan.recipe.models.items() if model.branch]
    assert len(branches) == 4
    for name, budget in zip(branches, (1e10, 2e10) * 2, strict=True):
        step = plan.training_flops(name) * plan.recipe.train_of(name).batch_images
        assert abs(plan.training_flops(name) * plan.recipe.train_of(name).images - budget) <= step / 2
        assert plan.recipe.budgets[name] == budget


def test_each_size_is_one_trunk_as_long_as_its_last_branch_needs() -> None:
    recipe = written_out().recipe
    for size in ("dis", "dit"):
        trunk = recipe.train_of(size)
        assert trunk.decay == "none"
        assert trunk.publish_images == (max(recipe.branches_at(size)),)
        last = recipe.train_of([name for name in recipe.models if name.startswith(f"{size}-at-")][-1])
        assert last.decay == "linear"
        assert last.decay_from * last.images == pytest.approx(trunk.images)


def test_a_written_out_study_is_read_back_and_stays_as_it_is() -> None:
    recipe = written_out("models.dit.seeds=2").recipe
    assert len(recipe.models) == 3 * (1 + 2)
    stored = reading.parse(reading.dump(recipe), "stored")
    assert isoflop.written_out(stored, SHAPE) == stored == recipe


def test_a_model_with_a_branchs_name_is_not_replaced() -> None:
    name = next(name for name in written_out().recipe.models if name.startswith("dis-at-"))
    other = "{kind: dit, width: 16, depth: 1, heads: 2, patch: 4, train: {publish_images: [160]}}"
    with pytest.raises(UserError, match=f"models.{name} is also the name of a branch of dis: give it another name"):
        written_out(f"models.{name}={other}")


def test_a_branch_of_a_study_may_guide() -> None:
    """It is not there before the study is written out, and then its count is checked."""
    name = next(name for name in written_out().recipe.models if name.startswith("dis-at-"))
    count = written_out().recipe.train_of(name).images
    guided = written_out(f"evaluate.guidance={{by: {name}, images: {count}, scale: 2}}").recipe
    assert guided.evaluate.guide is not None
    with pytest.raises(UserError, match=f"evaluate.guidance: {name} is not published at 7 images: expected {count:,}"):
        written_out(f"evaluate.guidance={{by: {name}, images: 7, scale: 2}}")


def test_a_branch_keeps_its_budget_and_a_fork_has_none() -> None:
    """Whatever a later version counts as operations; and a fork's training is another."""
    recipe = written_out().recipe
    name = next(name for name, model in recipe.models.items() if model.branch)
    forked = reading.with_model(recipe, "other", fork._outside_studies(recipe.models[name]), ["learning_rate=0.5"])
    assert set(forked.budgets) == set(recipe.budgets)


def test_the_warm_up_is_a_share_of_a_sizes_smallest_training() -> None:
    """A fixed one would be half of a large size's training, and nothing of a small one's."""
    recipe = written_out("isoflop.warmup=0.1").recipe
    for size in ("dis", "dit"):
        runs = [recipe.train_of(name) for name in recipe.models if name.partition("-at-")[0] == size]
        assert {run.warmup_images for run in runs} == {round(0.1 * min(run.images for run in runs[1:]))}


def test_a_recipe_without_a_study_stays_as_it_is(tiny: Recipe) -> None:
    assert isoflop.written_out(tiny, SHAPE) is tiny


def test_budgets_may_be_added_above_the_largest() -> None:
    begun = written_out().recipe
    longer = written_out("isoflop.flops=[1e10, 2e10, 4e10]").recipe
    assert identity_differences(begun, longer) == []
    lower = written_out("isoflop.flops=[1e10, 1.5e10, 2e10]").recipe
    assert identity_differences(begun, lower) == ["isoflop.flops: 1.5e+10 is below 2e+10, whose trunks may have passed it"]
    shares = identity_differences(begun, written_out("isoflop.share=0.2").recipe)
    assert "isoflop.share: stored 0.25, given 0.2" in shares


def test_a_size_out_of_its_limits_is_left_out_of_a_budget_and_the_plan_names_the_limit() -> None:
    cells = isoflop.cells(price_sweep(study(), SHAPE))
    counts = {(cell.size, cell.budget): cell for cell in cells}
    most = counts["dit", 1e10].images
    least = counts["dis", 2e10].steps
    limits = (f"isoflop.most_images={most}", f"isoflop.least_steps={least}")
    refusals = {(c.size, c.budget): c.refusal for c in isoflop.cells(price_sweep(study(*limits), SHAPE))}
    assert refusals == {
        ("dis", 1e10): f"under {least:,} steps", ("dis", 2e10): None,
        ("dit", 1e10): None, ("dit", 2e10): f"over {most:,} images",
    }  # fmt: skip
    plan = written_out(*limits)
    assert len(plan.recipe.budgets) == 2
    assert f"over {most:,} images" in shown(plan, isoflop.cells(price_sweep(study(*limits), SHAPE)))


def test_the_plans_table_has_epochs_and_what_cooldowns_save() -> None:
    plan, cells = written_out(), isoflop.cells(price_sweep(study(), SHAPE))
    text = shown(plan, cells)
    assert f"{cells[0].images:,} images" in text
    assert f"{cells[0].images / 180:.3g} epochs" in text, "20 of 200 images are held out"
    spent, complete = map(float, re.findall(r"([\d.e+]+) FLOPs in all.*: ([\d.e+]+)", " ".join(text.split()))[0])
    # a trunk of 0.75 of the larger budget and a quarter of both, for each of two sizes
    assert spent == pytest.approx(2 * (0.75 * 2e10 + 0.25 * 3e10), rel=0.02)
    assert complete == pytest.approx(2 * 3e10, rel=0.02)


def shown(plan: Plan, cells: list[isoflop.Cell]) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(isoflop.table(plan, cells, 200))
    return console.export_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("isoflop.flops=[2e10, 1e10]", "flops must rise: got [20000000000.0, 10000000000.0]"),
        ("isoflop.flops=[0]", "isoflop.flops.0: got 0, expected: greater than 0"),
        ("isoflop.warmup=0.2", "isoflop.warmup: got 0.2, expected: less than or equal to 0.1"),
        ("isoflop.share=0.96", "warmup 0.05 leaves nothing at the constant rate beside share 0.96"),
        ("isoflop.shares=0.2", "isoflop.shares: unknown key (did you mean 'share'?)"),
        ("train.decay=linear", "models.dis: train.decay is linear, expected none: a size of a study"),
        ("isoflop=null", "train.publish_images: missing, and there is no default"),
        ("models.dis-2={kind: dis, width: 16, depth: 2, patch: 4, branch: {of: dis, at: 16}}", "models.dis-2.train.publish_images"),
        ("train.cooldowns={images: [160]}", "models.dis-at-160.branch.of: got 'dis', expected a model of this recipe"),
    ],
)  # fmt: skip
def test_mistakes_are_named(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        study(override)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("isoflop.flops=[1e10, 1.0001e10]", "isoflop.flops: two budgets give dis the same number of images"),
        ("isoflop.share=0.9999,isoflop.warmup=0", "isoflop.share: 0.9999 leaves dis no step at the constant rate"),
        (
            f"models.{'d' * 36}={{kind: dis, width: 16, depth: 2, patch: 4}}",
            f"models.{'d' * 36}: its branch would be called {'d' * 36}-at-",
        ),
        ("train.warmup_images=160", "models.dis: warmup_images follows from isoflop.warmup in a study: remove it"),
        ("isoflop.least_steps=1000000", "isoflop: dis has no budget within its limits: change least_steps (1,000,000)"),
        ("isoflop.most_images=16", "isoflop: dis has no budget within its limits"),
        ("train.publish_images=[160]", "isoflop.flops: no model is trained for 1e+10, 2e+10: expected models without"),
    ],
)
def test_a_study_that_cannot_be_is_refused(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        written_out(*override.split(",isoflop")[:1], *(f"isoflop{each}" for each in override.split(",isoflop")[1:]))
    assert words in str(caught.value)


def test_a_stored_study_gets_no_budget_without_its_file() -> None:
    stored = reading.dump(written_out().recipe)
    more = reading.parse(stored, "stored", ["isoflop.flops=[1e10, 2e10, 4e10]"])
    with pytest.raises(UserError, match=r"no model is trained for 4e\+10"):
        isoflop.written_out(more, SHAPE)
