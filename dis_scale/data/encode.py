"""Images to latent shards: threads read and decode ahead, the VAE encodes, a thread puts what is done.

What a shard holds does not depend on who makes it: encode batches have a fixed size, are cut at shard borders, the last is padded.
Threads, since Pillow and PyTorch leave Python's lock while they work and images need no copy: benchmarks/precompute.py measures
them against processes, Ray tasks and Ray Data, docs/data.md has the figures. Read next: shards.py, pipelines/precompute.py.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import torch

from dis_scale.data import shards
from dis_scale.data.shards import Sample
from dis_scale.data.sources import Source
from dis_scale.data.threads import in_order
from dis_scale.errors import DisScaleError, UndecodableImage, UserError
from dis_scale.recipe import Recipe
from dis_scale.storage import Folder
from dis_scale.vae import Vae

HARDWARE = "hardware.json"
STRETCH = 16
"""Images that one thread reads and decodes at a time, at most."""


@dataclass(frozen=True)
class Setup:
    """What encoding needs: the images, the VAE on its device, and how the recipe cuts them."""

    source: Source
    vae: Vae
    recipe: Recipe

    @property
    def numbers(self) -> range:
        """The numbers of all shards."""
        return range(-(-len(self.source) // self.recipe.precompute.shard_images))

    def positions(self, number: int) -> range:
        """The images of a shard."""
        size = self.recipe.precompute.shard_images
        return range(number * size, min((number + 1) * size, len(self.source)))


class Made(NamedTuple):
    """A shard's content: samples, and the names of the images that were skipped."""

    number: int
    samples: list[Sample]
    refused: list[str]


class _Stretch(NamedTuple):
    number: int
    positions: range
    images: list[np.ndarray | UndecodableImage]


def compute_exactly() -> None:
    """One thread for PyTorch and no TF32: the same sums whoever encodes."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def require_same_hardware(latents: Folder, device: str) -> None:
    """UserError where another kind of hardware than this worker's began the set: its sums, and so its bytes, would differ."""
    ours = torch.cuda.get_device_name() if device == "cuda" else f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    latents.create(HARDWARE, json.dumps(ours).encode())
    if (theirs := latents.read_json(HARDWARE)) != ours:
        raise UserError(
            f"{latents}: begun on {theirs!r}, this worker has {ours!r}: finish it on one kind, or use another root"
        )


def put_shards(setup: Setup, latents: Folder, numbers: Iterable[int], report: Callable[[int], None]) -> None:
    """Makes and puts the shards of these numbers, which are taken from the iterable as decoding gets to them.

    `report` gets the images done since it was last called, after each encode batch; an exception of its own ends the work.
    UndecodableImage where the recipe refuses.
    """
    with ThreadPoolExecutor(1, "put") as pool:
        putting: Future[None] | None = None
        for made in make(setup, numbers, report):
            if putting:
                putting.result()
            putting = pool.submit(shards.put_shard, latents, *made)
        if putting:
            putting.result()


def make(setup: Setup, numbers: Iterable[int], report: Callable[[int], None]) -> Iterator[Made]:
    """The shards of these numbers, in their order."""
    for number, stretches in groupby(_decoded(setup, numbers), key=lambda stretch: stretch.number):
        refused: list[str] = []
        samples = _encoded(setup, _sound(setup, stretches, refused, report), report)
        yield Made(number, samples, refused)


def _decoded(setup: Setup, numbers: Iterable[int]) -> Iterator[_Stretch]:
    """The shards' images, read and decoded ahead in threads."""
    settings = setup.recipe

    def work(stretch: tuple[int, range]) -> _Stretch:
        number, positions = stretch
        return _Stretch(number, positions, setup.source.decoded(positions, settings.data.resolution))

    stretches = (
        (number, part) for number in numbers for part in setup.source.stretches(setup.positions(number), STRETCH)
    )
    return in_order(stretches, work, settings.precompute.decoders)


def _sound(
    setup: Setup, stretches: Iterable[_Stretch], refused: list[str], report: Callable[[int], None]
) -> Iterator[tuple[int, np.ndarray]]:
    """(position, pixels) of what is an image; the names of the others go to `refused`, or the first is raised."""
    for stretch in stretches:
        for position, image in zip(stretch.positions, stretch.images, strict=True):
            if not isinstance(image, UndecodableImage):
                yield position, image
            elif setup.recipe.data.undecodable == "refuse":
                raise image
            else:
                refused.append(setup.source.names[position])
                report(1)


def _encoded(setup: Setup, images: Iterator[tuple[int, np.ndarray]], report: Callable[[int], None]) -> list[Sample]:
    size, samples = setup.recipe.precompute.encode_images, list[Sample]()
    while batch := list(islice(images, size)):
        positions, pixels = zip(*batch, strict=True)
        moments = encode(setup.vae, np.stack(pixels), size)
        for position, one in zip(positions, moments, strict=True):
            if not np.isfinite(one).all():
                raise DisScaleError(
                    f"latents of image {setup.source.names[position]} are not finite in float16: is this its VAE?"
                )
            entry = setup.source.listing[position]
            samples.append(Sample(position, entry.name, int(entry.label), one))
        report(len(batch))
    return samples


def encode(vae: Vae, pixels_BHWC: np.ndarray, size: int) -> np.ndarray:
    """Moments float16 (B, 2, 2C, h, w) of up to `size` images and their mirror images; the batch is padded to `size`."""
    padding = np.repeat(pixels_BHWC[-1:], size - len(pixels_BHWC), axis=0)
    padded = np.concatenate([pixels_BHWC, padding])
    sides = [vae.encode(side).half().cpu().numpy() for side in (padded, padded[:, :, ::-1])]
    return np.stack(sides, axis=1)[: len(pixels_BHWC)]
