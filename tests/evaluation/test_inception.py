"""Inception's features and all metrics compared with torch-fidelity; wrong weights are refused before they are opened.

Inception's input is 299 x 299 pixels. Tests with many images use 75 x 75, its minimum, on both sides, to save time.
"""

import hashlib
import threading
import urllib.request
import warnings
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from dis_scale.evaluation import inception, score
from dis_scale.evaluation import sets as whole
from dis_scale.evaluation.features import Extractor
from dis_scale.evaluation.inception import PUBLISHED, Inception, read_weights
from dis_scale.process.errors import UserError
from tests.support import seeded_inception
from tests.support.metrics import fit, frechet
from tests.support.seeded_inception import as_tensor, blobs

IMAGES, REAL_IMAGES = 205, 200
CPU = torch.device("cpu")


class Images(TensorDataset):
    def __getitem__(self, i: int) -> torch.Tensor:  # type: ignore[override]  # torch-fidelity takes images, not tuples
        return self.tensors[0][i]


@pytest.fixture
def small() -> Iterator[None]:
    with seeded_inception.of_small_images():
        yield


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    """Generated and real images with overlapping features: most generated ones are darker."""
    shade = np.linspace(0.4, 1, IMAGES)[:, None, None, None]
    return (blobs(IMAGES, 10) * shade).astype(np.uint8), blobs(REAL_IMAGES, 11)


def extractor() -> Extractor:
    return Extractor("inception", "seeded", Inception(seeded_inception.state()), CPU)


@pytest.fixture(scope="module")
def theirs(sets: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """torch-fidelity's metrics of both sets; the distance is on 192 features, fewer than the images."""
    path, _ = seeded_inception.write(tmp_path_factory.mktemp("weights"))
    with seeded_inception.of_small_images():
        found: dict[str, float] = calculate_metrics(
            input1=Images(as_tensor(sets[0])), input2=Images(as_tensor(sets[1])), cuda=False, verbose=False, isc=True,
            fid=True, kid=True, prc=True, feature_extractor="inception-v3-compat", feature_layer_fid="192",
            kid_subset_size=100, feature_extractor_weights_path=str(path), save_cpu_ram=True,
        )  # fmt: skip
    return found


def test_all_other_metrics_equal_calculate_metrics(
    sets: tuple[np.ndarray, np.ndarray], theirs: dict[str, float], small: None
) -> None:
    ours = extractor()
    generated, real = ours(sets[0]), ours(sets[1])
    splits = score.Score(score.shuffled_splits(IMAGES), inception.CLASSES)
    assert generated.logits is not None
    splits.add(generated.logits)
    mean, error = splits.result()
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert error == pytest.approx(theirs["inception_score_std"] / 3, rel=1e-4), "theirs is not divided by the root of ten splits"
    assert theirs["inception_score_mean"] > 1.5
    kid = whole.kid(generated.pooled, real.pooled, images=100)
    assert kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    shares = whole.precision_recall(generated.pooled, real.pooled)
    assert shares == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-5)
    assert all(0.05 < share < 0.95 for share in shares)


def test_the_distance_equals_calculate_metrics(sets: tuple[np.ndarray, np.ndarray], theirs: dict[str, float], small: None) -> None:
    ours = Inception(seeded_inception.state())
    ours.net.features_list = ["192"]  # more images than features
    with torch.no_grad():
        a, b = (torch.cat([ours.net(part)[0] for part in as_tensor(x).split(50)]).numpy() for x in sets)
    assert frechet(fit(a), fit(b)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)


def test_features_equal_torch_fidelity_and_spatial_ones_a_hook(tmp_path: Path) -> None:
    """At full input size; float32 sums in another memory layout."""
    path, _ = seeded_inception.write(tmp_path)
    outputs = ["2048", "logits_unbiased"]
    their = FeatureExtractorInceptionV3("inception-v3-compat", outputs, feature_extractor_weights_path=str(path))
    seen: list[torch.Tensor] = []
    their.Mixed_6d.register_forward_hook(lambda _, __, output: seen.append(output))
    pixels = blobs(3, 5, 64)
    pooled, logits = (x.numpy() for x in their(as_tensor(pixels)))
    ours = extractor()(pixels)
    np.testing.assert_allclose(ours.pooled, pooled, atol=1e-4 * pooled.std())
    assert ours.logits is not None
    np.testing.assert_allclose(ours.logits, logits, atol=1e-4 * logits.std())
    assert ours.spatial is not None
    assert ours.spatial.shape == (3, inception.SPATIAL)
    # branch1x1 comes first in the concatenation of Mixed_6d
    expected = np.stack([[[seen[0][b, :7, h, w].numpy() for w in range(17)] for h in range(17)] for b in range(3)])
    assert expected.min() == 0 < expected.std()
    np.testing.assert_allclose(ours.spatial, expected.reshape(3, -1), atol=1e-4 * expected.std())


