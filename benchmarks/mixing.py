"""Time and memory of mixing parts into shards: `python -m benchmarks.mixing [images] [size] [posterior] [workers]`.

Encoded parts of random moments are made first. Then workers, each a process, mix their groups and delete the tars of each group, so
the disk holds the parts and a group of each worker. Latents are 4 x size x size; `posterior` 1 adds log-variances. Prints a JSON
line for each worker, which compares the first and the last shard of each group with the mixed order.
"""

import json
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from dis_scale.data import shards, staging
from dis_scale.data.shards import EncodedShard, Sample
from dis_scale.data.staging import MixedOrder, Mixing
from dis_scale.recipe import LatentShape, Precompute
from dis_scale.storage.folder import Folder, open_folder


def make_parts(latents: Folder, mixer: MixedOrder) -> None:
    drawn = np.random.default_rng(0).standard_normal((1024, *mixer.moments_shape), np.float32).astype(np.float16)
    for part in mixer.parts:
        encoded = []
        for shard in mixer.shards_of(part):
            positions = shards.shard_positions(shard, mixer.images, mixer.settings)
            facts = [(n, f"n{n // 1300:08d}/n_{n}.JPEG", n // 1300, drawn[n % 1024]) for n in positions]
            encoded.append(EncodedShard(shard, [Sample(*each, mixer.posterior) for each in facts], []))
        staging.put_part(latents, mixer, part, encoded)


def mix(latents: Folder, mixer: MixedOrder, groups: list[int]) -> dict[str, float]:
    """Mix these groups; return seconds, CPU seconds and the most memory of the process."""
    began, size, seconds = time.perf_counter(), mixer.settings.shard_images, 0.0
    mixing = Mixing(latents, mixer, lambda _: None)
    for group in groups:
        mixing.mix(group)
        seconds, places = seconds + time.perf_counter() - began, mixer.group(group)
        for number in {places.start // size, (places.stop - 1) // size}:
            name = f"{shards.shard_name(number)}.tar"
            entries = mixer.order[number * size : (number + 1) * size].astype(np.int64)
            np.testing.assert_array_equal(shards.unpack(latents.read(name), name).labels, entries // 1300)
        for number in range(places.start // size, -(-places.stop // size)):
            latents.delete(f"{shards.shard_name(number)}.tar")
        began = time.perf_counter()
    used, images = resource.getrusage(resource.RUSAGE_SELF), sum(len(mixer.group(group)) for group in groups)
    gib = {"peak_gib": used.ru_maxrss / 2**20, "bound_gib": mixer.memory_bytes / 2**30}
    return {"images": images, "seconds": seconds, "user_s": used.ru_utime, "system_s": used.ru_stime} | gib


def main(images: int = 65_536, size: int = 32, posterior: int = 1, workers: int = 2) -> None:
    mixer = MixedOrder(images, Precompute(), LatentShape(4, size), bool(posterior))
    with tempfile.TemporaryDirectory() as scratch:
        latents, began = open_folder(scratch), time.perf_counter()
        make_parts(latents, mixer)
        print(json.dumps({"parts": len(mixer.parts), "groups": len(mixer.groups), "s": time.perf_counter() - began}))
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for done in [pool.submit(mix, latents, mixer, list(mixer.groups)[n::workers]) for n in range(workers)]:
                print(json.dumps(done.result()), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
