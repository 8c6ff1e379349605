"""The real images' statistics: computed once for all extractors, and refused if they are of other images or features."""

import hashlib
import io
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dis_scale.data.sources import Source, open_source
from dis_scale.evaluation import parts, reference
from dis_scale.evaluation.adm import open_reference
from dis_scale.evaluation.features import Extractor, load_extractor, load_extractors
from dis_scale.evaluation.metrics import MeanCovariance
from dis_scale.process.errors import DisScaleError, StorageError, UserError
from dis_scale.recipe import ExportedExtractor, Recipe, reading
from dis_scale.storage.folder import open_folder
from dis_scale.storage.programs import hash_of
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.extractors import reference_file
from tests.conftest import TINY
from tests.support.pages import PAGES, blocks
from tests.support.programs import Pixels, export, pixels, with_exported

CPU = torch.device("cpu")
DINO = ExportedExtractor(kind="exported", name="dino", path="none")


def dino(path: Path, **changes: object) -> ExportedExtractor:
    return DINO.model_copy(update={"path": str(path), "sha256": hash_of([str(path)], "dino")} | changes)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """The digits with an exported program as the only extractor."""
    return with_exported(dino=export(tmp_path / "dino.pt2"))


@pytest.fixture
def sweep(tmp_path: Path, recipe: Recipe) -> Sweep:
    return sweep_of(tmp_path, recipe)


def sweep_of(root: Path, recipe: Recipe) -> Sweep:
    return Sweep(open_folder(root) / "sweep", recipe)


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(reading.load(TINY).data)


def test_features_of_a_fixed_choice_of_images_are_kept() -> None:
    count = parts.KEPT + 500
    numbers = np.random.default_rng(0).integers(0, 256, (count, 1, 1, 3), np.uint8)
    batches = [list(enumerate(numbers[first : first + 500], first)) for first in range(0, count, 500)]
    extractor = Extractor("a", "weights of a", lambda x: (x.float().flatten(1),), CPU)
    kept = parts.compute(batches, count, [extractor])["a"].kept
    chosen = parts.choose_kept(count)
    assert np.array_equal(chosen, parts.choose_kept(count))
    assert not np.array_equal(chosen, np.arange(parts.KEPT)), "the first ones are of few classes"
    assert len(set(chosen.tolist())) == len(kept) == parts.KEPT
    assert np.array_equal(kept, numbers[chosen].reshape(-1, 3))


def test_a_program_is_an_extractor(recipe: Recipe, sweep: Sweep, source: Source) -> None:
    (extractor,) = load_extractors(sweep, CPU)
    images = pixels(source)[:70]  # more than one batch
    assert np.array_equal(extractor(images).pooled, images[:, ::16, ::16, 0].reshape(70, -1).astype(np.float32))
    assert extractor.identity == hashlib.sha256(Path(recipe.evaluate.extractor.path).read_bytes()).hexdigest()  # type: ignore[union-attr]


def test_images_are_resized_for_a_program(tmp_path: Path, sweep: Sweep, source: Source) -> None:
    settings = dino(export(tmp_path / "dino.pt2", size=64), size=64)
    assert load_extractor(settings, sweep, CPU)(pixels(source)[:2]).pooled.shape == (2, 16)


@pytest.mark.parametrize("size", [64, 256])
def test_the_program_for_dinov2_resizes_without_rounding(tmp_path: Path, sweep: Sweep, size: int) -> None:
    """The page's program, exported around 1,024 means of patches, against Pillow's bicubic filter of real numbers."""
    (written,) = (block for page in PAGES for block in blocks(page) if block.startswith("class Dino"))
    namespace = {"torch": torch, "F": F}
    exec(written, namespace)
    program = namespace["Dino"](nn.Sequential(nn.AvgPool2d(7), nn.Flatten()))  # type: ignore[operator]
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    data = sweep.recipe.data.model_copy(update={"resolution": size})
    sweep = replace(sweep, recipe=sweep.recipe.model_copy(update={"data": data}))
    found = load_extractor(dino(export(tmp_path / "dino.pt2", program, size)), sweep, CPU)(images).pooled
    bands = np.moveaxis(images, -1, 1).reshape(-1, size, size).astype(np.float32)
    resized = np.stack([np.asarray(Image.fromarray(band).resize((224, 224), Image.Resampling.BICUBIC)) for band in bands])
    scaled = resized.reshape(3, 3, 224, 224) / 255
    normal = (scaled - np.reshape([0.485, 0.456, 0.406], (3, 1, 1))) / np.reshape([0.229, 0.224, 0.225], (3, 1, 1))
    assert found == pytest.approx(normal.reshape(3, 3, 32, 7, 32, 7).mean((3, 5)).reshape(3, -1), abs=1e-4)


