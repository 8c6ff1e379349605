"""Labelled images to the curve, on real parts, with all state in an object store (on disk: test_again_is_safe.py)."""

from pathlib import Path

from tests.support import sweeps


def test_in_an_object_store(bucket: str, tmp_path: Path) -> None:
    root = f"{bucket}/prefix"
    done = sweeps.run(
        root, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "train.zero_stage=3", "train.precision=bf16"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sweeps.assert_whole(root)
