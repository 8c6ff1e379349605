"""`make soak`: training runs that are killed at random points, compared at their end with an undisturbed one.

    python -m tests.faults.soak [--kills 100] [--seed N]

Prints its seed and its progress; exit code 1 if any result differs.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from dis_scale.recipe import Recipe, reading
from dis_scale.training.engine import kinds
from tests.conftest import TINY
from tests.support import fault_plans

KILLS_A_RUN = 10


def plan(rng: random.Random, recipe: Recipe, kills: int) -> str:
    """Return kills of random ranks: at random steps, in random saves after a random file, and in publishing."""
    lines = []
    for _ in range(kills):
        rank, images = rng.randrange(2), rng.randrange(0, recipe.train.images, recipe.train.batch_images)
        saved = rng.randrange(0, recipe.train.images, recipe.train.resume_every_images)
        lines.append(
            rng.choice(
                [
                    f"kill at step rank={rank} images={images}",
                    f"kill at written path=resume/{saved:012d}-*/{rng.choice(kinds(recipe.train))}-{rank:05d}",
                    f"kill at write path=published/{rng.choice([0, 160, 320]):012d} rank=0",
                ]
            )
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    print(f"soak: seed {options.seed}, {options.kills} kills", flush=True)
    rng, recipe, began = random.Random(options.seed), reading.load(TINY, ["train.keep_resume=3"]), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        fault_plans.train_through(recipe, Path(scratch) / "undisturbed", "")
        undisturbed, kills_done, runs = fault_plans.made(Path(scratch) / "undisturbed", recipe), 0, 0
        while kills_done < options.kills:
            root, runs = Path(scratch) / f"{runs:03d}", runs + 1
            kills = min(KILLS_A_RUN, options.kills - kills_done)
            fault_plans.train_through(recipe, root, plan(rng, recipe, kills), attempts=2 * kills + 1)
            kills_done += kills - len(fault_plans.left(root))
            if fault_plans.made(root, recipe) != undisturbed:
                sys.exit(f"soak: run {runs} differs from the undisturbed one: --seed {options.seed}")
            print(f"soak: {kills_done} kills in {runs} runs, all bit-equal, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
