"""Batches hold labels like independent draws, from every kind of source; mixing after encoding survives every accident."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dis_scale import vae
from dis_scale.data import listing, mixing, shards, sources, staging
from dis_scale.data.encode import Setup, encode_mixed
from dis_scale.data.latents import Latents
from dis_scale.data.mixing import LabelCounts, permutation, words
from dis_scale.data.order import Order
from dis_scale.data.shards import EncodedShard
from dis_scale.data.sources import Source, open_source
from dis_scale.data.staging import STAGED, MixedOrder, Mixing, parts_left
from dis_scale.process.errors import StorageAway, StorageError, UndecodableImage, UserError
from dis_scale.recipe import LatentShape, Precompute
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sweep
from dis_scale.sweep.documents import Encoding, LatentsManifest, ShardSidecar
from pipelines.precompute import Encoder
from tests.support import store_requests
from tests.support.autoencoders import exported
from tests.support.labelled_images import parquet, png, sweep_on, tar
from tests.support.stage_jobs import deal_of
from tests.support.stages import OneEncoder, make_latents

CLASS_IMAGES = [4 + n % 7 * 3 + (60 if n % 20 == 0 else 0) for n in range(100)]
LABELS = [label for label, count in enumerate(CLASS_IMAGES) for _ in range(count)]
"""Class by class, in classes of 4 to 82 images."""


def folder_of(root: Folder) -> dict[str, Any]:
    for i, label in enumerate(LABELS):
        root.write(f"{label:03d}/{i:05d}.png", png(i % 8))
    return {"kind": "folder", "url": root.url}


def csv_of(root: Folder) -> dict[str, Any]:
    for i in range(len(LABELS)):
        root.write(f"{i}.png", png(i % 8))
    lines = [f"{i}.png,{label}" for i, label in enumerate(LABELS)]
    root.write("labels.csv", "\n".join(["path,label", *lines]).encode())
    return {"kind": "csv", "url": f"{root}/labels.csv"}


def tars_of(root: Folder) -> dict[str, Any]:
    """One tar a class, as inside ImageNet's tar."""
    for label, count in enumerate(CLASS_IMAGES):
        root.write(f"{label:03d}.tar", tar({f"{i:04d}.png": png(i % 8) for i in range(count)}))
    return {"kind": "tar", "url": root.url, "label": "tar"}


def parquet_of(root: Folder) -> dict[str, Any]:
    rows: list[tuple[bytes | None, Any]] = [(png(i % 8), label) for i, label in enumerate(LABELS)]
    root.write("train.parquet", parquet(rows, group=100, metadata=None))
    return {"kind": "parquet", "url": root.url}


def epoch_labels(latents: Folder) -> np.ndarray:
    """The labels of the first epoch, in training's order."""
    reader = Latents(latents, seed=3)
    return reader.read(np.arange(reader.order.total), np.zeros(reader.order.total, np.int64))[1]


