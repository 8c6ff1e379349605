"""Images to latent shards: threads read and decode ahead, the VAE encodes, one thread writes finished shards.

A shard's bytes do not depend on the worker: encode batches have a fixed size, end at shard borders, and the last is padded.
Threads are used because Pillow and PyTorch release Python's lock and images need no copy. benchmarks/results/data.md compares them
with processes, Ray tasks and Ray Data. Read next: shards.py, making.py, pipelines/precompute.py.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import torch

from dis_scale.data import shards, staging
from dis_scale.data.shards import EncodedShard, Sample, shard_positions
from dis_scale.data.sources import Source, on_this_node, select_decodable
from dis_scale.data.staging import MixedOrder
from dis_scale.process.errors import DisScaleError, StorageError, UndecodableImage, UserError, printable
from dis_scale.process.progress import ReportShare
from dis_scale.process.threads import batched, in_order, one_ahead
from dis_scale.recipe import Data, Precompute, Recipe
from dis_scale.storage.folder import Folder
from dis_scale.sweep.documents import Encoding, Hardware
from dis_scale.vae import Vae

READ_IMAGES = 16
"""Most images that one thread reads and decodes at a time."""
DECODERS = 16
"""Threads that read and decode ahead of the VAE: more than cores, since each waits for its reads."""


@dataclass(frozen=True)
class Setup:
    """Inputs of encoding: the source, the VAE on its device, and the recipe."""

    source: Source
    vae: Vae
    recipe: Recipe

    @cached_property
    def mixer(self) -> MixedOrder:
        """Places of the source's entries in the mixed order."""
        return MixedOrder.of(len(self.source), self.recipe.precompute, encoding_of(self.vae, self.recipe.data, ""))

    def begin(self, arrays: Sequence[np.ndarray]) -> Callable[[], Iterable[np.ndarray]]:
        """Begin to encode images (H, W, 3), or take moments of another program; return a function that waits for the moments."""
        return (lambda: arrays) if self.recipe.data.given else begin_encoding(self.vae, arrays, self.recipe.precompute)


class _DecodedRange(NamedTuple):
    """Decoded images of one read, all of one shard."""

    number: int
    positions: range
    images: list[np.ndarray | UndecodableImage]


def compute_exactly(*, rounded: bool = False) -> None:
    """Set PyTorch to one thread, and disable TF32 unless `rounded`, so that every worker computes the same sums."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rounded


@contextlib.contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 for products and convolutions in the block. PyTorch's default allows it for convolutions only."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def encoding_of(vae: Vae, data: Data, device: str) -> Encoding:
    """Return the facts of encoding with this VAE in this process, or of copying the latents that another program made with it."""
    posterior, version = vae.posterior, str(torch.__version__)
    if data.given:  # copies do not depend on PyTorch
        posterior, version = data.given.posterior, ""
    return Encoding(
        identity=vae.identity, posterior=posterior, shift=vae.shift, scale=vae.scale,
        latent=vae.latent(data.resolution), sides=data.sides, device=device, torch=version,
    )  # fmt: skip


def hardware(device: str) -> str:
    """Return the kind of this process's device, on which the bits of sums depend."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def require_same_hardware(latents: Folder, device: str) -> None:
    """Raise UserError if another kind of hardware started this set: its sums, and so its bytes, would differ."""
    ours = Hardware(hardware=hardware(device))
    ours.create(latents)
    if (theirs := Hardware.read(latents)) != ours:
        raise UserError(
            f"{latents}: started on {theirs.hardware!r}, this worker has {ours.hardware!r}: finish it on one kind, "
            "or use another root"
        )


