"""`python -m pipelines STAGE SWEEP ...`: run a stage's program, imported by name so that Ray's workers find its actors."""

import pkgutil
import sys

from pipelines import stage

PROGRAMS = {
    "prepare": "pipelines.prepare:prepare_sweep",
    "precompute": "pipelines.precompute:precompute_latents",
    "train": "pipelines.train:train_one",
    "evaluate": "pipelines.evaluate:evaluate_published",
    "ablate": "pipelines.evaluate:ablate",
}
"""The program of each stage, imported only where it runs."""

if __name__ == "__main__":
    stage.run_program(pkgutil.resolve_name(PROGRAMS[sys.argv[1]]), *sys.argv[2:])
