"""The real images' statistics: computed once for all extractors, and refused if they are of other images or features."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dis_scale.data.sources import Source, open_source
from dis_scale.errors import DisScaleError, StorageError, UndecodableImage, UserError
from dis_scale.evaluation import reference
from dis_scale.evaluation.features import Extractor, load_extractor, load_extractors
from dis_scale.evaluation.metrics import MeanCovariance, fit, frechet
from dis_scale.recipe import Recipe, TorchScriptExtractor, reading
from dis_scale.storage.folder import Folder, open_folder
from tests.conftest import TINY

CPU = torch.device("cpu")
DINO = TorchScriptExtractor(kind="torchscript", name="dino", path="none")


class Means(nn.Module):
    """Returns four values an image, and a second output, which is unused."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.float()[:, 0, ::16, ::16].flatten(1), x


def script(path: Path, net: nn.Module | None = None) -> Path:
    torch.jit.script(net or Means()).save(path)
    return path


@pytest.fixture
def sweep(tmp_path: Path) -> Folder:
    return open_folder(tmp_path) / "sweep"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """The digits with a TorchScript file as the only extractor."""
    path = script(tmp_path / "dino.pt")
    return reading.load(TINY, [f"evaluate.extractor={{kind: torchscript, name: dino, path: '{path}'}}"])


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(reading.load(TINY).data)


def pixels(source: Source) -> np.ndarray:
    return np.stack([source.pixels(i, 32) for i in range(len(source))])


class Counted:
    """A source that counts how often an image is opened."""

    def __init__(self, source: Source) -> None:
        self._source, self.opened = source, 0

    def __len__(self) -> int:
        return len(self._source)

    def read_ranges(self, positions: range, most: int) -> Iterator[range]:
        return self._source.read_ranges(positions, most)

    def decoded(self, positions: range, resolution: int) -> list[np.ndarray | UndecodableImage]:
        self.opened += len(positions)
        return self._source.decoded(positions, resolution)


def stub(name: str, columns: slice) -> Extractor:
    return Extractor(name, f"weights of {name}", lambda x: (x.float()[:, 0, columns, ::16].flatten(1),), CPU)


def test_one_pass_serves_all_extractors(source: Source, recipe: Recipe, sweep: Folder) -> None:
    counted, extractors = Counted(source), [stub("a", slice(0, 32, 16)), stub("b", slice(8, 32, 8))]
    seen: list[int] = []
    reference.prepare(sweep, recipe, counted, extractors, seen.append)  # type: ignore[arg-type]
    reference.prepare(sweep, recipe, counted, extractors, seen.append)  # type: ignore[arg-type]
    assert (counted.opened, seen[-1]) == (1797, 1797)
    for extractor in extractors:
        features, loaded = (
            extractor(pixels(source)).pooled,
            reference.load(sweep, recipe, extractor.name, extractor.identity),
        )
        np.testing.assert_allclose(loaded.pooled.mean, features.mean(0, np.float64), rtol=1e-12)
        np.testing.assert_allclose(loaded.pooled.covariance, np.cov(features.T), rtol=1e-9)
        assert loaded.floor == pytest.approx(frechet(fit(features[::2]), fit(features[1::2])), rel=1e-9)
        assert loaded.kept is not None
        assert np.array_equal(loaded.kept, features)  # fewer than are kept


def test_features_of_a_fixed_choice_of_images_are_kept(
    source: Source, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "KEPT", 100)
    extractor = stub("a", slice(0, 32, 16))
    kept = [reference.compute(source, recipe.data, [extractor], lambda _: None)["a"].kept for _ in range(2)]
    assert kept[0] is not None
    assert kept[1] is not None
    assert np.array_equal(kept[0], kept[1])
    everything = {row.tobytes() for row in extractor(pixels(source)).pooled}
    assert len(kept[0]) == 100
    assert {row.tobytes() for row in kept[0]} <= everything


def test_a_torchscript_file_is_an_extractor(recipe: Recipe, sweep: Folder, source: Source) -> None:
    (extractor,) = load_extractors(recipe.evaluate, sweep, CPU)
    images = pixels(source)[:70]  # more than one batch
    assert np.array_equal(extractor(images).pooled, images[:, ::16, ::16, 0].reshape(70, -1).astype(np.float32))
    assert extractor.identity == hashlib.sha256(Path(recipe.evaluate.extractor.path).read_bytes()).hexdigest()  # type: ignore[union-attr]


def test_images_are_resized_for_a_torchscript_file(tmp_path: Path, sweep: Folder, source: Source) -> None:
    settings = DINO.model_copy(update={"path": str(script(tmp_path / "dino.pt")), "size": 64})
    assert load_extractor(settings, sweep, CPU)(pixels(source)[:2]).pooled.shape == (2, 16)


