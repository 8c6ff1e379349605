"""Shards have reproducible bytes and are readable by others; a lane of a step is equal for every reader."""

import dataclasses
import hashlib
import io
import itertools
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dis_scale.data import shards
from dis_scale.data.latents import SWITCH_S, Latents, micro_batch, prefetch
from dis_scale.data.shards import Sample
from dis_scale.process.errors import StorageError, UserError
from dis_scale.recipe import LatentShape, Recipe
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.documents import LatentsManifest, ShardSidecar
from tests.support.documents import made_from
from tests.support.small_latents import CLASSES, make, read, samples


def test_packing_is_reproducible_and_reads_back() -> None:
    packed = samples(0, 7)
    assert shards.pack(packed) == shards.pack(packed)
    read = shards.unpack(shards.pack(packed), "here")
    np.testing.assert_array_equal(read.moments, np.stack([s.moments for s in packed]))
    assert read.labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert not read.moments.flags.owndata, "a view of the bytes"


@pytest.mark.parametrize("count", [0, 1, 7, 23])
def test_a_shard_has_the_bytes_of_webdatasets_writer(count: int) -> None:
    """Also with names of several blocks, and of other characters than ASCII."""
    import webdataset as wds

    made = [dataclasses.replace(sample, name="n/ü\n" * 90 * n, position=977**n) for n, sample in enumerate(samples(0, 4))]
    made = (made * 6)[:count]
    file = io.BytesIO()
    with wds.TarWriter(file, mtime=0, user="dis-scale", group="dis-scale", mode=0o444) as writer:
        for sample in made:
            facts = {"label": sample.label, "name": sample.name}
            writer.write({"__key__": f"{sample.position:012d}", "moments.npy": sample.moments, "json": facts})
    assert shards.pack(made) == file.getvalue()


@pytest.mark.parametrize("posterior", [True, False])
def test_the_sums_of_a_shard_are_those_of_numpy(posterior: bool, tmp_path: Path) -> None:
    """To the last bit: the deviation of a set is part of what its runs are trained on."""
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((5, 2, 4 * (1 + posterior), 6, 6)).astype(np.float16)
    shards.put_shard(open_folder(tmp_path), 0, [Sample(n, "", 0, each, posterior) for n, each in enumerate(moments)], [])
    sums = ShardSidecar.read(open_folder(tmp_path), "000000.json").sums
    means, log_variances = (moments[:, 0, half].astype(np.float64) for half in (np.s_[:4], np.s_[4:]))
    assert sums.count == 5 * 36
    np.testing.assert_array_equal(sums.mean, means.mean((0, 2, 3)))
    np.testing.assert_array_equal(sums.m2, means.var((0, 2, 3)) * sums.count)
    np.testing.assert_array_equal(sums.variance, sum(np.exp(log_variances).sum((2, 3))) if posterior else np.zeros(4))


class _InTurns(Folder):
    """A folder of whose requests each waits for the turn of its thread."""

    def _wait(self) -> None:
        PAUSED.release()
        TURNS[threading.current_thread().name].acquire()

    def read_up_to(self, path: str, most: int) -> bytes:
        self._wait()
        return super().read_up_to(path, most)

    def write(self, path: str, data: bytes) -> None:
        self._wait()
        super().write(path, data)

    def create(self, path: str, data: bytes) -> bool:
        self._wait()
        return super().create(path, data)


PAUSED = threading.Semaphore(0)
TURNS = {name: threading.Semaphore(0) for name in ("first", "second")}


