"""Speed of precompute, compared with the VAE alone and other ways to decode ahead: `python -m benchmarks.precompute [rounds]`.

Prints one JSON line per row, then a table. The baseline is the VAE on decoded tensors. Every way gets the same JPEGs of
ImageNet's size and one thread for the VAE. Ours includes packing and writing shards; the peers only pass decoded batches to the
VAE. All are timed in turn, round after round. The least time of each counts, since other work can only add time.
"""

import functools
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from benchmarks.rows import Job, least_times, verdict
from dis_scale import vae
from dis_scale.data import images
from dis_scale.data.encode import READ_IMAGES, Setup, compute_exactly, encode_images, put_shards
from dis_scale.data.shards import shard_numbers
from dis_scale.data.sources import open_source
from dis_scale.process.threads import in_order
from dis_scale.recipe import Recipe, TrainedVae, reading
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.vae import DiffusersVae

IMAGES, CLASSES, RESOLUTION, BATCH = 192, 2, 64, 32
WIDTHS = (32, 64, 64)
"""Widths of a VAE that needs about four times as long for an image and its horizontal flip as one core needs to decode it."""
GOAL = 0.9
EMBEDDED = Path(__file__).parent.parent / "configs" / "digits.yaml"


def photos(root: Folder) -> None:
    """Write JPEGs of 500 x 375 pixels and about 80 kB: smooth shapes and a little noise."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        shapes = Image.fromarray(rng.integers(0, 255, (47, 63, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(shapes).astype(int) + rng.integers(-12, 12, (375, 500, 3))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        root.write(f"{'ab'[i % CLASSES]}/{i:04d}.jpg", buffer.getvalue())


def recipe_for(root: Folder) -> Recipe:
    settings = [
        f"data.source={{kind: folder, url: {root}}}", f"data.num_classes={CLASSES}", f"data.resolution={RESOLUTION}",
        "precompute={shard_images: 64, encode_images: 32, decoders: 2}",  # BATCH
    ]  # fmt: skip
    return reading.load(EMBEDDED, settings)


def read_and_decode(root: Folder, names: list[str]) -> np.ndarray:
    return np.stack([images.decode(root.read(name), name, RESOLUTION) for name in names])


def chunks(names: list[str], size: int) -> list[list[str]]:
    return [names[i : i + size] for i in range(0, len(names), size)]


def feed(encoder: DiffusersVae, batch: int, pieces: Iterator[np.ndarray]) -> None:
    """Encodes what comes in batches of `batch`."""
    waiting: list[np.ndarray] = []
    for piece in pieces:
        waiting.append(piece)
        if sum(map(len, waiting)) >= batch:
            encode_images(encoder, np.concatenate(waiting), batch)
            waiting = []


def alone(encoder: DiffusersVae, decoded: np.ndarray, batch: int) -> None:
    for i in range(0, len(decoded), batch):
        encode_images(encoder, decoded[i : i + batch], batch)


@dataclass(frozen=True)
class TimedVae(DiffusersVae):
    """A VAE that counts its seconds."""

    seconds: list[float] = field(default_factory=list)

    def encode(self, pixels_BHWC: np.ndarray) -> Tensor:
        start = time.perf_counter()
        moments = super().encode(pixels_BHWC)
        self.seconds.append(time.perf_counter() - start)
        return moments


def ours(setup: Setup, waited: list[float]) -> None:
    """Run precompute; append the share of its time in which the VAE was idle."""
    timed, start = TimedVae(setup.vae.net), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        numbers = shard_numbers(len(setup.source), setup.recipe.precompute)
        put_shards(replace(setup, vae=timed), open_folder(scratch), numbers, lambda _: None)
    waited.append(1 - sum(timed.seconds) / (time.perf_counter() - start))


def one_after_another(setup: Setup, decode: Callable[[list[str]], np.ndarray], names: list[str]) -> None:
    feed(setup.vae, BATCH, map(decode, chunks(names, READ_IMAGES)))


def threads(setup: Setup, decode: Callable[[list[str]], np.ndarray], names: list[str]) -> None:
    feed(setup.vae, BATCH, in_order(chunks(names, READ_IMAGES), decode, 2))


def processes(
    pool: ProcessPoolExecutor, setup: Setup, decode: Callable[[list[str]], np.ndarray], names: list[str]
) -> None:
    feed(setup.vae, BATCH, pool.map(decode, chunks(names, READ_IMAGES)))


def ray_tasks(setup: Setup, decode: Callable[[list[str]], np.ndarray], names: list[str]) -> None:
    import ray

    task = ray.remote(num_cpus=0.5)(read_and_decode)
    references = [task.remote(*decode.args, part) for part in chunks(names, READ_IMAGES)]  # type: ignore[attr-defined]
    feed(setup.vae, BATCH, map(ray.get, references))


def ray_data(setup: Setup, decode: Callable[[list[str]], np.ndarray], names: list[str]) -> None:
    import ray

    listed = ray.data.from_items([{"name": name} for name in names], override_num_blocks=len(names) // READ_IMAGES)
    pixels = listed.map_batches(
        lambda batch: {"pixels": decode(list(batch["name"]))}, batch_size=READ_IMAGES, num_cpus=0.5
    )
    batches = pixels.iter_batches(batch_size=BATCH, prefetch_batches=2)
    feed(setup.vae, BATCH, (batch["pixels"] for batch in batches))


def start_ray() -> None:
    import logging

    import ray

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    here = str(Path(__file__).parent.parent)
    ray.init(
        num_cpus=max(2, os.cpu_count() or 1), include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": here}},
    )  # fmt: skip
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False


def main(rounds: int = 5, which: str = "all") -> None:
    """`which`: `all`, or `ours` for the VAE alone and precompute without the peers."""
    compute_exactly()
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        root = open_folder(scratch) / "photos"
        photos(root)
        recipe = recipe_for(root)
        net = vae.new(TrainedVae(kind="trained", widths=WIDTHS), RESOLUTION).eval().requires_grad_(False)
        setup = Setup(open_source(recipe.data), DiffusersVae(net), recipe)
        names = list(setup.source.names)
        decode = functools.partial(read_and_decode, root)
        decoded = decode(names)
        waited: list[float] = []
        jobs: dict[str, Job] = {
            "VAE alone": lambda: alone(setup.vae, decoded, BATCH),
            "precompute, shards written (ours)": lambda: ours(setup, waited),
            "decoding alone, one thread": lambda: [decode(part) for part in chunks(names, READ_IMAGES)] and None,
            "nothing ahead": lambda: one_after_another(setup, decode, names),
        }
        if which == "all":
            start_ray()
            ways = {
                "threads": threads,
                "processes": functools.partial(processes, pool),
                "Ray tasks": ray_tasks,
                "Ray Data": ray_data,
            }
            jobs |= {f"{name} ahead": functools.partial(way, setup, decode, names) for name, way in ways.items()}
        show({name: IMAGES / seconds for name, seconds in least_times(jobs, rounds).items()}, min(waited))


def show(rates: dict[str, float], waited: float) -> None:
    for name, rate in rates.items():
        goal = GOAL if "ours" in name else None
        print(json.dumps({"name": name, "images_s": rate, "ratio": rate / rates["VAE alone"], "goal": goal}))
    print(json.dumps({"name": "share of precompute's time in which the VAE waits", "ratio": waited}))
    print(f"\n{'':36} {'images/s':>9} {'of the VAE alone':>17}  goal")
    for name, rate in rates.items():
        ratio = rate / rates["VAE alone"]
        print(f"{name:36} {rate:9.1f} {ratio:17.2f}  {verdict(ratio, GOAL if 'ours' in name else None, True)}")
    print(f"{'the VAE waits (ours)':36} {'':9} {waited:17.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
