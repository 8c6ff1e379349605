"""`make soak`: a training run that is killed again and again at random places, compared at its end with one that was not.

    python -m tests.faults.soak [--kills 100] [--seed N]

Prints its seed and, every ten kills, how far it is; exit code 1 where anything differs.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from dis_scale.recipe import Recipe, reading
from tests.conftest import TINY
from tests.support import fault_plans

KILLS_A_RUN = 10
FILES_A_SAVE = 7
"""Files and sidecar that a rank writes for a resume point of the tiny recipe."""


def plan(draw: random.Random, recipe: Recipe, kills: int) -> str:
    """Kills at random steps, in random saves after a random file, and in publishing, of random ranks."""
    lines = []
    for _ in range(kills):
        rank, images = draw.randrange(2), draw.randrange(0, recipe.train.images, recipe.train.batch_images)
        saved = draw.randrange(0, recipe.train.images, recipe.train.resume_every_images)
        lines.append(
            draw.choice(
                [
                    f"kill at step rank={rank} images={images}",
                    f"kill at written path=resume/{saved:012d} rank={rank} nth={draw.randint(1, FILES_A_SAVE - 1)}",
                    f"kill at write path=published/{draw.choice([0, 160, 320]):012d} rank=0",
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
    draw, recipe, began = random.Random(options.seed), reading.load(TINY, ["train.keep_resume=3"]), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        fault_plans.train_through(recipe, Path(scratch) / "calm", "")
        calm, struck, runs = fault_plans.made(Path(scratch) / "calm", recipe), 0, 0
        while struck < options.kills:
            root, runs = Path(scratch) / f"{runs:03d}", runs + 1
            kills = min(KILLS_A_RUN, options.kills - struck)
            fault_plans.train_through(recipe, root, plan(draw, recipe, kills), attempts=2 * kills + 1)
            struck += kills - len(fault_plans.left(root))
            if fault_plans.made(root, recipe) != calm:
                sys.exit(f"soak: run {runs} differs from the undisturbed one: --seed {options.seed}")
            print(f"soak: {struck} kills in {runs} runs, all bit-equal, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
