"""A block is a function of (recipe, published weights, its number): bit-equal for any worker and order."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from dis_scale import models, vae
from dis_scale.data.encode import tf32
from dis_scale.data.sources import open_source
from dis_scale.evaluation import sampling
from dis_scale.evaluation.classifiers import Classifier
from dis_scale.evaluation.features import store_classifier
from dis_scale.evaluation.sampling import (
    COLUMN_NAMES,
    PARTS,
    BlockSampler,
    arrange,
    column_names,
    grid,
    grid_numbers,
    open_sampler,
    real_grid,
    sample_labels,
)
from dis_scale.recipe import Data, DigitsSource, FolderSource, LatentShape, Recipe, TrainedVae, reading
from dis_scale.recipe.evaluate import JUDGE, Autoguidance
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep, state
from tests.conftest import TINY
from tests.support.documents import put_latents, put_published
from tests.support.ranks import make_latents


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in evaluation's workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe() -> Recipe:
    return reading.load(TINY, ["evaluate.samples=70", "evaluate.variants={bf16: {precision: bf16}}"])


@pytest.fixture
def sweep(tmp_path: Path, recipe: Recipe) -> Sweep:
    """Inputs of sampling, untrained: autoencoder, extractor, judge, latents and one published model."""
    made = Sweep.below(open_folder(tmp_path), recipe)
    torch.manual_seed(0)
    vae.save(made.vae, vae.new(TrainedVae(kind="trained", widths=(8, 8, 8)), 32))
    store_classifier(made, "digits", Classifier("extractor", 10), 0.1)
    store_classifier(made, JUDGE, Classifier("judge", 10), 0.1)
    state.use_latents(made, make_latents(open_folder(tmp_path) / "latents/some", recipe), "v")
    model = models.build(recipe.models["dis"], LatentShape(4, 8), 10, seed=1)
    weights = {name: torch.randn_like(p) * 0.1 for name, p in model.named_parameters()}
    published = made.run("dis").published_at(160)
    put_published(published, safetensors.torch.save(weights), images=160)
    return made


def sampler(sweep: Sweep) -> BlockSampler:
    return open_sampler(sweep, vae.load(sweep), torch.device("cpu"))


def sample_blocks(sweep: Sweep, order: list[int], variant: str = "") -> dict[int, bytes]:
    """Sample blocks by one worker, in this order."""
    one, settings = sampler(sweep), sweep.recipe.evaluate.samplings[variant]
    model = one.model("dis", 160, settings)
    return {block: one.sample(model, settings, block).to_bytes() for block in order}


def test_blocks_are_bit_equal_for_any_workers_and_order(sweep: Sweep) -> None:
    """Progress counts each micro-batch: a block may take an hour."""
    alone, counted = sample_blocks(sweep, [0, 1]), list[int]()
    one, settings = sampler(sweep), sweep.recipe.evaluate
    one.sample(one.model("dis", 160, settings), settings, 0, sampled=counted.append)
    assert len(counted) > 1
    assert counted == [settings.batch_images] * (settings.block_images // settings.batch_images)
    shared = sample_blocks(sweep, [1]) | sample_blocks(sweep, [0])
    assert alone == shared
    assert alone[0] != alone[1]


def test_a_sample_is_right_if_the_judge_takes_it_for_its_class(sweep: Sweep) -> None:
    one, settings = sampler(sweep), sweep.recipe.evaluate
    one.judge = lambda pixels: torch.eye(10)[torch.full((len(pixels),), 3)]  # type: ignore[assignment]
    right = one.sample(one.model("dis", 160, settings), settings, 0).right
    assert right.tolist() == (one.labels[: len(right)] == 3).astype(int).tolist()
    assert 0 < right.sum() < len(right)


def test_another_precision_changes_the_pictures(sweep: Sweep) -> None:
    assert sample_blocks(sweep, [0], "bf16") != sample_blocks(sweep, [0])


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_only_the_model_may_round_its_products_to_tf32(sweep: Sweep, precision: str) -> None:
    seen = dict[str, bool]()
    one, settings = sampler(sweep), sweep.recipe.evaluate.model_copy(update={"precision": precision})
    assert isinstance(one.vae, vae.DiffusersVae)
    model, decoder = one.model("dis", 160, settings), one.vae.net.get_submodule("decoder")

    def note(module: torch.nn.Module, *_: Any) -> None:
        seen["draw" if module is model else "decode"] = torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32

    for module in (model, decoder):
        module.register_forward_hook(note)
    with tf32(allowed=False):  # as an evaluator
        one.sample(model, settings, 0)
    assert seen == {"draw": precision == "tf32", "decode": False}


def test_the_kernels_of_each_size_of_batch_are_compared(tiny: Recipe) -> None:
    """90 samples in blocks of 40 and batches of 16, guided at some times: the last batch of a block has 8, the last block 10."""
    compared = list[tuple[set[int], bool]]()
    changes = {"samples": 90, "batch_images": 16, "guidance_interval": (0.0, 500.0), "precision": "bf16"}
    settings = tiny.evaluate.model_copy(update=changes)
    model: Any = SimpleNamespace(verify_kernels=lambda _, images, training: compared.append((images, training)))
    sampling.verify_sampling(model, settings, torch.device("cuda"))
    assert compared == [({8, 10, 16, 20, 32}, False)]
    assert model.precision == "bf16"


def test_the_time_of_each_part_is_measured(sweep: Sweep) -> None:
    one, settings = sampler(sweep), sweep.recipe.evaluate
    one.sample(one.model("dis", 160, settings), settings, 0)
    assert list(one.seconds) == list(PARTS)
    assert all(seconds > 0 for seconds in one.seconds.values())


def test_labels_are_as_frequent_as_in_training_for_any_number_of_samples(recipe: Recipe) -> None:
    many = reading.load(TINY, ["evaluate.samples=20000"])
    counts = [0, 300, 100, 0, 600, 0, 0, 0, 0, 0]
    labels = sample_labels(many, counts)
    for part in (labels, labels[:200], labels[7000:7200]):
        shares = np.bincount(part, minlength=10) / len(part)
        np.testing.assert_allclose(shares, np.array(counts) / 1000, atol=0.015)
    np.testing.assert_array_equal(sample_labels(recipe, counts), labels[:70])


def test_random_labels_have_the_shares_of_training_and_the_noise_of_chance(recipe: Recipe) -> None:
    counts = [0, 300, 100, 0, 600, 0, 0, 0, 0, 0]
    many = reading.load(TINY, ["evaluate.samples=20000", "evaluate.labels=random"])
    labels = sample_labels(many, counts)
    np.testing.assert_allclose(np.bincount(labels, minlength=10) / 20000, np.array(counts) / 1000, atol=0.015)
    in_parts = [np.bincount(part, minlength=10)[4] for part in labels.reshape(100, 200)]
    balanced = [np.bincount(part, minlength=10)[4] for part in sample_labels(_balanced(many), counts).reshape(100, 200)]
    assert np.std(in_parts) == pytest.approx((200 * 0.6 * 0.4) ** 0.5, rel=0.3)
    assert np.std(balanced) < 1
    fewer = reading.load(TINY, ["evaluate.samples=70", "evaluate.labels=random"])
    np.testing.assert_array_equal(sample_labels(fewer, counts), labels[:70])


def test_uniform_labels_are_equally_likely_whatever_the_training_set_has() -> None:
    many = reading.load(TINY, ["evaluate.samples=20000", "evaluate.labels=uniform"])
    labels = sample_labels(many, [0, 300, 100, 0, 600, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(np.bincount(labels, minlength=10) / 20000, 0.1, atol=0.01)


def _balanced(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"labels": "balanced"})})


def test_guided_channels_are_those_of_the_recipe(sweep: Sweep) -> None:
    """Of latents with four channels."""
    one, guided = sampler(sweep), sweep.recipe.evaluate.model_copy(update={"guidance": 3.0})
    model, three = one.model("dis", 160, guided), guided.model_copy(update={"guidance_channels": 3})
    assert one.sample(model, three, 0).to_bytes() != one.sample(model, guided, 0).to_bytes()


def test_a_model_guided_by_itself_samples_as_without_guidance(sweep: Sweep) -> None:
    """And guided by another it does not."""
    one = sampler(sweep)
    itself = sweep.recipe.evaluate.model_copy(update={"guidance": Autoguidance(by="dis", images=160, scale=3)})
    model, guide = one.model("dis", 160, itself), one.guide(itself)
    assert guide is not None
    alone = one.sample(model, itself.model_copy(update={"guidance": 1.0}), 0)
    guided = one.sample(model, itself, 0, guide)
    np.testing.assert_allclose(guided.pictures.astype(int), alone.pictures.astype(int), atol=1)
    with torch.no_grad():
        guide.final.weight.mul_(2)  # type: ignore[operator, union-attr]
    assert (one.sample(model, itself, 0, guide).pictures != alone.pictures).any()
    assert one.guide(sweep.recipe.evaluate) is None


def test_a_guide_has_the_precision_of_the_setting_whatever_was_sampled_before(sweep: Sweep) -> None:
    """Otherwise a block would differ between an evaluator that continues and one that begins with it."""
    one = sampler(sweep)
    by = {"guidance": Autoguidance(by="dis", images=160, scale=3)}
    for precision in ("fp32", "bf16", "fp32"):
        guide = one.guide(sweep.recipe.evaluate.model_copy(update=by | {"precision": precision}))
        assert guide is not None
        assert guide.precision == precision


def test_the_grid_has_a_column_for_each_class() -> None:
    labels = np.array([2, 2, 7, 2, 5, 7, 7, 5])
    assert grid_numbers(labels).tolist() == [[0, 4, 2], [1, 7, 5]]
    assert grid_numbers(np.repeat([0, 1, 2], [40, 18, 2])).shape == (10, 2), "a rare class does not cut the others"
    assert grid_numbers(np.repeat([0, 1, 2], [8, 8, 7])).shape == (7, 3)
    by_number = np.array([0, 1, 2, 4, 5, 7])
    assert arrange(by_number, labels).tolist() == [0, 4, 2, 1, 7, 5]
    assert grid_numbers(np.repeat(np.arange(1000), 5)).shape == (5, 10)


def test_the_grid_is_under_the_names_of_its_columns() -> None:
    """A long name is cut, so that it is not over the next one's."""
    pictures = np.full((4, 32, 32, 3), 200, np.uint8)
    plain = Image.open(io.BytesIO(grid(pictures, 2)))
    named = Image.open(io.BytesIO(grid(pictures, 2, ["", "a name of many more letters than have space"])))
    assert (plain.size, named.size) == ((128, 128), (128, 16 + 128))
    assert np.array_equal(np.asarray(named)[16:], np.asarray(plain))
    header = np.asarray(named)[:16]
    assert (header[:, :64] == 255).all()
    assert (header[:, 64:] < 128).any()