def test_programs_that_do_not_fit_are_refused(tmp_path: Path, sweep: Sweep, source: Source) -> None:
    path = export(tmp_path / "dino.pt2")
    with pytest.raises(UserError, match=f"extractor dino: no file {tmp_path}/none.pt2"):
        load_extractor(DINO.model_copy(update={"path": str(tmp_path / "none.pt2")}), sweep, CPU)
    with pytest.raises(UserError, match=f"dino.pt2 has sha256 [0-9a-f]+, the recipe expects {'0' * 64}"):
        load_extractor(dino(path, sha256="0" * 64), sweep, CPU)
    with pytest.raises(UserError, match=f"dino.pt2: a program.* no hash .*\n  sha256: {dino(path).sha256}"):
        load_extractor(dino(path, sha256=None), sweep, CPU)
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(UserError, match=r"text.pt2: features is not a program of torch.export"):
        load_extractor(dino(tmp_path / "text.pt2"), sweep, CPU)
    with pytest.raises(UserError, match=r"features of shape \(2, 3, 32, 32\) for 2 images, expected \(2, d\)"):
        load_extractor(dino(export(tmp_path / "maps.pt2", nn.ReLU())), sweep, CPU)
    torch.export.save(torch.export.export(Pixels(), (torch.zeros(2, 3, 32, 32, dtype=torch.uint8),)), tmp_path / "two.pt2")
    with pytest.raises(UserError, match=r"features refuses an input of shape \(1, 3, 32, 32\)"):
        load_extractor(dino(tmp_path / "two.pt2"), sweep, CPU)


def test_statistics_of_other_inputs_are_refused_by_name(recipe: Recipe, sweep: Sweep, source: Source) -> None:
    extractor = load_extractors(sweep, CPU)[0]
    with pytest.raises(
        StorageError, match=r"no statistics of these images at 32 x 32 under extractor dino \(weights [0-9a-f]{12}\): run"
    ):
        reference.load_all(sweep)
    assert state.references_missing(sweep) == ["dino"]
    reference.prepare(sweep, source, [extractor], lambda _: None)
    assert state.references_missing(sweep) == []
    data = recipe.data.model_copy(update={"resolution": 64})
    larger = replace(sweep, recipe=recipe.model_copy(update={"data": data}))
    with pytest.raises(StorageError, match=r"at 64 x 64 under extractor dino .*, though there are others: run prepare"):
        reference.load_all(larger)
    stored = sweep.references.read(reference_file(sweep, "dino", extractor.identity))
    sweep.references.write(reference_file(larger, "dino", extractor.identity), stored)
    with pytest.raises(StorageError, match=r"resolution is 32, this recipe's is 64: delete the file and run prepare"):
        reference.load_all(larger)
    sweep.references.write(reference_file(sweep, "dino", "other weights"), stored)
    with pytest.raises(StorageError, match=f"weights is {extractor.identity}, this recipe's is other weights"):
        reference.load(sweep, "dino", "other weights")
    sweep.references.write(reference_file(sweep, "dino", extractor.identity), stored[:-1])
    with pytest.raises(StorageError, match=r"reference/[0-9a-f]{16}\.npz: damaged"):
        reference.load_all(sweep)


# -- ADM's file ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adm_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "arr_0": rng.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8),
        "mu": rng.standard_normal(2048), "sigma": np.diag(rng.uniform(1, 2, 2048)).astype(np.float32),
        "mu_s": rng.standard_normal(2023), "sigma_s": np.eye(2023, dtype=np.float32),
    }  # fmt: skip


@pytest.fixture
def judge() -> Extractor:
    """An extractor with Inception's 2048 features."""
    return Extractor("inception", "seeded", lambda x: (x.flatten(1)[:, :2048].float(),), CPU)


def adm_sweep(tmp_path: Path, arrays: dict[str, np.ndarray], *metrics: str, also: str = "[]") -> Sweep:
    """Return a sweep whose recipe names an ADM file of these arrays."""
    path = tmp_path / "VIRTUAL_reference.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    settings = [
        "evaluate.extractor={kind: inception}",
        "evaluate.samples=5000",
        f"evaluate.reference='{path}'",
        f"evaluate.also={also}",
    ]
    recipe = reading.load(TINY, [*settings, f"evaluate.metrics=[{', '.join(('distance', *metrics))}]"])
    return sweep_of(tmp_path, recipe)


def test_adms_file_gives_statistics_and_images(
    tmp_path: Path, source: Source, adm_arrays: dict[str, np.ndarray], judge: Extractor
) -> None:
    sweep = adm_sweep(tmp_path, adm_arrays, "sfid", "precision_recall")
    reference.prepare(sweep, source, [judge], lambda _: None)
    loaded = reference.load(sweep, "inception", "seeded")
    assert loaded.spatial is not None
    assert loaded.kept is not None
    for statistics, end in ((loaded.pooled, ""), (loaded.spatial, "_s")):
        assert np.array_equal(statistics.mean, adm_arrays[f"mu{end}"])
        assert np.array_equal(statistics.covariance, adm_arrays[f"sigma{end}"])
    assert np.array_equal(loaded.kept, judge(adm_arrays["arr_0"]).pooled)