@pytest.mark.parametrize("source", [folder_of, csv_of, tars_of, parquet_of])
def test_batches_hold_labels_like_independent_draws(source: Callable[[Folder], Any], tmp_path: Path) -> None:
    """Over an epoch of training; and the labels of consecutive steps are not correlated."""
    sizes = ["precompute.shard_images=64", "precompute.encode_images=64", "train.lanes=4"]
    latents = make_latents(sweep_on(tmp_path, source(open_folder(tmp_path) / "images"), *sizes))
    labels = epoch_labels(latents)
    assert sorted(labels.tolist()) == LABELS
    shares = np.bincount(labels) / len(labels)
    for batch in (128, 256, 1024):
        steps = np.split(labels, range(batch, len(labels), batch))[: len(labels) // batch]
        distinct = np.mean([len(set(step.tolist())) for step in steps])
        assert distinct > 0.95 * (1 - (1 - shares) ** batch).sum()
    excess = np.array(
        [np.bincount(step, minlength=100) - 32 * shares for step in np.split(labels, range(32, len(labels), 32))[:-1]]
    )
    excess /= np.sqrt(32 * shares)
    assert abs((excess[1:] * excess[:-1]).mean()) < 4 / np.sqrt(excess[1:].size)
    assert all(share > 0.95 for share in LatentsManifest.require(latents).mixing.values())
    assert not (latents / STAGED).list()


def test_the_measure_equals_the_mean_of_many_batches() -> None:
    """In the source's order, and mixed; of blocks of 256 images in consecutive shards, four of them for a batch of 1,024."""
    rng, labels = np.random.default_rng(0), np.array(LABELS)
    for ordered in (labels, labels[permutation(len(labels))]):
        counts, blocks = LabelCounts(), np.split(ordered, range(256, len(ordered), 256))
        for block in blocks:
            for shard in np.array_split(block, mixing.BLOCK_SHARDS):
                counts.add(Counter(map(str, shard.tolist())))
        shares, distinct = np.bincount(labels) / len(labels), counts.distinct()
        for batch, drawn_from in ((128, blocks), (256, blocks), (1024, [ordered[:1024], ordered[1024:]])):
            drawn = [
                np.mean([len(set(rng.permutation(images)[:batch].tolist())) for _ in range(200)])
                / (1 - (1 - shares) ** min(batch, len(images))).sum()
                for images in drawn_from
            ]
            assert distinct[str(batch)] == pytest.approx(np.mean(drawn), rel=0.01)


def test_the_mixing_of_one_class_is_not_measured() -> None:
    counts = LabelCounts()
    counts.add({"0": 100})
    assert counts.distinct() == {}
    assert words({}) == "not measured: it is by labels, and there are no two"


def test_held_out_images_are_in_few_shards_and_of_all_labels() -> None:
    """Of 640 images in ten classes each has 64, with a deviation of 8; in shards by class some would have none."""
    order, labels = Order([64] * 100, seed=0, held_out=640), np.repeat(np.arange(10), 640)[permutation(6400)]
    shard, row = order.held_out
    assert len(set(shard.tolist())) == 10
    assert np.bincount(labels[64 * shard + row], minlength=10).min() > 32


# -- mixing after encoding ---------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """A sweep on 40 images in ten tars, one of them undecodable, in ten shards; parts and groups have two of them."""
    monkeypatch.setattr(staging, "GROUP_BYTES", 8 * 2 * 2 * 6 * 8 * 8)
    monkeypatch.setattr(staging, "PARTS_TO_ROOT", 2)
    for n in range(10):
        members = {f"{i}.png": png(4 * n + i) if (n, i) != (3, 1) else b"broken" for i in range(4)}
        open_folder(tmp_path / "images").write(f"{n}.tar", tar(members))
    source = {"kind": "tar", "url": f"{tmp_path}/images", "label": "tar"}
    sizes = ["precompute.shard_images=4", "precompute.encode_images=3", "data.undecodable=skip"]
    return sweep_on(tmp_path, source, *sizes, classes=10)


def content(latents: Folder) -> dict[str, bytes]:
    return {name: latents.read(name) for name in latents.list()}


def test_each_shard_holds_its_places_of_the_mixed_order(small: Sweep) -> None:
    latents, order = make_latents(small), permutation(40).tolist()
    source, encoder = open_source(small.recipe.data), vae.load(small)
    for number in range(10):
        data = latents.read(f"{number:06d}.tar")
        shard, sidecar = shards.unpack(data, ""), ShardSidecar.read(latents, f"{number:06d}.json")
        entries = [n for n in order[4 * number : 4 * number + 4] if n != 13]
        assert shard.labels.tolist() == [n // 4 for n in entries]
        assert sidecar.refused == (() if len(entries) == 4 else ("3.tar/1.png",))
        pixels = np.stack([source.pixels(n, 8) for n in entries])
        np.testing.assert_array_equal(shard.moments[:, 0], encoder.encode(pixels).half().numpy())
        assert all(f"{n:012d}.moments.npy".encode() in data for n in entries)
    assert LatentsManifest.require(latents).refused == ("3.tar/1.png",)


def test_a_lost_part_and_a_damaged_one_are_made_again(small: Sweep, tmp_path: Path) -> None:
    """After a first mix that fails at one group; and shards that were mixed before are kept."""
    undisturbed, groups = content(make_latents(small)), list[list[int]]()

    class Disturbed(OneEncoder):
        def mix(self, latents: Folder, encoding: Encoding, source: Source, left: list[int]) -> None:
            groups.append(left)
            if len(groups) > 1:
                return super().mix(latents, encoding, source, left)
            super().mix(latents, encoding, source, left[:2])
            staged = latents / STAGED
            staged.delete("000002.bin")
            flip(staged, "000004.bin", -1)
            return super().mix(latents, encoding, source, left[2:])

    small.folder.delete()
    (small.store / "latents").delete()
    assert content(make_latents(small, Disturbed)) == undisturbed
    assert groups == [[0, 1, 2, 3, 4], [2, 3, 4], [4]], "a lost part is missed by each group, the damage is in one"


def test_a_set_begun_in_another_mixed_order_is_not_continued(small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a NumPy with another stream, after encoding or in a listing that was deleted and made again."""
    folders = {"kind": "folder", "url": f"{tmp_path}/folders"}
    for label in range(10):
        open_folder(tmp_path / "folders").write(f"{label}/0.png", png(label))
    for sweep in (small, sweep_on(tmp_path / "other", folders, "precompute.shard_images=4", classes=10)):
        with monkeypatch.context() as other:
            for module in (mixing, listing, sources):
                other.setattr(module, "permutation", lambda count: permutation(count)[::-1].copy())
            other.setattr(shards, "write_manifest", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                make_latents(sweep)
        (sweep.store / "listings").delete()
        latents = (sweep.store / "latents") / (sweep.store / "latents").list()[0]
        latents.delete("000001.json")
        with pytest.raises(UserError, match=r"begun with order '\w+', now '\w+': finish it as it was begun, or delete it"):
            make_latents(sweep)
        latents.delete()
        made = LatentsManifest.require(make_latents(sweep))
        assert made.made_from.order == mixing.order_hash(permutation(made.made_from.images))


@pytest.fixture
def mixing_of(small: Sweep) -> Mixing:
    """One worker's mixing of the five encoded parts of `small`."""
    encoding, source = Encoder(small, "cpu").encoding(), open_source(small.recipe.data, small.store)
    latents = shards.latents_folder(small, encoding.identity)
    Encoder(small, "cpu").encode(latents, encoding, deal_of(range(5)))
    return Mixing(latents, MixedOrder.of(len(source), small.recipe.precompute, encoding), lambda _: None)


def flip(folder: Folder, name: str, at: int) -> None:
    """Flip a bit of a file."""
    data = bytearray(folder.read(name))
    data[at] ^= 1
    folder.write(name, bytes(data))


def test_a_worker_reads_each_run_once_and_nothing_else(mixing_of: Mixing) -> None:
    """One request for each part and group, and one for each part's index."""
    with store_requests.noted() as requests:
        for group in mixing_of.mixer.groups:
            mixing_of.mix(group)
    counts = Counter(verb for verb, _ in requests)
    assert counts == {"read": 5 * 5 + 5 + 10, "write": 10, "create": 10, "written": 2 * 10}
    runs = [path for verb, path in requests if verb == "read" and not path.endswith(".json")]  # each shard's sidecar is looked for
    assert all(path.endswith(".bin") for path in runs)


@pytest.mark.parametrize("at", [0, 40, 32 + 8 * 6, 32 + 8 * 6 + 40, 32 + 8 * 6 + 60, -1])
def test_a_flipped_bit_of_any_kind_is_found_and_the_part_is_made_again(mixing_of: Mixing, at: int) -> None:
    """Of the index and its hash; of a run, its hash, its names and its moments."""
    latents = mixing_of.latents
    flip(latents / STAGED, "000003.bin", at)
    with pytest.raises(StorageAway, match=r"1 of 5 parts are gone or damaged, the first is 000003.bin: they are encoded"):
        for group in mixing_of.mixer.groups:
            mixing_of.mix(group)
    assert parts_left(latents, mixing_of.mixer) == [3]


def test_all_lost_parts_are_found_at_once(mixing_of: Mixing) -> None:
    """They may be more than attempts without progress are allowed: truncated, gone, of another order."""
    staged = mixing_of.latents / STAGED
    for part in (0, 1):
        staged.write(f"00000{part}.bin", staged.read(f"00000{part}.bin", 0, 100 * part))
    staged.delete("000003.bin")
    staged.write("000004.bin", staged.read("000002.bin"))
    with pytest.raises(StorageAway, match=r"4 of 5 parts are gone or damaged, the first is 000000.bin"):
        mixing_of.mix(0)
    assert parts_left(mixing_of.latents, mixing_of.mixer) == [0, 1, 3, 4]


def test_a_mixed_shard_is_repaired_to_the_same_bytes(small: Sweep) -> None:
    latents = make_latents(small)
    setup = Setup(open_source(small.recipe.data, small.store), vae.load(small), small.recipe)
    for shard in encode_mixed(setup, range(10), set(LatentsManifest.require(latents).refused), lambda *_: None):
        assert isinstance(shard, EncodedShard)
        assert all(sample.moments.base is None for sample in shard.samples), "a view keeps its whole batch"
        assert shards.pack(shard.samples) == latents.read(f"{shard.number:06d}.tar")
        assert shard.refused == list(ShardSidecar.read(latents, f"{shard.number:06d}.json").refused)


def test_shards_whose_images_are_there_are_repaired_at_once_though_another_is_not(
    small: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, decoded, done = make_latents(small), Counter[str](), list[tuple[int, int]]()
    monkeypatch.setattr(staging, "GROUP_BYTES", 2**30)
    source, lost = open_source(small.recipe.data, small.store), ""

    def decode(data: bytes, name: str, resolution: int) -> np.ndarray:
        decoded[name] += 1
        if name == lost:
            raise UndecodableImage(f"image {name}: truncated", "truncated")
        return source.decode(data, name, resolution)

    setup = Setup(replace(source, decode=decode), vae.load(small), small.recipe)
    refused = set(LatentsManifest.require(latents).refused)

    def again() -> list[EncodedShard | StorageError]:
        return list(encode_mixed(setup, range(10), refused, lambda *each: done.append(each)))

    assert all(isinstance(shard, EncodedShard) for shard in again())
    assert {*decoded.values()} == {1}, "each image once"
    assert done == [(n, 10) for n in range(1, 11)]
    lost = source.names[0]
    failed = [shard for shard in again() if not isinstance(shard, EncodedShard)]
    assert 0 < len(failed) < 10, "those with an image of its batch"
    assert str(failed[0]) == f"image {lost}: truncated"


class Negative(torch.nn.Module):
    """An autoencoder without a posterior: latents are negative pixels."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return -x.contiguous(memory_format=torch.channels_last)  # as convolutions of a CPU do

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return -z


def test_latents_without_variance_are_mixed_and_repaired(small: Sweep, tmp_path: Path) -> None:
    """Each shard has the bytes of the repair, and half the values of the same images with a log-variance."""
    settings = exported(tmp_path / "vae", posterior=False, net=Negative(), side=8, latent=(3, 8, 8))
    other = replace(small, recipe=small.recipe.model_copy(update={"vae": settings}))
    pixels, latents = make_latents(small), make_latents(other)
    setup = Setup(open_source(other.recipe.data, other.store), vae.load(other), other.recipe)
    for shard in encode_mixed(setup, range(10), set(LatentsManifest.require(latents).refused), lambda *_: None):
        assert isinstance(shard, EncodedShard)
        name = f"{shard.number:06d}.tar"
        assert shards.pack(shard.samples) == latents.read(name)
        stored, expected = shards.unpack(latents.read(name), ""), shards.unpack(pixels.read(name), "")
        np.testing.assert_array_equal(stored.moments, -expected.moments[:, :, :3])


def test_parts_and_groups_hold_each_image_once() -> None:
    """At ImageNet's number of images: in complete shards, and a run has the same entries for who writes it and who reads it."""
    mixer = MixedOrder(1_281_167, Precompute(), LatentShape(4, 32))
    assert (mixer.group_images, mixer.part_images) == (64 * 1024, 5 * 1024)
    assert sum(len(mixer.group(n)) for n in mixer.groups) == mixer.images
    assert [n for part in mixer.parts for n in mixer.shards_of(part)] == list(range(1252))
    assert mixer.groups_of([0, 63, 64, 1251]) == [0, 1, 19]
    runs, places = mixer.runs(7), mixer.places_by_part(19)
    assert sorted(np.concatenate(runs).tolist()) == list(range(7 * 5 * 1024, 8 * 5 * 1024))
    np.testing.assert_array_equal(runs[19], mixer.order[19 * 64 * 1024 + places[7]])
    assert sorted(np.concatenate(places).tolist()) == list(range(len(mixer.group(19))))


@pytest.mark.parametrize(
    ("images", "reads", "hours"), [(1_281_167, 5_020, 0.02), (14_197_122, 202_000, 0.3), (100_000_000, 4_700_000, 3.1)]
)
def test_mixing_is_not_quadratic(images: int, reads: int, hours: float) -> None:
    """Requests at 30 ms, READS_AT_ONCE and WRITES_AT_ONCE of a worker; once 149 million reads of 100 million images' runs.

    64 workers read each part's index.
    """
    mixer = MixedOrder(images, Precompute(), LatentShape(4, 32))
    runs = len(mixer.parts) * len(mixer.groups)
    assert 0.9 * reads < runs <= reads
    shards_written = -(-images // 1024)
    seconds = 0.03 * ((runs + 64 * len(mixer.parts)) / staging.READS_AT_ONCE + 2 * shards_written / staging.WRITES_AT_ONCE)
    assert 0.5 * hours < seconds / 3600 < hours
    assert mixer.part_images * 32 * 1024 <= staging.PART_BYTES
    assert mixer.memory_bytes < 6 * 2**30
