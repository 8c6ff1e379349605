"""Speed of reading latents, compared with WebDataset in the same run: `python -m benchmarks.reader [rounds]`.

Prints one JSON line per row, then a table. A job is one epoch of 8,192 shuffled samples of Stable Diffusion's shape in batches of
64, from opening the set to the last batch; nothing is cached. A sample is the label and the moments of the image or of its
horizontal flip. All jobs run in turn, round after round; medians count, and ratios are taken within a round. Ours checks each
shard's sha256, the peer checks nothing. The peer's result is the better of no worker and two worker processes. Each job has a
process of its own: the peer's workers are forked, and a fork breaks the S3 connections of the process that it copies.
"""

import contextlib
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader

from benchmarks import bringup
from benchmarks.rows import verdict
from dis_scale.data import shards
from dis_scale.data.latents import SWITCH_S, Latents, micro_batch
from dis_scale.data.shards import Sample
from dis_scale.storage.folder import Folder, open_folder
from ops.drills import object_store
from tests.support.documents import made_from

SHARDS, SHARD, BATCH = 16, 512, 64
SHAPE = (2, 8, 32, 32)
"""Moments of Stable Diffusion's latents at 256 pixels."""
Job = Callable[[], int]


def make(at: Folder) -> Folder:
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        moments = rng.standard_normal((SHARD, *SHAPE), np.float32).astype(np.float16)
        first = number * SHARD
        shards.put_shard(at, number, [Sample(first + i, f"{i}", i % 10, m) for i, m in enumerate(moments)], [])
    shards.write_manifest(at, range(SHARDS), made_from(latent=(SHAPE[1] // 2, SHAPE[-1])))
    return at


def ours(at: Folder) -> int:
    return epoch(Latents(at, 0))


def epoch(latents: Latents) -> int:
    total, rng = latents.order.total, np.random.default_rng(0)
    for first in range(0, total, BATCH):
        moments, labels = latents.read(np.arange(first, first + BATCH), rng.integers(0, 2, BATCH))
        torch.from_numpy(moments), torch.from_numpy(labels)
    return total


def from_memory(at: Folder) -> int:
    return epoch(kept(at))


kept = cache(partial(Latents, seed=0, keep_all=True))


def micro_batches(at: Folder) -> int:
    """Micro-batches as in training, including posterior samples and noise."""
    latents = Latents(at, 0)
    for step in range(latents.order.total // BATCH):
        micro_batch(latents, step, 0, batch=BATCH, lanes=1, seed=0, flip=True, label_dropout=0.1)
    return latents.order.total


def beside_python(at: Folder, switch_s: float) -> int:
    """Micro-batches while another thread runs Python without a pause, which is harsher than a step: its operators let others in."""
    sys.setswitchinterval(switch_s)
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(micro_batches, at)
        while not made.done():
            sum(range(100))
    return made.result()


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
    pipeline, start = webdataset_pipeline(at), "fork" if workers else None
    loader = DataLoader(pipeline, BATCH, num_workers=workers, collate_fn=collated, multiprocessing_context=start)
    return sum(len(labels) for _, labels in loader)


def jobs(at: Path, bucket: str | None) -> dict[str, Job]:
    """Jobs by name. Alternatives of the peer differ only after the last comma."""
    made = make(open_folder(at / "latents"))
    result: dict[str, Job] = {"memory, ours": partial(from_memory, made), "disk, ours with all draws": partial(micro_batches, made)}
    for switch_s in (5e-3, SWITCH_S):
        result[f"disk, ours with all draws beside Python, turns of {1e3 * switch_s:g} ms"] = partial(beside_python, made, switch_s)
    stores = {"disk": made}
    if bucket:
        stores["s3"] = open_folder(bucket) / "latents"
        for path in (at / "latents").iterdir():
            stores["s3"].write(path.name, path.read_bytes())
    for name, store in stores.items():
        result[f"{name}, ours"] = partial(ours, store)
        for workers in (0, 2):
            result[f"{name}, WebDataset, {workers} workers"] = partial(webdataset, store, workers)
    return result


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


def seconds(job: Job) -> tuple[int, float]:
    began = time.perf_counter()
    return job(), time.perf_counter() - began


def measured(at: Path, bucket: str | None, rounds: int) -> dict[str, list[float]]:
    """Samples/s of each job by round, after one that does not count."""
    speeds: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        spawned = partial(ProcessPoolExecutor, 1, get_context("spawn"))
        todo = {name: (stack.enter_context(spawned()), job) for name, job in jobs(at, bucket).items()}
        for _ in range(1 + rounds):
            for name, (process, job) in todo.items():
                samples, took_s = process.submit(seconds, job).result()
                speeds.setdefault(name, []).append(samples / took_s)
    return {name: rates[1:] for name, rates in speeds.items()}


def compared(speeds: dict[str, list[float]], ours: str, peer: str) -> tuple[float, float]:
    """Samples/s of the peer's better alternative, and the ratio of ours to it (medians)."""
    ways = {name: statistics.median(rates) for name, rates in speeds.items() if name.startswith(peer)}
    best = max(ways, key=ways.__getitem__)
    return ways[best], statistics.median(a / b for a, b in zip(speeds[ours], speeds[best], strict=True))


def main(rounds: int) -> None:
    at = Path(tempfile.mkdtemp(prefix="reader-"))
    try:
        with store() as bucket:
            speeds = measured(at, bucket, rounds)
    finally:
        shutil.rmtree(at)
    for name, rates in speeds.items():
        rate = statistics.median(rates)
        print(json.dumps({
            "name": name, "samples_per_s": rate, "mb_per_s": rate * 2 * int(np.prod(SHAPE)) / 1e6,
            "least": min(rates), "most": max(rates),
        }))  # fmt: skip
    print(f"\n{'':60} {'ours/s':>10} {'peer/s':>10} {'ratio':>7}  goal")
    for mine, peer in ((f"{store}, ours", f"{store}, WebDataset") for store in ("disk", "s3")):
        if mine in speeds:
            rate, (peer_rate, ratio) = statistics.median(speeds[mine]), compared(speeds, mine, peer)
            print(
                f"{f'{mine}, against WebDataset':60}"
                f" {rate:10,.0f} {peer_rate:10,.0f} {ratio:7.2f}  {verdict(ratio, 1, at_least=True)}"
            )


if __name__ == "__main__":
    main(bringup.rounds(__doc__, 5))
