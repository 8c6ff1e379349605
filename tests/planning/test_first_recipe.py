"""The first recipe for own images: what it decides, and that a sweep takes what the command wrote."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dis_scale import vae
from dis_scale.data.survey import Broken, Survey
from dis_scale.models.dis.settings import Dis
from dis_scale.planning import first_recipe
from dis_scale.planning.first_recipe import Machine, propose, require_resolution, resolution_of
from dis_scale.planning.plan import price_sweep
from dis_scale.process.errors import UserError
from dis_scale.recipe import LatentShape, Recipe, reading
from dis_scale.training.memory import lanes_at_once
from tests.support.commands import invoke

LAPTOP = Machine(cores=4, memory_bytes=8 * 2**30)
H100 = Machine(cores=64, memory_bytes=2**40, gpus=8, gpu_bytes=80 * 2**30, gpu_name="NVIDIA H100 80GB HBM3")


def photos(side: int = 100, count: int = 5000, classes: int = 2, url: str = "/data/photos") -> Survey:
    """Return a survey of images that all have one shorter side."""
    return Survey(url, {f"class {n}": count // classes for n in range(classes)}, Counter({side: count}), [], 0)


def proposed(survey: Survey, machine: Machine) -> Recipe:
    text = propose(survey, machine, "photos.yaml", resolution_of(survey, machine))
    assert max(len(line) for line in text.splitlines() if "/data/" not in line) <= 132
    return reading.parse(text, "text")


@pytest.mark.parametrize(("side", "resolution"), [(20, 32), (32, 32), (100, 64), (200, 128), (300, 256), (4000, 512)])
def test_the_resolution_is_the_largest_that_the_images_reach(side: int, resolution: int) -> None:
    assert resolution_of(photos(side), H100) == resolution
    assert resolution_of(photos(side), LAPTOP) == 32


def test_a_tenth_of_the_images_may_be_smaller() -> None:
    for small, resolution in ((99, 256), (101, 64)):
        survey = Survey("/x", {}, Counter({70: small, 300: 1000 - small}), [], 0)
        assert resolution_of(survey, H100) == resolution


@pytest.mark.parametrize("machine", [LAPTOP, H100], ids=["laptop", "H100"])
@pytest.mark.parametrize("side", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("classes", [0, 2])
def test_every_proposal_is_a_recipe_whose_models_fit(machine: Machine, side: int, classes: int) -> None:
    survey = photos(side, classes=classes) if classes else Survey("/x", {}, Counter({side: 5000}), [], 0)
    recipe = proposed(survey, machine)
    assert recipe.data.num_classes == (classes or None)
    assert recipe.vae.kind == ("trained" if not machine.gpus else "none" if side <= 64 else "pretrained")
    shape = LatentShape(4, 8) if not machine.gpus else LatentShape(3, side) if side <= 64 else LatentShape(4, side // 8)
    assert recipe.vae.kind == "pretrained" or vae.latent_shape(recipe.vae, recipe.data.resolution) == shape
    plan, train = price_sweep(recipe, shape), recipe.train
    assert train.most_workers == (machine.gpus or machine.cores)
    for name, cost in plan.costs.items():
        assert cost.tokens <= 258 or machine.gpus
        assert not machine.gpus or lanes_at_once(name, cost, train, train.most_workers, machine.gpu_bytes)


def test_lanes_divide_a_batch_also_where_gpus_do_not() -> None:
    train = proposed(photos(300), replace(H100, gpus=40)).train
    assert (train.most_workers, train.lanes, train.batch_images % train.lanes) == (40, 64, 0)


def test_more_time_and_memory_allow_more_models() -> None:
    def models(machine: Machine) -> list[str]:
        return list(proposed(photos(300), machine).models)

    small = Machine(cores=8, memory_bytes=2**35, gpus=1, gpu_bytes=16 * 2**30, gpu_name="NVIDIA T4")
    assert models(small) == list(models(H100))[: len(models(small))]
    assert len(models(small)) < len(models(H100))


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
def test_on_a_cpu_every_patch_has_fewer_values_than_its_model_is_wide(resolution: int) -> None:
    """Otherwise the noise of a sample does not pass through the model, and remains in the pictures."""
    recipe = reading.parse(propose(photos(300), LAPTOP, "x.yaml", resolution), "text")
    channels, size = vae.planned_shape(recipe.vae, resolution)
    for model in recipe.models.values():
        assert isinstance(model, Dis)
        assert channels * model.patch**2 < model.width
        assert (size // model.patch) ** 2 <= 256


@pytest.mark.parametrize("count", [70, 600, 100_000])
def test_on_a_cpu_the_first_pictures_come_early(count: int) -> None:
    """After the same images for small and large sets, by the smallest model, with an evaluation that is short beside it."""
    recipe = proposed(photos(count=count), LAPTOP)
    plan = price_sweep(recipe, LatentShape(4, 8))
    smallest = next(iter(recipe.models))
    assert recipe.train.publish_images[0] == 64_000
    assert first_recipe._published(first_recipe.CPU, 2200) == [1000, 2200], "the middle is hardly more than the first"
    assert plan.sampling_flops(smallest) < 0.25 * plan.training_flops(smallest) * recipe.train.publish_images[0]


def test_few_images_are_not_repeated_without_end() -> None:
    assert proposed(photos(count=6000), H100).train.images <= 6_000_000
    assert proposed(photos(count=60_000), H100).train.images > 6_000_000


@pytest.mark.parametrize("folder", ["2024", "true", "1e5", "inception", "My Photos!", "judge", "---", "ünïcode", "a" * 60])
def test_any_folder_gives_a_valid_name(folder: str) -> None:
    recipe = proposed(photos(url=f"/data/{folder}"), LAPTOP)
    assert recipe.data.source.url == f"/data/{folder}"  # type: ignore[union-attr]
    assert recipe.evaluate.trained


@pytest.mark.parametrize(
    ("survey", "words"),
    [
        (photos(count=64), "a distance needs 65 images; so here are samples"),
        (Survey("/x", {}, Counter({64: 600}), [], 0), "a distance needs 2,049 images, or 65 in class folders; so here are samples"),
    ],
    ids=["with classes", "without"],
)  # fmt: skip
def test_few_images_have_a_held_out_loss_in_place_of_a_distance(survey: Survey, words: str) -> None:
    assert words in propose(survey, LAPTOP, "x.yaml", 32)
    recipe = proposed(survey, LAPTOP)
    assert (recipe.evaluate.extractors, recipe.evaluate.metric) == ((), "held_out_loss")
    assert recipe.data.held_out_images == recipe.precompute.shard_images == survey.count // 10


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match="19 images, too few: expected at least 20: add images"):
        proposed(Survey("/x", {}, Counter({64: 19}), [], 0), LAPTOP)


def test_a_machine_without_memory_is_refused() -> None:
    with pytest.raises(UserError, match="dis-xs does not fit 4 cores with 0 GiB of free memory, no GPU: set --resolution lower"):
        proposed(photos(), Machine(cores=4, memory_bytes=2**20))


def test_the_first_lines_have_the_plans_price() -> None:
    text = propose(photos(), H100, "photos.yaml", 64)
    recipe = reading.parse(text, "text")
    plan, lines = price_sweep(recipe, LatentShape(3, 64)), [" ".join(line.split()) for line in text.splitlines()]
    for name, cost in plan.costs.items():
        trained, sampled = plan.own_flops(name) / 1e18, plan.sampling_flops(name) / 1e18
        assert f"# {name} {cost.parameters:,} {cost.gmacs_forward:.4g} {trained:.3g} {sampled:.3g}" in lines


def test_broken_images_are_skipped_by_the_recipe() -> None:
    broken = Survey("/x", {"a": 40, "b": 60}, Counter({64: 100}), [Broken("a/1.png", "it is empty")], 0)
    assert proposed(broken, LAPTOP).data.undecodable == "skip"
    assert proposed(photos(), LAPTOP).data.undecodable == "refuse"


def test_another_resolution_is_taken_or_refused() -> None:
    assert reading.parse(propose(photos(300), LAPTOP, "x.yaml", 256), "text").vae.kind == "pretrained"
    with pytest.raises(UserError, match="--resolution 100: expected one of 32, 64, 128, 256, 512"):
        require_resolution(100)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two classes, and 22 broken ones."""
    pixels = np.random.default_rng(0)
    for i in range(70):
        path = tmp_path / "photos" / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 255, (34, 34, 3), dtype=np.uint8)).save(path)
    for i in range(22):
        (tmp_path / "photos" / "cat" / f"broken {i:02}.png").write_bytes(b"")
    return tmp_path / "photos"