def test_torchscript_files_that_do_not_fit_are_refused(tmp_path: Path, sweep: Folder, source: Source) -> None:
    path = script(tmp_path / "dino.pt")
    with pytest.raises(UserError, match=f"extractor dino: no file {tmp_path}/none.pt"):
        load_extractor(DINO.model_copy(update={"path": str(tmp_path / "none.pt")}), sweep, CPU)
    with pytest.raises(UserError, match=f"dino.pt: sha256 [0-9a-f]+, the recipe expects {'0' * 64}"):
        load_extractor(DINO.model_copy(update={"path": str(path), "sha256": "0" * 64}), sweep, CPU)
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(UserError, match=r"text.pt: not a TorchScript file"):
        load_extractor(DINO.model_copy(update={"path": str(tmp_path / "text.pt")}), sweep, CPU)
    maps = load_extractor(DINO.model_copy(update={"path": str(script(tmp_path / "maps.pt", nn.ReLU()))}), sweep, CPU)
    with pytest.raises(UserError, match=r"features of shape \(2, 3, 32, 32\) for 2 images, expected \(2, d\)"):
        maps(pixels(source)[:2])


def test_statistics_of_other_inputs_are_refused_by_name(recipe: Recipe, sweep: Folder, source: Source) -> None:
    extractor = load_extractors(recipe.evaluate, sweep, CPU)[0]
    with pytest.raises(
        StorageError,
        match=r"no statistics of these images at 32 x 32 under extractor dino \(weights [0-9a-f]{12}\): run",
    ):
        reference.load_all(sweep, recipe)
    reference.prepare(sweep, recipe, source, [extractor], lambda _: None)
    assert reference.is_stored(sweep, recipe)
    larger = recipe.model_copy(update={"data": recipe.data.model_copy(update={"resolution": 64})})
    with pytest.raises(StorageError, match=r"at 64 x 64 under extractor dino .*, though there are others: run prepare"):
        reference.load_all(sweep, larger)
    data = sweep.read(reference.path(recipe, "dino", extractor.identity))
    sweep.write(reference.path(larger, "dino", extractor.identity), data)
    with pytest.raises(StorageError, match=r"resolution is 32, this recipe's is 64: delete the file and run prepare"):
        reference.load_all(sweep, larger)
    sweep.write(reference.path(recipe, "dino", "other weights"), data)
    with pytest.raises(StorageError, match=f"weights is {extractor.identity}, this recipe's is other weights"):
        reference.load(sweep, recipe, "dino", "other weights")
    sweep.write(reference.path(recipe, "dino", extractor.identity), data[:-1])
    with pytest.raises(StorageError, match=r"reference/[0-9a-f]{16}\.npz: damaged"):
        reference.load_all(sweep, recipe)


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


def adm(tmp_path: Path, arrays: dict[str, np.ndarray], *metrics: str) -> Recipe:
    path = tmp_path / "VIRTUAL_reference.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    settings = ["evaluate.extractor={kind: inception}", "evaluate.samples=5000", f"evaluate.reference='{path}'"]
    return reading.load(TINY, [*settings, f"evaluate.metrics=[{', '.join(('distance', *metrics))}]"])


def test_adms_file_gives_statistics_and_images(
    tmp_path: Path, sweep: Folder, source: Source, adm_arrays: dict[str, np.ndarray], judge: Extractor
) -> None:
    recipe = adm(tmp_path, adm_arrays, "sfid", "precision_recall")
    reference.prepare(sweep, recipe, source, [judge], lambda _: None)
    loaded = reference.load(sweep, recipe, "inception", "seeded")
    assert loaded.spatial is not None
    assert loaded.kept is not None
    for statistics, end in ((loaded.pooled, ""), (loaded.spatial, "_s")):
        assert np.array_equal(statistics.mean, adm_arrays[f"mu{end}"])
        assert np.array_equal(statistics.covariance, adm_arrays[f"sigma{end}"])
    assert loaded.floor is None
    assert np.array_equal(loaded.kept, judge(adm_arrays["arr_0"]).pooled)


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
    tmp_path: Path, sweep: Folder, source: Source, adm_arrays: dict[str, np.ndarray], judge: Extractor,
    lacking: str, metric: str, message: str,
) -> None:  # fmt: skip
    recipe = adm(tmp_path, {name: a for name, a in adm_arrays.items() if name != lacking}, metric)
    with pytest.raises(StorageError, match=message):
        reference.prepare(sweep, recipe, source, [judge], lambda _: None)
    assert sweep.list("reference") == []


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("arr_0", np.zeros((5, 64, 64, 3), np.uint8), r"uint8 images of shape \(64, 64, 3\).* expects uint8 \(32, 32, 3\)"),
        ("arr_0", np.zeros((5, 32, 32, 3), np.float32), "arr_0 holds float32 images"),
        ("mu", np.zeros(64), r"mu \(64,\) and sigma \(2048, 2048\) are of other features: expected \(2048,\)"),
        ("mu_s", np.zeros(2048), r"mu_s \(2048,\) and sigma_s \(2023, 2023\) are of other features: expected \(2023,\)"),
        ("mu", np.full(2048, np.nan), "mu or sigma is not finite: the file is damaged"),
    ],
)  # fmt: skip
def test_a_file_of_other_images_or_features_is_refused(
    tmp_path: Path, sweep: Folder, source: Source, adm_arrays: dict[str, np.ndarray], judge: Extractor,
    name: str, array: np.ndarray, message: str,
) -> None:  # fmt: skip
    with pytest.raises(UserError, match=message):
        reference.prepare(sweep, adm(tmp_path, adm_arrays | {name: array}), source, [judge], lambda _: None)


def test_an_invalid_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate.reference: no file .*none.npz"):
        reference.open_reference(str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match=r"text.npz is not an ADM reference .npz: File is not a zip file"):
        reference.open_reference(str(tmp_path / "text.npz"))


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
