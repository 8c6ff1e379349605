"""The driver of an ablation: one published checkpoint with other values of one sampling setting.

The values are evaluated in a Ray job, like every stage. Each value is stored as a variant: a rerun evaluates only the missing ones.
"""

import math
from collections.abc import Sequence
from functools import partial

from rich.console import Console

from dis_scale.process.errors import UserError
from dis_scale.process.progress import Board
from dis_scale.recipe.evaluate import Autoguidance
from dis_scale.report import ablation
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.weights import ema
from dis_scale.weights.ema import Snapshot
from dis_scale.weights.published import snapshots
from pipelines import last_ray
from pipelines.cluster import open_cluster
from pipelines.driver import Driver, go_on, run_stage, stopping_jobs
from pipelines.needs import require_device
from pipelines.signals import obeying_signals

GUIDANCE, WIDTH = "guidance", "ema_width"
"""The settings that can be varied, as the recipe names them."""
LARGEST_MISFIT = 0.25
"""Largest relative difference between a rebuilt average's profile and the requested one."""


def run_ablation(
    sweep: Sweep,
    model: str,
    at_images: int | None,
    setting: str,
    values: Sequence[float],
    console: Console,
    by: Sampled | None = None,
) -> dict[float, dict[str, float]]:
    """Evaluate the missing values, write the table and the figure below `report/`, and return the metrics of each value.

    UserError for an impossible value. `at_images` is a published count (default: the last). `by` is the guiding checkpoint, if any.
    """
    images_seen, values = state.published_at(sweep, model, at_images), sorted({float(f"{value:g}") for value in values})
    _require_possible(sweep, model, images_seen, setting, values, by)
    console.print(f"ray      {last_ray.words()}", highlight=False, soft_wrap=True)
    with Board(console) as board:
        driver = Driver(sweep, board)
        opened = open_cluster(sweep.recipe, board.say, partial(go_on, driver))
        with obeying_signals(driver.stop_requested), opened as cluster:
            require_device(driver, cluster)
            words = [f"{value:g}" for value in values]
            with stopping_jobs(driver):
                run_stage(driver, cluster, "ablate", model, str(images_seen), state.ablation_name(setting, by), *words)
    return ablation.write(sweep, model, images_seen, setting, values, console, by)


def _require_possible(
    sweep: Sweep, model: str, images_seen: int, setting: str, values: Sequence[float], by: Sampled | None
) -> None:
    train = sweep.recipe.train_of(model)
    if not sweep.recipe.evaluate.extractors:
        raise UserError(f"{sweep} measures no distance (evaluate.extractor: none), so no {setting} is better than another")
    if setting == WIDTH and train.power_ema is None:
        raise UserError("no width can be rebuilt: this sweep tracked no power-function averages (train.power_ema)")
    known = snapshots(sweep.run(model), images_seen, train)
    for value in values:
        if not 0 <= value < math.inf:
            raise UserError(f"{setting} {value:g}: expected 0 or more")
        guidance = Autoguidance(by=by.model, images=by.images_seen, scale=value) if by else value
        if setting == GUIDANCE and (refusal := sweep.recipe.guidance_refusal(guidance)):
            raise UserError(f"{setting}: {refusal}")
        if by and by.images_seen not in state.published_counts(sweep.run(by.model)):
            raise UserError(f"{by}: its weights are not published, and cannot guide")
        if setting == WIDTH and known:
            misfit = ema.misfit(known, Snapshot(images_seen, value))
            if misfit > LARGEST_MISFIT:
                raise UserError(
                    f"width {value:g}: from the {len(known)} averages published so far it can be rebuilt to within "
                    f"{misfit:.0%} only (expected {LARGEST_MISFIT:.0%}): choose one nearer to {train.power_ema}, or publish "
                    "more often"
                )