def test_the_command_writes_a_recipe_that_plan_takes(folder: Path) -> None:
    out = folder.parent / "photos.yaml"
    code, output = invoke("init", str(folder), "--out", str(out))
    assert code == 0, output
    assert "images   70 in " in output
    assert "broken   22 of 92 images cannot be decoded" in output
    assert output.count("it is empty (0 bytes)") == 20
    assert len((folder.parent / "photos.broken.txt").read_text().splitlines()) == 22
    assert f"next     dis-scale plan {out}" in output
    code, output = invoke("plan", str(out), "--set", f"storage.root={folder.parent}/outputs")
    assert code == 0
    assert "data     92 images, " in output
    assert invoke("init", str(folder), "--out", str(out)) == (
        2, f"error: --out {out}: the file exists: delete it, or give another name\n"
    )  # fmt: skip


def test_the_command_prints_json_for_programs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dis_scale import cli

    out = folder.parent / "small.yaml"
    with pytest.raises(SystemExit):
        cli.main(["init", str(folder), "--out", str(out), "--resolution", "64", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["classes"] == {"cat": 35, "dog": 35}
    assert facts["shorter_side"] == {"least": 34, "median": 34, "most": 34}
    assert len(facts["broken"]) == 22
    assert facts["settings"]["data"]["resolution"] == 64
    assert reading.load(out).model_dump(mode="json") == facts["settings"]