def test_in_float64_the_features_equal_torch_fidelity_to_1e_6(tmp_path: Path, small: None) -> None:
    """So the differences above are those of float32 sums in another memory layout, and of nothing else. Theirs is a program of
    TorchScript, as the one that StyleGAN's and EDM's code loads."""
    path, _ = seeded_inception.write(tmp_path)
    outputs = ["2048", "logits_unbiased"]
    their = FeatureExtractorInceptionV3("inception-v3-compat", outputs, feature_extractor_weights_path=str(path))
    ours = Inception(seeded_inception.state()).eval()
    for net in (their, ours.net):
        net.double().feature_extractor_internal_dtype = torch.float64
    pixels = as_tensor(blobs(3, 5, 64))
    pooled, _, logits = ours(pixels)
    with warnings.catch_warnings(action="ignore"):  # it is deprecated, and so no door of ours
        scripted = torch.jit.trace(their, as_tensor(blobs(3, 6, 64)), check_trace=False)
    for our, other in zip((pooled, logits), scripted(pixels), strict=True):
        torch.testing.assert_close(our, other, rtol=0, atol=1e-6 * float(other.std()))


def test_metrics_of_equal_features_equal_torch_fidelity() -> None:
    """Many samples at default sizes, with features as skewed as Inception's."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((64, 64)) / 8
    a, b = (np.maximum(rng.standard_normal((n, 64)) @ mix + m, 0).astype(np.float32) for n, m in ((1300, 0.3), (1200, 0.2)))
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    statistics = [fid_features_to_statistics(features) for features in (x, y)]
    distance = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet(fit(a), fit(b)) == pytest.approx(distance, rel=1e-5)
    ours = score.Score(score.shuffled_splits(1300), 64)
    for part in (a[:17] * 9, a[17:] * 9):
        ours.add(part)
    assert ours.result()[0] == pytest.approx(isc_features_to_metric(x * 9)["inception_score_mean"], rel=1e-5)


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, inception.WeightsFile]:
    return seeded_inception.write(tmp_path)


def test_expected_weights_are_read(weights: tuple[Path, inception.WeightsFile]) -> None:
    path, expected = weights
    state = read_weights(str(path), expected)
    assert state.keys() == seeded_inception.state().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in seeded_inception.state().items())


def test_weights_may_be_at_a_url(weights: tuple[Path, inception.WeightsFile]) -> None:
    serve = partial(SimpleHTTPRequestHandler, directory=str(weights[0].parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert read_weights(f"{address}/{weights[0].name}", weights[1]).keys() == seeded_inception.state().keys()
        with pytest.raises(UserError, match=r"cannot read http.*none\.pth; get "):
            read_weights(f"{address}/none.pth", weights[1])
        server.shutdown()


def test_code_in_a_weights_file_is_never_run(tmp_path: Path) -> None:
    """Even if its hash is the expected one."""
    path, mark = tmp_path / "evil.pth", tmp_path / "mark"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (mark,)

    torch.save({"weight": Evil()}, path)
    data = path.read_bytes()
    with pytest.raises(UnpicklingError):
        read_weights(str(path), inception.WeightsFile("any", len(data), hashlib.sha256(data).hexdigest()))
    assert not mark.exists()


def test_other_weights_are_refused_unopened(tmp_path: Path) -> None:
    """A file that cannot be opened, of another size and of the right one."""
    (tmp_path / "w.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"not the Inception weights that FID is defined by: .*expected 95,628,359 bytes"):
        inception.load(str(tmp_path / "w.pth"))
    with pytest.raises(UserError, match="not the Inception weights that FID is defined by"):
        read_weights(str(tmp_path / "w.pth"), inception.WeightsFile("any", 10, "0" * 64))


def test_the_error_for_missing_weights_names_the_download(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot read .*none.pth; get {PUBLISHED.url} and give its path"):
        read_weights(str(tmp_path / "none.pth"))


def test_the_error_for_a_failed_download_names_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    urllib.request.install_opener(urllib.request.build_opener(urllib.request.ProxyHandler({"https": "http://127.0.0.1:9"})))
    try:
        words = f"cannot be downloaded .*Connection refused.*; get {PUBLISHED.url} and give its path as"
        with pytest.raises(UserError, match=words):
            inception.load(None)
    finally:
        urllib.request.install_opener(None)  # the next one is made again