def test_each_picture_is_under_its_name_unless_a_column_has_one() -> None:
    """A row without names has no space for them. Names fit their pictures."""
    pictures = np.full((5, 32, 32, 3), 200, np.uint8)
    by_column = [Image.open(io.BytesIO(grid(pictures, 2, names))) for names in ("ab", "ababa")]
    assert by_column[0] == by_column[1]
    assert by_column[0].size == (128, 16 + 3 * 64)
    one_each = Image.open(io.BytesIO(grid(pictures, 2, ["golden retriever, a dog", "b", "", "", "c"])))
    assert one_each.size == (128, 16 + 64 + 64 + 16 + 64)
    dark = np.asarray(one_each).max(2) < 128
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark[:16, :64].any(0))
    assert set(rows) <= {*range(16), *range(144, 160)}
    assert (columns.min() > 0, columns.max() < 63) == (True, True)
    assert (np.asarray(one_each)[160:, 64:] == 255).all(), "no sixth picture"


def test_real_images_are_in_the_layout_of_the_samples() -> None:
    """Each column has images of its class, which the PNG names; without classes they are ten at a time."""
    source = open_source(Data(source=DigitsSource(kind="digits"), resolution=8, num_classes=10))
    shown = Image.open(io.BytesIO(real_grid(source, 8)))
    assert json.loads(shown.info[COLUMN_NAMES]) == list("0123456789")
    cells = np.asarray(shown)[16:][::8, ::8].reshape(2, 8, 10, 8, 3).swapaxes(1, 2)
    of_class = {label: [source.pixels(i, 8) for i in range(len(source)) if source.labels[i] == label] for label in (0, 9)}
    for label, images in of_class.items():
        assert all(any(np.array_equal(cells[row, label], image) for image in images) for row in range(2))
    unnamed = Image.open(io.BytesIO(real_grid(replace(source, label_names=[]), 8)))
    assert (unnamed.size, json.loads(unnamed.info[COLUMN_NAMES])) == ((640, 128), [])


