"""Speed of reading latents, compared with peers in the same run: `python -m benchmarks.reader [rounds]`.

Prints one JSON line per row, then a table. A job is one epoch of 8,192 shuffled samples of Stable Diffusion's shape in batches of
64, from opening the set to the last batch; nothing is cached. A sample is the label and the moments of the image or of its
horizontal flip. All jobs run in turn, round after round; medians count, and ratios are taken within a round. Ours checks each
shard's sha256, the peers check nothing. A peer's result is the better of no worker and two worker processes.

MosaicML Streaming 0.13 requires numpy below 2.2, which conflicts with our pin, so it is not an extra of this package. Without
it, its rows read "not installed". It still runs in a copy of the environment:

    pip install --no-deps mosaicml-streaming==0.13.0 xxhash zstd python-snappy cramjam Brotli catalogue paramiko s3transfer \\
        boto3==1.43.117 "transformers<5" "huggingface_hub<1" "tokenizers<0.23"
"""

import contextlib
import importlib.util
import io
import itertools
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader

from benchmarks.rows import verdict
from dis_scale import diffusion, models
from dis_scale.data import shards
from dis_scale.data.cache import Cache
from dis_scale.data.latents import Latents, micro_batch
from dis_scale.data.shards import Sample
from dis_scale.recipe import LatentShape, Recipe, reading
from dis_scale.storage.folder import Folder, open_folder
from ops.drills import object_store

SHARDS, SHARD, BATCH = 16, 512, 64
SHAPE, SMALL = (2, 8, 32, 32), (2, 8, 8, 8)
"""Moments of Stable Diffusion's latents at 256 pixels, and of the embedded example's."""
STEP = "the fastest training step"
DIGITS = Path(__file__).parent.parent / "configs/digits.yaml"
Job = Callable[[], int]


