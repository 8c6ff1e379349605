"""What an evaluation cost: the seconds of all evaluators by part, and the machines that sampled."""

from pathlib import Path

from dis_scale.evaluation.run import Spent, cost_of_samples
from dis_scale.storage.folder import open_folder
from tests.support.documents import put_metrics


def test_seconds_add_up_and_name_the_rate(tmp_path: Path) -> None:
    spent = [
        Spent(30, "an H200", {"sampling": 2.0, "decoding": 1.0}),
        Spent(30, "an H200", {"sampling": 4.0, "decoding": 1.0}),
        Spent(0, "a CPU", {"sampling": 0.0, "decoding": 0.0}),
    ]
    assert cost_of_samples(spent, open_folder(tmp_path)) == (
        ("an H200",),
        {"sampling": 6.0, "decoding": 2.0, "sampling_images_per_s": 10.0, "decoding_images_per_s": 30.0},
    )


def test_kept_blocks_keep_the_cost_of_the_evaluation_that_sampled_them(tmp_path: Path) -> None:
    folder, nothing = open_folder(tmp_path), [Spent(0, "a CPU", {"sampling": 0.0})]
    assert cost_of_samples(nothing, folder) == ((), {})
    put_metrics(folder, seconds={"sampling": 6.0}, sampled_on=("an H200",))
    assert cost_of_samples(nothing, folder) == (("an H200",), {"sampling": 6.0})