def put_shards(setup: Setup, latents: Folder, numbers: Iterable[int], report: Callable[[int], None]) -> None:
    """Encode and write shards by number; takes the next number from the iterable when decoding needs it.

    If the source is not in the mixed order, writes parts to be mixed (staging.py) by number instead. After each encode batch,
    `report` gets the number of images done since its last call; if it raises, the work ends. UndecodableImage if the recipe says
    `undecodable: refuse`.
    """
    mixer = setup.mixer
    if setup.source.mixed:
        done = (partial(shards.put_shard, latents, *shard) for shard in encode_shards(setup, numbers, report))
    else:
        encoded = encode_shards(setup, (n for part in numbers for n in mixer.shards_of(part)), report)
        by_part = groupby(encoded, lambda shard: shard.number // mixer.part_shards)
        done = (partial(staging.put_part, latents, mixer, part, list(each)) for part, each in by_part)
    with ThreadPoolExecutor(1, "put") as pool:
        writing: Future[None] | None = None
        for put in done:
            if writing:
                writing.result()
            writing = pool.submit(put)
        if writing:
            writing.result()


def encode_shards(setup: Setup, numbers: Iterable[int], report: Callable[[int], None]) -> Iterator[EncodedShard]:
    """Yield the shards of these numbers, in their order; `report` as for `put_shards`."""
    for number, ranges in groupby(_decoded(setup, numbers), key=lambda part: part.number):
        yield EncodedShard(number, *_encode_shard(setup, ranges, report))


def encode_mixed(
    setup: Setup, numbers: Sequence[int], refused: Collection[str], report: ReportShare
) -> Iterator[EncodedShard | StorageError]:
    """Yield shards of a set that was mixed after encoding: each batch with one of their samples is encoded again.

    Encodes as many shards at a time as fit in memory, since a shard has samples of many batches. Yields the error in place of a
    shard with an image that cannot be read any more. `refused` are the printable names of the set's refused images, which were in
    no batch. `report` gets the number of source ranges done, each as long as a shard, and their total.
    """
    mixer, settings, names = setup.mixer, setup.recipe.precompute, setup.source.names
    at_once = batched(numbers, max(1, staging.GROUP_BYTES // mixer.shard_bytes))
    groups = [{n: mixer.order[np.array(shard_positions(n, mixer.images, settings))].tolist() for n in some} for some in at_once]
    work = [sorted({entry // settings.shard_images for places in group.values() for entry in places}) for group in groups]
    done = 0
    for group, parts in zip(groups, work, strict=True):
        wanted, samples = {entry for places in group.values() for entry in places}, dict[int, Sample]()
        lost = dict[int, StorageError]()
        for part in parts:
            encoded = [n for n in shard_positions(part, mixer.images, settings) if printable(names[n]) not in refused]
            for batch in batched(encoded, settings.encode_images):
                due = wanted.intersection(batch)
                again = sorted(due) if setup.recipe.data.given else batch  # copies do not depend on their batch
                try:
                    made = _samples(setup, again, setup.begin(_read_again(setup, again))()) if due else []
                except StorageError as error:
                    lost |= dict.fromkeys(due, error)
                else:
                    # a copy: a view would keep its whole batch
                    samples |= {x.position: replace(x, moments=x.moments.copy()) for x in made if x.position in due}
            report(done := done + 1, sum(map(len, work)))
        for number, places in group.items():
            there, others = ([n for n in places if (n in samples) is known] for known in (True, False))
            why = next((lost[n] for n in others if n in lost), None)
            yield why or EncodedShard(number, [samples[n] for n in there], [printable(names[n]) for n in others])


def _read_again(setup: Setup, positions: Sequence[int]) -> list[np.ndarray]:
    """Return the images at rising positions of a batch. The images between these positions are read as well."""
    every, resolution = range(positions[0], positions[-1] + 1), setup.recipe.data.resolution
    ranges = setup.source.read_ranges(every, READ_IMAGES)
    decoded = in_order(ranges, lambda each: setup.source.decoded(each, resolution), DECODERS)
    read = dict(zip(every, chain.from_iterable(decoded), strict=True))
    images, _ = select_decodable(positions, (read[n] for n in positions), "refuse")
    return [image for _, image in images]


def _decoded(setup: Setup, numbers: Iterable[int]) -> Iterator[_DecodedRange]:
    """Yield the shards' images, read and decoded ahead in threads."""
    settings = setup.recipe

    def work(part: tuple[int, range]) -> _DecodedRange:
        number, positions = part
        return _DecodedRange(number, positions, setup.source.decoded(positions, settings.data.resolution))

    ranges = (
        (number, positions)
        for number in numbers
        for positions in setup.source.read_ranges(
            shards.shard_positions(number, len(setup.source), settings.precompute), READ_IMAGES
        )
    )
    return in_order(ranges, work, DECODERS)


def _encode_shard(setup: Setup, ranges: Iterable[_DecodedRange], report: Callable[[int], None]) -> tuple[list[Sample], list[str]]:
    """Return a shard's samples and the printable names of its skipped images. Only its last encode batch may be short.

    While the device encodes a batch, the one before it becomes samples.
    """
    settings, samples, refused = setup.recipe.precompute, list[Sample](), list[str]()

    def decodable() -> Iterator[tuple[int, np.ndarray]]:
        decoded = ((part.positions, part.images) for part in ranges)
        for _, images, skipped in on_this_node(setup.source, setup.recipe.data, decoded, "a shard"):
            if skipped:
                refused.extend(printable(setup.source.names[position]) for position in skipped)
                report(len(skipped))
            yield from images

    batches = (tuple(zip(*batch, strict=True)) for batch in batched(decodable(), settings.encode_images))
    begun = ((positions, setup.begin(pixels)) for positions, pixels in batches)
    for positions, wait in one_ahead(begun):
        samples += _samples(setup, positions, wait())
        report(len(positions))
    return samples, refused


def _samples(setup: Setup, positions: Iterable[int], batch_moments: Iterable[np.ndarray]) -> list[Sample]:
    samples, mixer = [], setup.mixer
    for position, moments in zip(positions, batch_moments, strict=True):
        entry = setup.source.listing[position]
        if moments.shape != mixer.moments_shape:
            raise UserError(
                f"latent {printable(entry.name)}: got {moments.shape}, expected {mixer.moments_shape} (images, values, height, "
                f"width), which vae makes of {setup.recipe.data.resolution} pixels"
            )
        if not np.isfinite(moments).all():
            raise DisScaleError(f"latents of image {printable(entry.name)} are not finite in float16: is this its VAE?")
        samples.append(Sample(position, entry.name, int(entry.label), moments, mixer.posterior))
    return samples


def begin_encoding(vae: Vae, pixels: Sequence[np.ndarray], settings: Precompute) -> Callable[[], np.ndarray]:
    """Begin to encode at most `encode_images` images (H, W, 3) and their horizontal flips; return a function that waits for their
    moments, float16 (B, 2, 2C or C, h, w).

    The network always gets `encode_images` images, the last one repeated; TF32 is set by `compute_exactly`.
    """
    wait = vae.begin(np.stack([*pixels, *[pixels[-1]] * (settings.encode_images - len(pixels))]), settings.precision)
    return lambda: wait()[: len(pixels)]
