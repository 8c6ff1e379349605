"""Stop anywhere and go on: bit-equal to the undisturbed run, for each stage and precision, and at another world size."""

from pathlib import Path

import pytest
import torch

from dis_scale.recipe import Recipe, Train, reading
from dis_scale.storage import manifest
from dis_scale.storage.folder import open_folder
from dis_scale.tracking import Row, Rows
from dis_scale.training import checkpoint, loop
from dis_scale.training.loop import learning_rate
from tests.conftest import TINY
from tests.support import ranks

LAST = 320
BOTH = ("calm", "stopped")


def weights(root: Path, model: str = "dis", images: int = LAST) -> dict[str, torch.Tensor]:
    return checkpoint.load_published(open_folder(root) / "sweep/runs" / model, images)


def losses(root: Path, model: str = "dis") -> list[tuple[int, float]]:
    rows: list[Row] = Rows(open_folder(root) / "sweep/runs" / model / "log").new()
    return [(row.images, row.value) for row in rows if row.name == "loss"]


def assert_bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize(
    "settings",
    [
        ["train.zero_stage=1"],
        ["train.zero_stage=2", "train.checkpointing=block", "train.power_ema=[0.05, 0.1]"],
        ["train.zero_stage=3", "train.precision=bf16"],
    ],
    ids=["stage 1, fp32", "stage 2, checkpointing, power-function averages", "stage 3, bf16"],
)
def test_a_stopped_run_ends_as_the_undisturbed_one(tmp_path: Path, settings: list[str]) -> None:
    recipe = reading.load(TINY, settings)
    ranks.run(recipe, "dis", tmp_path / "calm", attempt=1)
    ranks.run(recipe, "dis", tmp_path / "stopped", attempt=1, stop_at=112)
    run = open_folder(tmp_path / "stopped/sweep/runs/dis")
    assert checkpoint.published(run) == [0]
    assert max(int(name.split("-")[0]) for name in (run / "resume").list()) < 160
    ranks.run(recipe, "dis", tmp_path / "stopped", attempt=2)
    assert checkpoint.published(run) == [0, 160, 320]
    assert_bit_equal(weights(tmp_path / "calm"), weights(tmp_path / "stopped"))
    if recipe.train.power_ema:
        rebuilt = [
            checkpoint.load_average(open_folder(tmp_path / at / "sweep/runs/dis"), LAST, recipe.train, 0.07)
            for at in BOTH
        ]
        assert_bit_equal(*rebuilt)
        assert any(not torch.equal(rebuilt[0][name], tensor) for name, tensor in weights(tmp_path / "calm").items())
    assert losses(tmp_path / "calm") == losses(tmp_path / "stopped") != []


def test_a_damaged_resume_point_is_named_and_the_one_before_taken(tmp_path: Path) -> None:
    recipe = reading.load(TINY, ["models={dit: {kind: dit, width: 16, depth: 1, heads: 2, patch: 4}}"])
    ranks.run(recipe, "dit", tmp_path, attempt=1)
    run, said = open_folder(tmp_path / "sweep/runs/dit"), list[str]()
    newest = checkpoint.newest(run, said.append)
    assert newest is not None
    assert (newest.images, said) == (LAST, [])
    name = f"{newest.folder.name}/weights-00001.safetensors"
    data = bytearray((run / "resume").read(name))
    data[-1] ^= 1
    (run / "resume").write(name, bytes(data))
    before = checkpoint.newest(run, said.append)
    assert before is not None
    assert before.images == 240
    assert len(said) == 1
    assert f"{name}: damaged: its sha256 differs" in said[0]


def test_only_the_last_resume_points_are_kept_and_none_without_its_manifest(tmp_path: Path) -> None:
    recipe = reading.load(TINY, ["train.workers=1", "train.keep_resume=2"])
    ranks.run(recipe, "dis", tmp_path, attempt=1)
    resume = open_folder(tmp_path / "sweep/runs/dis/resume")
    assert resume.list() == ["000000000240-0001", "000000000320-0001"]
    assert all(manifest.find(resume / name) for name in resume.list())


def test_pruning_spares_what_a_faster_rank_has_begun(tmp_path: Path) -> None:
    run = open_folder(tmp_path)
    for images, files in [(80, {"a": b""}), (160, {"a": b""}), (240, None)]:
        place = run / "resume" / f"{images:012d}-0001"
        place.write("weights-00001.safetensors", b"begun")
        if files is not None:
            manifest.put(place, files, images=images)
    checkpoint.Saver(run, attempt=1, rank=0, world=2, held=lambda: True, keep=1)._prune(160)
    assert (run / "resume").list() == ["000000000160-0001", "000000000240-0001"]


@pytest.mark.parametrize(("took_s", "said"), [(4.2, []), (45.5, ["45.5 s and grace_s is 30 s"])])
def test_a_save_longer_than_the_grace_is_said_at_the_start(
    tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch, took_s: float, said: list[str]
) -> None:
    monkeypatch.setattr(loop.dist, "get_rank", lambda: 0)
    place, lines = open_folder(tmp_path), list[str]()
    run = loop.Run(
        tiny, "dit", place, place, 1, torch.device("cpu"), lambda: True, lambda: False, print, lines.append, 0.0
    )
    saver = checkpoint.Saver(place, attempt=1, rank=0, world=1, held=run.held, keep=2, took_s=took_s)
    loop._compare_with_grace(run, saver)
    assert len(lines) == len(said)
    assert all(
        words in line and "give --set grace_s=91 or more" in line for words, line in zip(said, lines, strict=True)
    )


@pytest.mark.parametrize(
    ("decay", "images", "expected"),
    [("none", 1000, 1.0), ("linear", 600, 0.8), ("linear", 1000, 0.0), ("cosine", 750, 0.5), ("cosine", 400, 1.0)],
)
def test_the_learning_rate_falls_after_the_plateau(decay: str, images: int, expected: float) -> None:
    settings = Train(
        publish_images=(0, 1000),
        batch_images=10,
        lanes=1,
        resume_every_images=10,
        learning_rate=1.0,
        decay=decay,
        decay_from=0.5,
    )  # type: ignore[arg-type]
    assert learning_rate(settings, images) == pytest.approx(expected)


def test_the_learning_rate_warms_up_in_images() -> None:
    settings = Train(
        publish_images=(0, 1000), batch_images=10, lanes=1, resume_every_images=10, learning_rate=1.0, warmup_images=100
    )
    assert [learning_rate(settings, n) for n in (0, 40, 90, 500)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
