"""Samples of any origin against any reference: an .npz, a folder and a tar of the same pictures have the same metrics."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from dis_scale.data import listing
from dis_scale.evaluation import outside, parts
from dis_scale.evaluation.features import Extractor
from dis_scale.evaluation.inception import CLASSES
from dis_scale.process.errors import UserError
from tests.support.commands import invoke
from tests.support.seeded_inception import blobs

SAMPLES = 60


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    """Eight features of a product with fixed weights, in the place of Inception's 2,048."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3 * 32 * 32, d, generator=generator) / 1000 for d in (8, 8, CLASSES)]

    def project(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.float().flatten(1) @ weight for weight in weights)

    return Extractor("inception", "fixed", project, torch.device("cpu"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples in each layout, and other pictures as a reference."""
    folder, samples, real = tmp_path_factory.mktemp("pictures"), blobs(SAMPLES, 1), blobs(SAMPLES + 20, 2)
    np.savez(folder / "samples.npz", arr_0=samples)
    np.savez(folder / "real.npz", arr_0=real)
    (folder / "samples").mkdir()
    with tarfile.open(folder / "samples.tar", "w") as tar:
        for i, picture in enumerate(samples):
            (folder / "samples" / f"{i:03d}.png").write_bytes(png(picture))
            info = tarfile.TarInfo(f"{i:03d}.png")
            info.size = len(png(picture))
            tar.addfile(info, io.BytesIO(png(picture)))
    return folder


def test_features_that_are_not_finite_are_refused() -> None:
    def in_float16(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x.flatten(1)[:, :8].half() * 1000,)

    some = Extractor("dino", "fixed", in_float16, torch.device("cpu"))
    assert len(some(np.zeros((2, 8, 8, 3), np.uint8)).pooled) == 2
    with pytest.raises(UserError, match="dino: its features of 1 of 3 images are not finite"):
        some(np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 255, 60)]))


def test_logits_that_are_not_finite_are_refused() -> None:
    """They gave an Inception Score of nan."""
    some = Extractor(
        "inception", "fixed", lambda x: (torch.ones(len(x), 8), torch.full((len(x), 8), torch.inf)), torch.device("cpu")
    )
    with pytest.raises(UserError, match="inception: its features of 2 of 2 images are not finite"):
        some(np.zeros((2, 8, 8, 3), np.uint8))


def test_features_are_not_rounded_to_tf32_whoever_asks() -> None:
    """PyTorch's default rounds convolutions on a GPU: `measure` had other distances there than a sweep."""
    seen = list[bool]()

    def net(x: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(torch.backends.cudnn.allow_tf32)
        return (x.float().flatten(1),)

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        Extractor("some", "fixed", net, torch.device("cpu"))(np.zeros((2, 8, 8, 3), np.uint8))
        assert (seen, torch.backends.cudnn.allow_tf32) == ([False], True)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_a_part_of_a_large_reference_is_named(
    pictures: Path, extractor: Extractor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parts, "KEPT", 60)
    measured(pictures / "samples.npz", pictures / "real.npz", extractor)
    assert "precision and recall: against 60 of 80 pictures, where ADM's takes all" in capsys.readouterr().out


def measured(samples: Path, reference: Path, extractor: Extractor) -> dict[str, float]:
    return outside.measured(str(samples), str(reference), lambda: extractor, lambda *_: None, print).values


def test_an_npz_has_the_metrics_of_torch_fidelity(pictures: Path, extractor: Extractor) -> None:
    found = measured(pictures / "samples.npz", pictures / "real.npz", extractor)
    ours, real = (torch.from_numpy(extractor(blobs(n, seed)).pooled) for n, seed in ((SAMPLES, 1), (SAMPLES + 20, 2)))
    statistics = (fid_features_to_statistics(each) for each in (ours, real))
    assert found["fid_60"] == pytest.approx(
        fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"], rel=1e-5
    )
    theirs = [float(each) for each in calculate_precision_recall_full(ours, real, neighborhood=3)]
    assert [found["precision_60"], found["recall_60"]] == pytest.approx(theirs, abs=1e-5)
    assert found["fid_60_error"] > 0
    logits = torch.from_numpy(extractor(blobs(SAMPLES, 1)).logits)
    score = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)["inception_score_mean"]
    assert found["is_60"] == pytest.approx(score, rel=1e-5)
    assert {"sfid_60", "is_adm_60"} < found.keys()


def test_a_folder_and_a_tar_have_the_metrics_of_the_npz(pictures: Path, extractor: Extractor) -> None:
    expected = measured(pictures / "samples.npz", pictures / "real.npz", extractor)
    for name in ("samples", "samples.tar"):
        found = measured(pictures / name, pictures / "real.npz", extractor)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-6)


def test_pictures_of_other_sizes_are_refused_by_name(pictures: Path, extractor: Extractor, tmp_path: Path) -> None:
    for i, side in enumerate([32] * 11 + [16]):
        (tmp_path / f"{i}.png").write_bytes(png(blobs(1, i, side)[0]))
    with pytest.raises(UserError, match=r"\d.png has 16 x 16 pixels, the first picture 32 x 32: expected squares of one size"):
        measured(tmp_path, pictures / "real.npz", extractor)
    np.savez(tmp_path / "small.npz", arr_0=blobs(9, 1, 16))
    with pytest.raises(UserError, match=r"real.npz: 32 x 32 pixels, the samples have 16 x 16"):
        measured(tmp_path / "small.npz", pictures / "real.npz", extractor)
    np.savez(tmp_path / "none.npz", arr_1=blobs(9, 1, 16))
    with pytest.raises(UserError, match=r"none.npz: no images \(arr_0\)"):
        measured(tmp_path / "none.npz", pictures / "real.npz", extractor)
    np.savez_compressed(tmp_path / "large.npz", arr_0=np.zeros((2, 4096, 4096, 3), np.uint8))
    assert (tmp_path / "large.npz").stat().st_size < 2**18
    with pytest.raises(UserError, match=r"large.npz: arr_0 holds images of side 4,096, expected 1 to 2,048"):
        measured(tmp_path / "large.npz", pictures / "real.npz", extractor)


def test_too_few_samples_are_refused_before_a_reference_that_takes_hours(
    pictures: Path, extractor: Extractor, tmp_path: Path
) -> None:
    np.savez(tmp_path / "few.npz", arr_0=blobs(8, 3))
    seen = list[int]()

    def net(x: torch.Tensor) -> Any:
        seen.append(len(x))
        return extractor.net(x)

    with pytest.raises(UserError, match=r"few.npz: 8 pictures"):
        measured(tmp_path / "few.npz", pictures / "samples", replace(extractor, net=net))
    assert seen == [1], "a black picture tells the number of features"
    np.savez(tmp_path / "none.npz", arr_0=np.zeros((0, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"none.npz: 0 pictures"):
        measured(tmp_path / "none.npz", pictures / "real.npz", extractor)


def test_an_array_by_columns_is_refused_and_not_damaged(pictures: Path, extractor: Extractor, tmp_path: Path) -> None:
    """To copy it again, as a damaged file's error says, would not help."""
    np.savez(tmp_path / "columns.npz", arr_0=np.asfortranarray(blobs(9, 1)))
    with pytest.raises(UserError, match=r"columns.npz: arr_0 is stored by columns: save it with numpy.savez"):
        measured(tmp_path / "columns.npz", pictures / "real.npz", extractor)


def test_pictures_are_read_by_name_without_unpacking_the_listing_for_each(
    pictures: Path, extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is listed in a mixed order; an entry at a time in the order of names took hours of a million pictures."""
    monkeypatch.setattr(listing, "PART", 8)
    unpacked, unpack = list[int](), listing.Listing._unpacked

    def counted(self: listing.Listing, number: int) -> Any:
        unpacked.append(number)
        return unpack(self, number)

    monkeypatch.setattr(listing.Listing, "_unpacked", counted)
    measured(pictures / "samples", pictures / "real.npz", extractor)
    assert len(unpacked) <= 2 * SAMPLES / 8, f"{len(unpacked)} times of {SAMPLES / 8:.0f} parts"


def test_an_error_does_not_depend_on_how_the_samples_are_sorted(pictures: Path, extractor: Extractor) -> None:
    """By the brightness of the picture, as many sets are by class: groups of neighbours would differ by far more than chance."""
    samples = np.load(pictures / "samples.npz")["arr_0"]
    np.savez(pictures / "sorted.npz", arr_0=samples[np.argsort(samples.mean((1, 2, 3)))])
    mixed, ordered = (measured(pictures / f"{name}.npz", pictures / "real.npz", extractor) for name in ("samples", "sorted"))
    assert ordered["fid_60"] == pytest.approx(mixed["fid_60"], rel=1e-6)
    assert 0.4 < ordered["fid_60_error"] / mixed["fid_60_error"] < 2.5


def test_a_reference_of_too_few_pictures_is_refused(pictures: Path, extractor: Extractor, tmp_path: Path) -> None:
    few = tmp_path / "few.npz"
    np.savez(few, arr_0=blobs(8, 3))
    for samples, reference in [(pictures / "samples.npz", few), (few, pictures / "real.npz")]:
        with pytest.raises(UserError, match=r"few.npz: 8 pictures are too few .* of 8 features: expected at least 9"):
            measured(samples, reference, extractor)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ("none.npz", "there is no {}/none.npz (did you mean 'text.npz'?)"),
        ("none", "there is no {}/none"),
        ("none.tar", "there is no {}/none.tar"),
        ("text.npz", "text.npz cannot be read as an .npz: File is not a zip file"),
        ("damaged.npz", "damaged.npz: cannot be read: Bad CRC-32"),
        ("samples.tar.gz", "samples.tar.gz: expected an .npz, a folder of images or a .tar that is not compressed"),
        ("damaged", "0.png cannot be read (it is in none of the formats that are read)"),
    ],
)
def test_the_command_names_what_it_cannot_measure_in_its_own_words(
    samples: str, words: str, pictures: Path, extractor: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inception, 95 MB, is loaded after both were opened. A sweep's settings are not the command's."""
    (tmp_path / "text.npz").write_text("x")
    (tmp_path / "samples.tar.gz").write_bytes(b"x")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/0.png").write_bytes(b"x")
    archive = bytearray((pictures / "samples.npz").read_bytes())
    archive[len(archive) // 2] ^= 1
    (tmp_path / "damaged.npz").write_bytes(archive)
    loaded = list[object]()

    class Net(torch.nn.Module):
        def __init__(self, weights: object) -> None:
            super().__init__()
            loaded.append(weights)

        def forward(self, x: torch.Tensor) -> object:
            return extractor.net(x)

    monkeypatch.setattr("dis_scale.evaluation.inception.load", Net)
    code, output = invoke("measure", str(tmp_path / samples), str(pictures / "real.npz"))
    assert code, output
    assert words.format(tmp_path) in " ".join(output.split()), output
    assert "Traceback" not in output
    assert "--set" not in output
    assert bool(loaded) == (samples == "damaged.npz"), "its header is intact"
    code, output = invoke("measure", str(pictures / "samples.npz"), str(tmp_path / "none.npz"))
    assert f"there is no {tmp_path}/none.npz" in output