@pytest.mark.parametrize("order", list(itertools.product(TURNS, repeat=6)), ids=lambda order: "".join(name[0] for name in order))
def test_two_encoders_of_a_shard_leave_one_of_their_bytes(order: tuple[str, ...], tmp_path: Path) -> None:
    """A lost encoder may still work, and its device may compute other bytes. In each order of their requests."""
    data = dict(zip(TURNS, (samples(0, 2), samples(2, 2)), strict=True))

    over = set[str]()

    def encode() -> None:
        name = threading.current_thread().name
        shards.put_shard(_InTurns(str(tmp_path)), 0, data[name], [])
        over.add(name)
        PAUSED.release()

    threads = {name: threading.Thread(target=encode, name=name) for name in TURNS}
    for thread in threads.values():
        thread.start()
        assert PAUSED.acquire(timeout=60)
    for name in (*order, *(["first"] * 6), *(["second"] * 6)):
        if name not in over:
            TURNS[name].release()
            assert PAUSED.acquire(timeout=60)
    assert over == {*TURNS}
    sidecar = ShardSidecar.read(open_folder(tmp_path), "000000.json")
    assert sidecar.sha256 == hashlib.sha256((tmp_path / "000000.tar").read_bytes()).hexdigest()


@pytest.mark.parametrize("cut", [1, 512, 700, 1536, 2000, 3000, 10_000])
def test_a_truncated_shard_is_refused(cut: int) -> None:
    """Usually the hash detects damage first; this holds without it."""
    data = shards.pack(samples(0, 7))
    with pytest.raises(StorageError, match="there: not a latent shard"):
        shards.unpack(data[:cut], "there")


@pytest.mark.parametrize("data", [b"x" * 10240, b"", b"\0" * 10240, b"\0" * 511])
def test_bytes_that_are_not_a_shard_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(StorageError, match="there: not a latent shard"):
        shards.unpack(data, "there")


@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_shard_of_another_layout_is_readable(at: int) -> None:
    """A name longer than one block of the tar moves all following members."""
    made = samples(0, 7)
    made[at] = dataclasses.replace(made[at], name="n" * 600)
    read_back = shards.unpack(shards.pack(made), "here")
    assert read_back.moments.flags.owndata, "a copy"
    np.testing.assert_array_equal(read_back.moments, np.stack([s.moments for s in made]))
    assert read_back.labels.tolist() == [s.label for s in made]


def test_another_writers_order_of_axes_is_read() -> None:
    made = samples(0, 3)
    fortran = shards.pack(made).replace(b"'fortran_order': False,", b"'fortran_order': True, ")
    np.testing.assert_array_equal(
        shards.unpack(fortran, "here").moments, [s.moments.ravel().reshape(s.moments.shape, order="F") for s in made]
    )


