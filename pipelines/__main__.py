"""`python -m pipelines STAGE SWEEP ...`: run a stage's program. Imported by name, so that Ray's workers find its actors by name."""

import sys

from pipelines import stage


def find_program(name: str) -> stage.Program:
    """Return the program of a stage; imports that stage only."""
    match name:
        case "prepare":
            from pipelines.prepare import prepare_sweep

            return prepare_sweep
        case "precompute":
            from pipelines.precompute import precompute_latents

            return precompute_latents
        case "train":
            from pipelines.train import train_one

            return train_one
        case "evaluate":
            from pipelines.evaluate import evaluate_published

            return evaluate_published
        case "ablate":
            from pipelines.evaluate import ablate

            return ablate
    raise SystemExit(f"unknown stage {name!r}: expected prepare, precompute, train, evaluate or ablate")


if __name__ == "__main__":
    stage.run_program(find_program(sys.argv[1]), *sys.argv[2:])
