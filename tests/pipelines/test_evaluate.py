"""A published checkpoint that cannot be read is named, noted and passed over; an evaluation that finds nothing ends."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dis_scale.evaluation.results import Drawn
from ray.exceptions import RayTaskError

from dis_scale.errors import DisScaleError, Preempted, StorageAway, StorageError, StorageFull, UserError
from dis_scale.evaluation import results
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import Folder, open_folder
from pipelines import evaluate, stage
from tests.conftest import TINY


@dataclass
class Failing:
    """An evaluation of which nothing can be measured."""

    sweep: Folder
    error: DisScaleError

    def evaluate(self, _: Drawn) -> dict[str, float]:
        raise self.error


OTHERS = [Preempted("stop"), StorageAway("503"), StorageFull("no space left"), stage.Lost("a worker was lost")]


def from_a_worker(error: DisScaleError) -> Any:
    """The error as Ray brings it: of the same class, with a traceback and addresses around it."""
    return RayTaskError("draw", "Traceback ...", error, pid=1, ip="192.0.2.1").as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [StorageError("weights.safetensors: damaged"), DisScaleError("3 samples are not finite"), UserError("not finite")],
    ids=str,
)
@pytest.mark.parametrize("wrap", [lambda error: error, from_a_worker], ids=["here", "in a worker"])
def test_what_cannot_be_measured_is_skipped_and_noted(
    tmp_path: Path, tiny: Recipe, capsys: pytest.CaptureFixture[str], error: DisScaleError, wrap: Callable[[Any], Any]
) -> None:
    sweep, skipped, drawn = open_folder(tmp_path), set[Drawn](), Drawn("dis", 160, "wide")
    evaluate._evaluate_one(Failing(sweep, wrap(error)), drawn, skipped)  # type: ignore[arg-type]
    assert skipped == {drawn}
    assert f"skipped: dis at 160 images (wide): {error}\n" in capsys.readouterr().out
    assert results.skipped(sweep, tiny) == {drawn: str(error)}


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_what_is_not_the_checkpoints_fault_skips_nothing(tmp_path: Path, error: DisScaleError) -> None:
    skipped: set[Drawn] = set()
    with pytest.raises(type(error)):
        evaluate._evaluate_one(Failing(open_folder(tmp_path), error), Drawn("dis", 0), skipped)  # type: ignore[arg-type]
    assert skipped == set()


def test_nothing_published_for_long_is_a_clear_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = reading.load(TINY, ["evaluate.give_up_after_s=0.3"])
    opened: list[Any] = []
    monkeypatch.setattr(evaluate, "open_evaluation", lambda *arguments: opened.append(arguments))
    monkeypatch.setattr(evaluate, "LOOK_EVERY_S", 0.1)
    with pytest.raises(DisScaleError, match="nothing was published or saved for 0 s: is training running"):
        evaluate._evaluate_all(open_folder(tmp_path), recipe, "cpu", set())
    assert len(opened) == 1


def test_seconds_add_up_and_name_the_rate() -> None:
    spent = [{"sampling": 2.0, "decoding": 1.0, "images": 30}, {"sampling": 4.0, "decoding": 1.0, "images": 30}]
    assert evaluate._seconds(spent) == {
        "sampling": 6.0, "decoding": 2.0, "sampling_images_per_s": 10.0, "decoding_images_per_s": 30.0,
    }  # fmt: skip
    assert evaluate._seconds([{"sampling": 0.0, "images": 0}]) == {}