@pytest.mark.parametrize("label", [None, [1], "two"])
def test_a_label_that_is_no_number_is_damage(label: Any) -> None:
    with pytest.raises(StorageError, match="there: not a latent shard"):
        shards.unpack(shards.pack([dataclasses.replace(samples(0, 1)[0], label=label)]), "there")


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    """With the library's own decoder."""
    import webdataset as wds

    make(open_folder(tmp_path), [3, 2])
    read_back = list(wds.WebDataset(str(tmp_path / "{000000..000001}.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read_back] == [f"{i:012d}" for i in range(5)]
    for sample, made in zip(read_back, samples(0, 3) + samples(3, 2), strict=True):
        np.testing.assert_array_equal(sample["moments.npy"], made.moments)
        assert sample["json"] == {"label": made.label, "name": made.name}


def test_finished_shards_exclude_damaged_and_incomplete_ones(store_url: str) -> None:
    at = open_folder(store_url)
    for number in range(4):
        shards.put_shard(at, number, samples(number * 3, 3), [])
    at.delete("000001.json")
    at.write("000002.tar", b"damaged")
    at.write("000003.json", b"damaged")
    assert shards.finished(at, range(4)) == {0}


def test_a_late_encoder_changes_no_finished_shard(store_url: str) -> None:
    """The set may be sealed: its manifest has the first one's hash. A shard whose tar is gone is made again."""
    at = open_folder(store_url)
    shards.put_shard(at, 0, samples(0, 3), [])
    before = at.read("000000.tar"), at.read("000000.json")
    shards.put_shard(at, 0, samples(3, 3), [])
    assert (at.read("000000.tar"), at.read("000000.json")) == before
    at.delete("000000.tar")
    shards.put_shard(at, 0, samples(3, 3), [])
    assert at.read("000000.tar") != before[0]
    assert shards.finished(at, range(1)) == {0}


def test_a_sidecar_that_cannot_be_read_is_an_error_and_its_shard_stays(tmp_path: Path) -> None:
    """A folder instead of a file stands for what storage refuses to read: the shard may be good, and the set sealed with it."""
    shards.put_shard(open_folder(tmp_path), 0, samples(0, 3), [])
    before = (tmp_path / "000000.tar").read_bytes()
    (tmp_path / "000000.json").unlink()
    (tmp_path / "000000.json").mkdir()
    with pytest.raises(StorageError, match=r"cannot read .*000000.json: .*Is a directory"):
        shards.finished(open_folder(tmp_path), range(1))
    with pytest.raises(StorageError, match=r"cannot read .*000000.json: .*Is a directory"):
        shards.put_shard(open_folder(tmp_path), 0, samples(3, 3), [])
    assert (tmp_path / "000000.tar").read_bytes() == before


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_sidecar_passes(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    """Most of its bytes are digits of sums, with which it would still be JSON."""
    folder = open_folder(tmp_path_factory.mktemp("set"))
    shards.put_shard(folder, 0, samples(0, 3), [])
    intact, data = ShardSidecar.read(folder, "000000.json"), bytearray(folder.read("000000.json"))
    data[at % len(data)] ^= 1 << bit
    folder.write("000000.json", bytes(data))
    number = re.search(rb'"format": ?(\d)', data)
    of_another = pytest.raises(StorageError, match="is not read by this version") if number and number[1] != b"1" else nullcontext()
    with of_another:
        if shards.finished(folder, range(1)):
            assert ShardSidecar.read(folder, "000000.json") == intact


def test_statistics_merge_to_those_of_all_samples(tmp_path: Path) -> None:
    make(open_folder(tmp_path), [4, 7, 2])
    made = LatentsManifest.require(open_folder(tmp_path))
    everything = np.stack([s.moments[0, :2] for first, n in [(0, 4), (4, 7), (11, 2)] for s in samples(first, n)])
    np.testing.assert_allclose(made.mean, everything.astype(np.float64).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(made.std, everything.astype(np.float64).std((0, 2, 3)), rtol=1e-12)


def test_posterior_samples_are_normalised_by_channel(tmp_path: Path) -> None:
    at = make(open_folder(tmp_path), [4, 7, 2])
    latents = Latents(at, 0, normalise="channels")
    options: dict[str, Any] = {"batch": 13 * 2000, "lanes": 1, "seed": 0, "flip": False, "label_dropout": 0.0}
    x_BCHW = micro_batch(latents, 0, 0, **options).x_BCHW
    # One standard error of the deviation of 234,000 values is 0.0015; normalised by that of the means it is 1.6.
    assert x_BCHW.mean((0, 2, 3)).tolist() == pytest.approx([0, 0], abs=0.01)
    assert x_BCHW.std((0, 2, 3)).tolist() == pytest.approx([1, 1], abs=0.01)


def test_a_lane_does_not_depend_on_the_reader(tmp_path: Path) -> None:
    make(open_folder(tmp_path), [6, 6, 5])
    options: dict[str, Any] = {"batch": 8, "lanes": 4, "seed": 3, "flip": True, "label_dropout": 0.3}
    later = Latents(open_folder(tmp_path), seed=3)
    for step in range(5):
        micro_batch(later, step, 0, **options)
    first, second = (micro_batch(r, 5, 2, **options) for r in (later, Latents(open_folder(tmp_path), seed=3)))
    for one, other in zip(first, second, strict=True):
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    noises = {micro_batch(later, step, lane, **options).noise_BCHW.numpy().tobytes() for step in (0, 1) for lane in (0, 1)}
    assert len(noises) == 4


def test_half_of_the_images_are_mirrored(tmp_path: Path) -> None:
    latents = Latents(make(open_folder(tmp_path), [6, 6, 5]), 0)
    options: dict[str, Any] = {"batch": 2000, "lanes": 1, "seed": 0, "label_dropout": 0.0}
    plain, turned = (micro_batch(latents, 0, 0, flip=flip, **options).x_BCHW for flip in (False, True))
    # Four standard errors of a share of 2,000 are 0.045.
    assert float((plain != turned).flatten(1).any(1).float().mean()) == pytest.approx(0.5, abs=0.045)


def test_latents_are_posterior_samples_shifted_and_scaled(tmp_path: Path) -> None:
    """Over many posterior samples of one image: mean (mean - shift) scale, deviation std scale."""
    one = samples(0, 1)[0]
    shards.put_shard(open_folder(tmp_path), 0, [one], [])
    facts = made_from("v", (2, 3), scale=0.5, shift=0.25, num_classes=CLASSES)
    shards.write_manifest(open_folder(tmp_path), range(1), facts)
    batch = micro_batch(Latents(open_folder(tmp_path), 0), 0, 0, batch=4000, lanes=1, seed=0, flip=False, label_dropout=0.25)
    mean, log_variance = one.moments[0, :2].astype(np.float64), one.moments[0, 2:].astype(np.float64)
    deviation = 0.5 * np.exp(0.5 * log_variance)
    # Five standard errors of a mean of 4,000 samples.
    assert (np.abs(batch.x_BCHW.mean(0).numpy() - (mean - 0.25) * 0.5) < 5 * deviation / 4000**0.5).all()
    np.testing.assert_allclose(batch.x_BCHW.std(0).numpy(), deviation, rtol=0.08)
    assert batch.y_B is not None
    assert abs(float(batch.y_B.eq(CLASSES).float().mean()) - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_training_does_not_read_a_damaged_shard(tmp_path: Path) -> None:
    at = make(open_folder(tmp_path), [4])
    data = bytearray(at.read("000000.tar"))
    data[700] ^= 1
    at.write("000000.tar", bytes(data))
    with pytest.raises(StorageError, match=r"000000.tar: damaged: its sha256 differs"):
        read(Latents(at, 0), 0, 1)


def test_latents_of_another_vae_are_refused(tmp_path: Path, tiny: Recipe) -> None:
    sweep = Sweep.below(open_folder(tmp_path), tiny)
    at = make(open_folder(tmp_path) / "latents/abc", [4])
    state.use_latents(sweep, at, "v" * 64)
    assert state.find_latents(sweep.folder) == state.require_latents(sweep.folder) == at
    state.use_latents(sweep, at, "w" * 64)
    with pytest.raises(UserError, match="latents of another VAE: theirs is vvvvvvvvvvvv, this one is wwwwwwwwwwww"):
        state.find_latents(sweep.folder)
    at.delete()
    with pytest.raises(
        UserError, match=rf"its latents, {at}, are gone: restore them, or resume it, which encodes its images again"
    ):
        state.require_latents(sweep.folder)


def test_prefetch_keeps_order_and_raises_errors() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("broken source")

    got = []
    with pytest.raises(ValueError, match="broken source"):
        for item in prefetch(items()):
            got.append(item)
    assert got == list(range(5))


def test_the_thread_that_prefetches_waits_less_for_pythons_turn() -> None:
    """What it gains beside a thread that launches a step: benchmarks/reader.py."""
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(5e-3)
        assert list(prefetch(iter(range(3)))) == [0, 1, 2]
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        assert SWITCH_S < 1e-3
    finally:
        sys.setswitchinterval(before)


def test_the_bytes_of_a_sample_are_those_of_its_shard() -> None:
    one, many = (len(shards.pack(samples(0, count))) for count in (1, 101))
    assert abs((many - one) / 100 - shards.sample_bytes(LatentShape(2, 3))) <= 10240 / 100  # a tar ends at 10,240 bytes
