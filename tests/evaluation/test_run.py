"""What an evaluation cost: seconds of all evaluators by part, machines that sampled. Which blocks are made again."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from dis_scale.evaluation.run import Evaluation, Spent, block_name, cost_of_samples
from dis_scale.evaluation.sampling import SampleBlock, grid_numbers
from dis_scale.process.errors import StorageError
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import GRID, Sampled
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


def test_what_is_measured_again_keeps_its_held_out_loss(tmp_path: Path) -> None:
    """Else its weights would be loaded for it, and a GPU waited for, to add a metric of features that are all there."""
    folder, asked = open_folder(tmp_path), list[Sampled]()
    data = SimpleNamespace(held_out_images=5)
    sweep = SimpleNamespace(recipe=SimpleNamespace(data=data), evaluation=lambda _: folder)

    def held_out(sampled: Sampled) -> dict[str, float]:
        asked.append(sampled)
        return {"held_out_loss": 2.0}

    nothing = cast(Any, None)
    evaluation = Evaluation(cast(Any, sweep), cast(Any, SimpleNamespace(held_out=held_out)), {}, {}, nothing, nothing, nothing)
    assert evaluation._held_out(Sampled("dis", 64)) == {"held_out_loss": 2.0}
    put_metrics(folder, values={"fid_5k": 3.0, "held_out_loss": 1.0, "held_out_loss/t0062": 1.5})
    assert evaluation._held_out(Sampled("dis", 64)) == {"held_out_loss": 1.0, "held_out_loss/t0062": 1.5}
    assert len(asked) == 1


def test_the_first_grid_is_drawn_before_the_other_blocks_are_sampled(tmp_path: Path) -> None:
    """Of a thousand samples it shows the first eighty: whoever waits for something to look at waits for no others."""
    folder, log, labels = open_folder(tmp_path), list[str](), np.arange(1000) % 10
    data = SimpleNamespace(num_classes=None)
    sweep = SimpleNamespace(recipe=SimpleNamespace(data=data), evaluation=lambda _: folder)
    settings = cast(Any, SimpleNamespace(samples=1000, block_images=50))

    def sample(sampled: Sampled, settings: Any, blocks: list[int]) -> list[Spent]:
        log.append(f"{len(blocks)} blocks, {'a grid' if folder.exists(GRID) else 'no grid'}")
        for number in blocks:
            shown = np.isin(range(50 * number, 50 * number + 50), grid_numbers(labels))
            folder.write(block_name(number), SampleBlock({}, np.ones(50), np.zeros((shown.sum(), 4, 4, 3), np.uint8)).to_bytes())
        return [Spent(50 * len(blocks), "a CPU", {})]

    evaluators = cast(Any, SimpleNamespace(sample=sample))
    evaluation = Evaluation(cast(Any, sweep), evaluators, {}, {}, labels, log.append, lambda: None)
    assert sum(spent.images for spent in evaluation._sample(Sampled("dis", 64), settings)) == 1000
    assert log == ["2 blocks, no grid", f"samples  {folder}/{GRID}", "18 blocks, a grid"]
    first = folder.read(GRID)
    evaluation._draw(folder, [block.pictures for block in evaluation._blocks(folder, 20)])
    assert folder.read(GRID) == first
    evaluation._sample(Sampled("dis", 128), settings)
    assert log[3:] == ["0 blocks, a grid"]  # all are kept, and the user has looked


def test_a_damaged_block_is_made_again_and_one_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """A folder instead of a file stands for what storage refuses to read, such as another user's file."""
    folder, logged, nothing = open_folder(tmp_path), list[str](), cast(Any, None)
    evaluation = Evaluation(nothing, nothing, {}, {}, nothing, logged.append, lambda: None)

    def parse(data: bytes, where: str) -> None:
        if data != b"good":
            raise StorageError(f"{where}: damaged")

    for number, block in enumerate((b"good", b"bad")):
        folder.write(block_name(number), block)
    assert evaluation._missing(folder, 3, parse) == [1, 2]
    assert logged == [f"made again: {folder}/{block_name(1)}: damaged"]
    (tmp_path / block_name(2)).mkdir()
    with pytest.raises(StorageError, match=r"cannot read .*Is a directory"):
        evaluation._missing(folder, 3, parse)