def test_beside_adms_file_another_extractor_has_statistics_of_the_images(
    tmp_path: Path, source: Source, adm_arrays: dict[str, np.ndarray], judge: Extractor
) -> None:
    """So FID is that of published tables, and FD-DINOv2 and the copy rate are of the images that are trained on."""
    program = dino(export(tmp_path / "dino.pt2"))
    also = f"[{{kind: exported, name: dino, path: '{program.path}', sha256: {program.sha256}}}]"
    sweep = adm_sweep(tmp_path, adm_arrays, "copy_rate", also=also)
    other = load_extractor(program, sweep, CPU)
    reference.prepare(sweep, source, [judge, other], lambda _: None)
    of_adm, of_images = (reference.load(sweep, e.name, e.identity) for e in (judge, other))
    assert np.array_equal(of_adm.pooled.mean, adm_arrays["mu"])
    assert of_images.pooled.count == len(source)
    assert state.reference_parts_missing(sweep, len(source)) == []


@pytest.mark.parametrize(
    ("lacking", "metric", "message"),
    [
        ("arr_0", "kid", r"VIRTUAL_reference.npz: no images \(arr_0\), which kid needs"),
        ("arr_0", "precision_recall", r"no images \(arr_0\), which precision_recall needs"),
        ("sigma_s", "sfid", "no mu_s and sigma_s, which sfid needs"),
        ("mu", "kid", "no mu and sigma, which every distance needs"),
    ],
)
def test_a_metric_without_its_statistics_is_refused(
    tmp_path: Path, source: Source, adm_arrays: dict[str, np.ndarray], judge: Extractor,
    lacking: str, metric: str, message: str,
) -> None:  # fmt: skip
    sweep = adm_sweep(tmp_path, {name: a for name, a in adm_arrays.items() if name != lacking}, metric)
    with pytest.raises(StorageError, match=message):
        reference.prepare(sweep, source, [judge], lambda _: None)
    assert sweep.folder.list("reference") == []


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("arr_0", np.zeros((5, 64, 64, 3), np.uint8), "images of 64 x 64 pixels, and those that it is for have 32"),
        ("arr_0", np.zeros((5, 32, 32, 3), np.float32), r"arr_0 holds float32 of shape \(5, 32, 32, 3\), expected uint8"),
        ("mu", np.zeros(64), r"mu \(64,\) and sigma \(2048, 2048\) are of other features: expected \(2048,\)"),
        ("mu_s", np.zeros(2048), r"mu_s \(2048,\) and sigma_s \(2023, 2023\) are of other features: expected \(2023,\)"),
        ("mu", np.full(2048, np.nan), "mu or sigma is not finite: the file is damaged"),
        ("mu", np.full(2048, "1"), "mu and sigma are <U1 and float32: expected floating-point numbers"),
    ],
)  # fmt: skip
def test_a_file_of_other_images_or_features_is_refused(
    tmp_path: Path, source: Source, adm_arrays: dict[str, np.ndarray], judge: Extractor,
    name: str, array: np.ndarray, message: str,
) -> None:  # fmt: skip
    with pytest.raises(UserError, match=message):
        reference.prepare(adm_sweep(tmp_path, adm_arrays | {name: array}), source, [judge], lambda _: None)


def test_an_invalid_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate.reference: no file .*none.npz"):
        open_reference(str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match=r"text.npz cannot be read as an .npz: File is not a zip file"):
        open_reference(str(tmp_path / "text.npz"))


def test_a_file_of_a_store_is_not_read_whole_for_its_statistics(bucket: str) -> None:
    """Beside them ADM's have images, of which 10,000 of 256 x 256 take 2 GB."""
    buffer, parts = io.BytesIO(), {"arr_0": np.zeros((500, 256, 256, 3), np.uint8), "mu": np.ones(4), "sigma": np.eye(4)}
    np.savez(buffer, **parts)  # type: ignore[arg-type]
    open_folder(bucket).write("adm.npz", buffer.getvalue())
    tracemalloc.start()
    try:
        adm = open_reference(f"{bucket}/adm.npz")
        statistics = adm.statistics("mu", "sigma", 4)
        assert statistics is not None
        assert (statistics.mean.tolist(), adm.square_images()) == ([1.0] * 4, (500, 256))
        assert sum(len(part) for part in adm.images(20)) == 500
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 80 * 10**6 < len(buffer.getvalue())
    with pytest.raises(UserError, match=r"evaluate.reference: no file .*none.npz"):
        open_reference(f"{bucket}/none.npz")


def test_metrics_that_cannot_be_measured_are_refused_before_sampling(recipe: Recipe) -> None:
    few = reference.Reference("w", MeanCovariance(5, np.zeros(6), np.eye(6)), kept=np.zeros((5, 6)))
    with pytest.raises(StorageError, match="5 images are too few for the covariance of 6 features"):
        reference.require("digits", few, recipe)
    wide = reference.Reference("w", MeanCovariance(500, np.zeros(80), np.eye(80)), kept=np.zeros((500, 80)))
    with pytest.raises(DisScaleError, match="80 samples are too few for the covariance of 80 features"):
        reference.require("digits", wide, recipe)
    more = reading.load(TINY, ["evaluate.samples=1000", "evaluate.metrics=[distance, kid]"])
    with pytest.raises(StorageError, match="kid needs 1,000 images, here are 500"):
        reference.require("digits", wide, more)