def make(at: Folder, shape: tuple[int, ...]) -> Folder:
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        moments = rng.standard_normal((SHARD, *shape), np.float32).astype(np.float16)
        first = number * SHARD
        shards.put_shard(at, number, [Sample(first + i, f"{i}", i % 10, m) for i, m in enumerate(moments)], [])
    facts = {"vae": "v", "scale": 1.0, "shift": 0.0, "latent": [shape[1] // 2, shape[-1]], "num_classes": 10}
    shards.write_manifest(at, range(SHARDS), facts)
    return at


def ours(at: Folder, cache: Cache | None = None) -> int:
    latents, rng = Latents(at, 0, cache=cache), np.random.default_rng(0)
    return epoch(latents, rng)


def epoch(latents: Latents, rng: np.random.Generator) -> int:
    total = latents.order.total
    for first in range(0, total, BATCH):
        moments, labels = latents.read(np.arange(first, first + BATCH), rng.integers(0, 2, BATCH))
        torch.from_numpy(moments), torch.from_numpy(labels)
    return total


def micro_batches(at: Folder) -> int:
    """Micro-batches as in training, including posterior samples and noise."""
    latents = Latents(at, 0)
    for step in range(latents.order.total // BATCH):
        micro_batch(latents, step, 0, batch=BATCH, lanes=1, seed=0, flip=True, label_dropout=0.1)
    return latents.order.total


def collated(samples: Iterable[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    moments, labels = zip(*samples, strict=True)
    sides = np.random.randint(0, 2, len(labels))
    chosen = np.stack([m[side] for m, side in zip(moments, sides, strict=True)])
    return torch.from_numpy(chosen), torch.tensor(labels)


def webdataset_pipeline(at: Folder) -> Any:
    """As in its documentation. Our storage reads each shard at once, since WebDataset cannot read `s3://`."""

    def opened(urls: Iterator[dict[str, str]]) -> Iterator[dict[str, Any]]:
        for url in urls:
            yield url | {"stream": io.BytesIO(at.read(url["url"]))}

    return wds.DataPipeline(
        wds.SimpleShardList([f"{shards.shard_name(n)}.tar" for n in range(SHARDS)]), wds.split_by_worker,
        wds.shuffle(100), opened, wds.tariterators.tar_file_expander, wds.tariterators.group_by_keys, wds.shuffle(1000),
        wds.decode(), wds.to_tuple("moments.npy", "json"), wds.map(lambda pair: (pair[0], pair[1]["label"])),
    )  # fmt: skip


def webdataset(at: Folder, workers: int) -> int:
    return drained(DataLoader(webdataset_pipeline(at), BATCH, num_workers=workers, collate_fn=collated))


def drained(loader: Iterable[Any]) -> int:
    return sum(len(labels) for _, labels in loader)


def write_streaming(at: Path) -> None:
    from streaming import MDSWriter

    latents = Latents(open_folder(at / "latents"), 0, keep_all=True)
    columns = {"moments": f"ndarray:float16:{','.join(map(str, SHAPE))}", "label": "int"}
    with MDSWriter(out=str(at / "mds"), columns=columns, size_limit=SHARD * 2 * int(np.prod(SHAPE))) as writer:
        for first in range(0, latents.order.total, BATCH):
            sides = [
                latents.read(np.arange(first, first + BATCH), np.full(BATCH, side, dtype=np.int64)) for side in (0, 1)
            ]
            for image, mirror, label in zip(sides[0][0], sides[1][0], sides[0][1], strict=True):
                writer.write({"moments": np.stack([image, mirror]), "label": int(label)})


def streaming(at: str, workers: int) -> int:
    """With its own shuffle (py1e) and loader; local copies in a new folder if `at` is remote."""
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as local:
        place = {"remote": at, "local": local} if "://" in at else {"local": at}
        data = StreamingDataset(**place, shuffle=True, batch_size=BATCH)
        loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=as_pairs)
        return drained(loader)


def as_pairs(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    return collated((sample["moments"], sample["label"]) for sample in samples)


def training_step() -> tuple[str, float]:
    """The fastest model of the embedded example: name and images/s of forward, backward and AdamW, with its batch and threads."""
    recipe = reading.load(DIGITS)
    found = {name: images_per_s(recipe, name) for name in recipe.models}
    name = max(found, key=found.__getitem__)
    return name, found[name]


def images_per_s(recipe: Recipe, name: str, least_s: float = 1.0) -> float:
    shape, n = LatentShape(SMALL[1] // 2, SMALL[-1]), recipe.train.lane_images
    model = models.build(recipe.models[name], shape, 10, scan="auto", checkpointing="none", seed=0)
    process, optimizer = diffusion.build(recipe.diffusion), torch.optim.AdamW(model.parameters(), fused=True)
    x, noise, y = torch.randn(n, *shape[:1], shape.size, shape.size), torch.randn(n, 4, 8, 8), torch.zeros(n).long()
    t_B = process.sample_times(np.random.default_rng(0), n)

    def step() -> None:
        process.losses(lambda x_BCHW, t: model(x_BCHW, t, y), x, t_B, noise).total.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() < began + least_s:
        step()
        steps += 1
    return n * steps / (time.perf_counter() - began)


def jobs(at: Path, bucket: str | None) -> dict[str, Job]:
    """Jobs by name. Alternatives of one peer differ only after the last comma."""
    made, small = make(open_folder(at / "latents"), SHAPE), make(open_folder(at / "small"), SMALL)
    kept = Latents(made, 0, keep_all=True)
    has_streaming = importlib.util.find_spec("streaming") is not None
    result: dict[str, Job] = {
        "disk, ours": partial(ours, made),
        "disk, ours with all draws": partial(micro_batches, made),
        "memory, ours": partial(epoch, kept, np.random.default_rng(0)),
        "small, ours": partial(ours, small),
        "small, ours with all draws": partial(micro_batches, small),
    }
    for workers in (0, 2):
        result[f"disk, WebDataset, {workers} workers"] = partial(webdataset, made, workers)
    if has_streaming:
        write_streaming(at)
        for workers in (0, 2):
            result[f"disk, Streaming, {workers} workers"] = partial(streaming, str(at / "mds"), workers)
    if bucket:
        remote = open_folder(bucket) / "latents"
        copy(at / "latents", remote)
        cache = Cache(at / "cache", 2**40, print)
        result["s3, ours"] = partial(ours, remote)
        result["cache, ours"] = partial(ours, remote, cache)
        for workers in (0, 2):
            result[f"s3, WebDataset, {workers} workers"] = partial(webdataset, remote, workers)
        if has_streaming:
            copy(at / "mds", open_folder(bucket) / "mds")
            for workers in (0, 2):
                result[f"s3, Streaming, {workers} workers"] = partial(streaming, f"{bucket}/mds", workers)
    return result


def copy(source: Path, to: Folder) -> None:
    for path in source.iterdir():
        to.write(path.name, path.read_bytes())


@contextlib.contextmanager
def store() -> Iterator[str | None]:
    """A bucket of Ceph's gateway, as in the tests; None if it is not installed."""
    if object_store.missing():
        yield None
        return
    running = object_store.ObjectStore().start()
    os.environ.update(running.environment | {"S3_ENDPOINT_URL": running.environment["AWS_ENDPOINT_URL"]})
    try:
        yield object_store.make_bucket(running, "reader")
    finally:
        running.stop()


def measured(at: Path, bucket: str | None, rounds: int) -> tuple[dict[str, list[float]], str]:
    """Samples/s of each job by round, and the name of the model with the fastest step."""
    todo, step = jobs(at, bucket), ""
    speeds: dict[str, list[float]] = {name: [] for name in [*todo, STEP]}
    for name, job in todo.items():
        speed_of(name, job)
    for _ in range(rounds):
        for name, job in todo.items():
            speeds[name] += speed_of(name, job)
        step, speed = training_step()
        speeds[STEP].append(speed)
    return speeds, step


def speed_of(name: str, job: Job) -> list[float]:
    """Samples/s; empty if a peer fails, which is printed: Streaming's workers sometimes collide in their downloads."""
    began = time.perf_counter()
    try:
        return [job() / (time.perf_counter() - began)]
    except Exception as error:
        if "ours" in name:
            raise
        print(json.dumps({"name": name, "failed": str(error).strip().splitlines()[-1]}))
        return []


def compared(speeds: dict[str, list[float]], ours: str, peer: str) -> tuple[float, float] | None:
    """Samples/s of the peer's better alternative, and the ratio of ours to it (medians); None if not measured."""
    ways = {name: statistics.median(rates) for name, rates in speeds.items() if name.startswith(peer) and rates}
    if not ways or ours not in speeds:
        return None
    best = max(ways, key=ways.__getitem__)
    return ways[best], statistics.median(a / b for a, b in zip(speeds[ours], speeds[best], strict=False))


def main(rounds: int = 5) -> None:
    logging.disable(logging.ERROR)  # forked workers close connections that they did not open, and asyncio logs errors
    at = Path(tempfile.mkdtemp(prefix="reader-"))
    try:
        with store() as bucket:
            speeds, step = measured(at, bucket, rounds)
    finally:
        shutil.rmtree(at)
    for name, rates in speeds.items():
        if not rates:
            continue
        shape = SMALL if "small" in name or name == STEP else SHAPE
        rate = statistics.median(rates)
        print(json.dumps({
            "name": name, "samples_per_s": rate, "mb_per_s": rate * 2 * int(np.prod(shape)) / 1e6,
            "least": min(rates), "most": max(rates),
        }))  # fmt: skip
    print(f"\n{'':60} {'ours/s':>10} {'peer/s':>10} {'ratio':>7}  goal   (fastest step: {step})")
    rows = [
        (f"{where}, ours", f"{where}, {peer}", 1.0)
        for where, peer in itertools.product(("disk", "s3"), ("WebDataset", "Streaming"))
    ]
    for mine, peer, goal in [*rows, ("small, ours", STEP, 10.0), ("small, ours with all draws", STEP, 10.0)]:
        label = f"{mine}, against {peer.rpartition(', ')[2]}"[:60]
        if result := compared(speeds, mine, peer):
            rate, (peer_rate, ratio) = statistics.median(speeds[mine]), result
            print(f"{label:60} {rate:10,.0f} {peer_rate:10,.0f} {ratio:7.2f}  {verdict(ratio, goal, True)}")
        else:
            print(f"{label:60} not installed")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
