"""`python -m pipelines STAGE SWEEP ...`: a stage's program, imported by name so that Ray's workers find its actors by name, too."""

import sys

from pipelines import stage


def main() -> None:
    name = sys.argv.pop(1)
    match name:
        case "prepare":
            from pipelines.prepare import prepare as program
        case "precompute":
            from pipelines.precompute import precompute as program
        case "train":
            from pipelines.train import train_model as program
        case "evaluate":
            from pipelines.evaluate import evaluate as program
        case _:
            raise SystemExit(f"unknown stage {name!r}: expected prepare, precompute, train or evaluate")
    stage.main(program)


main()