def test_a_real_image_that_is_broken_leaves_its_place_to_another(tmp_path: Path) -> None:
    """A white square looks like a drawing of nothing."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8), (200, 10 * i, 0)).save(tmp_path / name / f"{i}.png")
    for path in ("a/0.png", "a/2.png", "b/0.png", "b/1.png", "b/3.png"):
        (tmp_path / path).write_bytes(b"broken")
    source = open_source(
        Data(source=FolderSource(kind="folder", url=str(tmp_path)), resolution=8, num_classes=2, undecodable="skip")
    )
    shown = np.asarray(Image.open(io.BytesIO(real_grid(source, 8))))
    cells = [shown[top + 32, left + 32].tolist() for top in (16, 80) for left in (0, 64)]
    assert cells == [[200, 10, 0], [200, 20, 0], [200, 30, 0], [255, 255, 255]]


def test_a_name_in_letters_that_our_font_lacks_is_in_one_of_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a name in Chinese, if a font for it is installed."""
    other = str(Path(sampling.FONT).with_name("STIXGeneral.ttf"))
    monkeypatch.setattr(sampling, "OTHER_FONTS", ("not-installed.ttf", other))
    font, second = sampling._font_for("Größe 1", 12), sampling._font_for("\u1d8a", 12)
    assert font
    assert second
    assert (font.path, second.path) == (sampling.FONT, other)

    def shown(*names: str) -> np.ndarray:  # without the names that are in the PNG's text
        return np.asarray(Image.open(io.BytesIO(grid(np.zeros((2, 8, 8, 3), np.uint8), 2, names))))

    assert not np.array_equal(shown("\u1d8a", "\u1d8a"), shown("\u2e3a", "\u2e3a"))
    assert np.array_equal(shown("\u2e3a a", "\u2e3a b"), shown("\u2e3a c", "\u2e3a")), "of no font: their numbers"
    assert not np.array_equal(shown("\u2e3a a", "\u2e3a b"), shown("\u2e3a a", "\u2e3a a"))


def test_the_columns_have_the_names_of_the_classes(tmp_path: Path, tiny: Recipe) -> None:
    sweep = Sweep.below(open_folder(tmp_path), tiny)
    latents = sweep.store / "latents/some"
    put_latents(latents, label_names=("zero", "one", "two"))
    state.use_latents(sweep, latents, "v")
    assert column_names(sweep, np.array([2, 0, 2, 0, 0])) == ["zero", "two"]
    assert column_names(sweep, np.array([9])) == ["9"], "a class without a name"
    data = tiny.data.model_copy(update={"num_classes": None})
    assert column_names(replace(sweep, recipe=tiny.model_copy(update={"data": data})), np.array([0, 1])) == []
