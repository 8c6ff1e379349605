"""`python -m pipelines STAGE SWEEP ...`: a stage's program, imported by name so that Ray's workers find its actors by name, too."""

import sys

from pipelines import stage


def program(name: str) -> stage.Program:
    """The program of a stage; imports that stage alone."""
    match name:
        case "prepare":
            from pipelines.prepare import prepare

            return prepare
        case "precompute":
            from pipelines.precompute import precompute

            return precompute
        case "train":
            from pipelines.train import train_model

            return train_model
        case "evaluate":
            from pipelines.evaluate import evaluate

            return evaluate
        case "vary":
            from pipelines.evaluate import vary

            return vary
    raise SystemExit(f"unknown stage {name!r}: expected prepare, precompute, train, evaluate or vary")


if __name__ == "__main__":
    stage.main(program(sys.argv[1]), *sys.argv[2:])
