"""Speed of the metrics of images, compared with torch-fidelity's own loop: `python -m benchmarks.evaluate [images] [rounds]`.

Prints one JSON line per row, then a table. Both sides run in turn on the same images; the least time of each counts. Weights
are random from a seed, in the published file's layout; their values do not affect the time. Goals are ratios, so that they
hold on other machines.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from benchmarks.rows import Job, verdict
from dis_scale.evaluation import kernel, neighbours, score
from dis_scale.evaluation.features import Extractor
from dis_scale.evaluation.inception import CLASSES, Inception
from dis_scale.evaluation.metrics import Frechet, Groups, fit, frechet

SIZE, FEATURES = 64, 512  # pixels per side; features in the rows of the metrics: 2,048 would take minutes
WIDE = 2200  # samples in the rows without a network


class Row(NamedTuple):
    """A comparison; `ratio` is the peer's time divided by ours, larger is better."""

    name: str
    job: str
    peer: str
    goal: float | None


ROWS = [
    Row("images to FID's features and IS, both sets", "extraction", "extraction, torch-fidelity", 1),
    Row(f"distance of {FEATURES} features", "distance", "distance, torch-fidelity", 1),
    Row(f"distance and its jackknife of {FEATURES} features", "jackknife", "distance, torch-fidelity", None),
    Row(f"KID of {FEATURES} features", "kid", "kid, torch-fidelity", 1),
    Row(f"precision and recall of {FEATURES} features", "neighbours", "neighbours, torch-fidelity", 1),
]


class Images(TensorDataset):
    def __getitem__(self, i: int) -> Tensor:
        return super().__getitem__(i)[0]


def seeded_weights() -> dict[str, Tensor]:
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"), mock.patch("torch.load"):
        return FeatureExtractorInceptionV3("any", ["2048"], feature_extractor_weights_path="none").state_dict()


def ours(path: Path, a: np.ndarray, b: np.ndarray) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = Extractor("inception", "seeded", Inception(torch.load(path, weights_only=True)).to(device), device)
    generated, real = net(a), net(b)
    splits = score.Score(score.shuffled_splits(len(a)), CLASSES)
    assert generated.logits is not None
    splits.add(generated.logits)
    splits.result()
    frechet(fit(generated.pooled[:, :64]), fit(real.pooled[:, :64]))


def theirs(path: Path, a: np.ndarray, b: np.ndarray) -> None:
    inputs = [Images(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())) for x in (a, b)]
    calculate_metrics(
        input1=inputs[0], input2=inputs[1], isc=True, fid=True, kid=False, cuda=torch.cuda.is_available(), verbose=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(path), feature_layer_fid="64",
    )  # fmt: skip


def extraction(images: int, scratch: Path) -> dict[str, Job]:
    """Both load the weights. Ours also computes sFID's spatial features in the same pass."""
    path = scratch / "seeded.pth"
    torch.save(seeded_weights(), path)
    a, b = np.random.default_rng(0).integers(0, 256, (2, images, SIZE, SIZE, 3), dtype=np.uint8)
    return {
        "extraction": lambda: ours(path, a, b),
        "extraction, torch-fidelity": lambda: theirs(path, a, b),
    }


def metrics() -> dict[str, Job]:
    rng = np.random.default_rng(0)
    a, b = (np.maximum(rng.standard_normal((WIDE, FEATURES)) + m, 0).astype(np.float32) for m in (0.0, 0.1))
    x, y = torch.from_numpy(a), torch.from_numpy(b)

    def jackknife() -> None:
        groups = Groups(WIDE)
        groups.add(a)
        groups.distance(Frechet(fit(b)))

    def distance() -> None:
        fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), verbose=False)

    return {
        "distance": lambda: frechet(fit(a), fit(b)),
        "distance, torch-fidelity": distance,
        "jackknife": jackknife,
        "kid": lambda: kernel.kid(a, b),
        "kid, torch-fidelity": lambda: kid_features_to_metric(x, y, verbose=False),
        "neighbours": lambda: neighbours.precision_recall(a, b),
        "neighbours, torch-fidelity": lambda: prc_features_to_metric(x, y, verbose=False, save_cpu_ram=True),
    }


def least_times(jobs: dict[str, Job], rounds: int) -> dict[str, float]:
    """Least time of each job, in seconds."""
    least = dict.fromkeys(jobs, float("inf"))
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def main(images: int = 128, rounds: int = 3) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(json.dumps({"device": device, "threads": torch.get_num_threads(), "images": 2 * images, "pixels": SIZE}))
    with tempfile.TemporaryDirectory() as scratch:
        least = least_times(extraction(images, Path(scratch)) | metrics(), rounds)
    table = []
    for row in ROWS:
        ours_s, peer_s = least[row.job], least[row.peer]
        ratio = peer_s / ours_s
        print(json.dumps({**row._asdict(), "s": ours_s, "peer_s": peer_s, "ratio": ratio}))
        table.append((row.name, ours_s, peer_s, ratio, verdict(ratio, row.goal, True)))
    print(f"\n{'':50} {'s':>9} {'peer s':>9} {'ratio':>8}  goal")
    for name, ours_s, peer_s, ratio, met in table:
        print(f"{name:50} {ours_s:9.3f} {peer_s:9.3f} {ratio:8.2f}  {met}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
