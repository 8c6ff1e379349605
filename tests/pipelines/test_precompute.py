"""A shard does not depend on the worker that encodes it; undecodable images are refused by name, or skipped and counted."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dis_scale import vae
from dis_scale.data import shards
from dis_scale.data.encode import Setup, begin_encoding, encode_shards, require_same_hardware
from dis_scale.data.latents import open_latents
from dis_scale.data.making import require_one_kind
from dis_scale.data.sources import Source, load_subset, open_source
from dis_scale.evaluation import parts
from dis_scale.process.errors import BrokenDevice, Preempted, StorageError, UndecodableImage, UserError
from dis_scale.recipe import CsvSource, Precompute, Recipe, TrainedVae, reading
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.documents import Encoding, Hardware, LatentsManifest
from pipelines.precompute import Encoder
from tests.conftest import TINY
from tests.support import store_requests
from tests.support.documents import made_from
from tests.support.labelled_images import png
from tests.support.stage_jobs import deal_of
from tests.support.stages import OneEncoder, make_latents


@pytest.fixture
def photos(tmp_path: Path) -> Recipe:
    """A recipe on 26 small images of two classes, in shards of ten."""
    rng = np.random.default_rng(0)
    for i in range(26):
        path = tmp_path / f"photos/{'ab'[i % 2]}/{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(path)
    source = f"data.source={{kind: folder, url: {tmp_path}/photos}}"
    sizes = ["precompute.shard_images=10", "precompute.encode_images=4", "data.num_classes=2"]
    return reading.load(TINY, [source, *sizes])


@pytest.fixture
def sweep(tmp_path: Path, photos: Recipe) -> Sweep:
    made = Sweep(open_folder(tmp_path) / "sweeps/photos", photos)
    assert isinstance(photos.vae, TrainedVae)
    vae.save(made.vae, vae.new(photos.vae, photos.data.resolution))
    return made


def sweep_with_the_vae_of(sweep: Sweep, folder: Folder) -> Sweep:
    """Return a sweep in another folder with the same recipe and VAE."""
    other = replace(sweep, folder=folder)
    vae.save(other.vae, vae.load(sweep).net)
    return other


def encoding_here(sweep: Sweep) -> Encoding:
    return Encoder(sweep, "cpu").encoding()


def encode_with(workers: int, sweep: Sweep, at: Folder) -> dict[str, bytes]:
    """Return the three shards as this many workers make them at once."""
    deal = deal_of([0, 1, 2])
    with ThreadPoolExecutor(workers) as pool:
        encoders = [Encoder(sweep, "cpu") for _ in range(workers)]
        done = [pool.submit(encoder.encode, at, encoding_here(sweep), deal) for encoder in encoders]
    for each in done:
        each.result()
    return {name: at.read(name) for name in at.list() if name != Hardware.NAME}


@pytest.mark.parametrize("workers", [2, 8])
def test_many_encoders_make_the_same_bytes_as_one(workers: int, sweep: Sweep, tmp_path: Path) -> None:
    one = encode_with(1, sweep, open_folder(tmp_path) / "one")
    assert sorted(one) == [f"00000{n}.{kind}" for n in range(3) for kind in ("json", "tar")]
    assert one == encode_with(workers, sweep, open_folder(tmp_path) / "many")


def test_a_broken_image_is_refused_by_name_and_no_shard_is_written(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "photos/a/00.png").write_bytes(b"broken")
    with pytest.raises(
        UndecodableImage, match=r"image a/00.png cannot be decoded: .*; repair or remove it, or --set data.undecodable=skip"
    ):
        encode_with(1, sweep, open_folder(tmp_path) / "one")
    lacking = open_source(sweep.recipe.data).names.index("a/00.png") // 10
    assert f"{lacking:06d}.tar" not in (open_folder(tmp_path) / "one").list()


def test_a_missing_image_is_not_a_broken_one(sweep: Sweep, tmp_path: Path) -> None:
    """Only undecodable images may be skipped: a failure of storage must not make the set smaller."""
    open_source(sweep.recipe.data, sweep.store)
    (tmp_path / "photos/a/00.png").unlink()
    with pytest.raises(StorageError, match=r"image a/00.png is gone") as caught:
        encode_with(1, skipping(sweep), open_folder(tmp_path) / "one")
    assert not isinstance(caught.value, UndecodableImage)


def test_a_broken_image_is_skipped_counted_and_listed_if_the_recipe_says_so(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "photos/a/00.png").write_bytes(b"broken")
    latents = made(skipping(sweep))
    assert (latents.count, latents.made_from.images, latents.refused) == (25, 26, ("a/00.png",))
    lacking = open_source(sweep.recipe.data).names.index("a/00.png") // 10
    assert [shard.count for shard in latents.shards] == [size - (n == lacking) for n, size in enumerate([10, 10, 6])]


def test_images_whose_mount_is_lost_are_not_skipped(sweep: Sweep, tmp_path: Path) -> None:
    """A broken link is a broken image. If most of a shard's are, this node lacks what they lead to."""
    (tmp_path / "photos").rename(tmp_path / "mount")
    for path in sorted((tmp_path / "mount").rglob("*.png")):
        (link := tmp_path / "photos" / path.relative_to(tmp_path / "mount")).parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    (tmp_path / "mount/a/00.png").unlink()
    made(skipping(sweep))
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    for of, at in ((skipping(sweep), "skip"), (sweep, "refuse")):
        with pytest.raises(BrokenDevice, match=r"10 of 10 images of a shard are not there on .*: mount what the links"):
            encode_with(1, of, open_folder(tmp_path) / at)
        source, data = open_source(of.recipe.data), of.recipe.data
        with pytest.raises(BrokenDevice, match="26 of 26 images of a part of the reference are not there on"):
            list(parts._images(source, data, range(26), print))
        with pytest.raises(BrokenDevice, match="26 of 26 images of the sample for the small networks are not there on"):
            load_subset(source, data)


def test_images_that_are_gone_at_their_urls_are_skipped_and_blame_no_node(sweep: Sweep, tmp_path: Path) -> None:
    """Links rot: two nodes that meet a shard of them would be excluded, and then the next two."""
    images = f"memory://rotten/{tmp_path.name}"
    for n in range(12):
        open_folder(images).write(f"{n}.png", png(n))
    lines = [f"{images}/{n}.png,a" for n in range(30)]
    open_folder(tmp_path).write("x.csv", "\n".join(["path,label", *lines]).encode())
    source = CsvSource(kind="csv", url=str(tmp_path / "x.csv"))
    data = sweep.recipe.data.model_copy(update={"source": source, "csv_outside": "allow", "num_classes": 1})
    latents = made(skipping(replace(sweep, recipe=sweep.recipe.model_copy(update={"data": data}))))
    assert (latents.count, len(latents.refused)) == (12, 18)


def test_shards_are_kept_when_the_recipe_skips_from_now_on(sweep: Sweep, tmp_path: Path) -> None:
    """The set was begun with `refuse`. A rerun with `refuse` does not use it, nor does training."""
    (tmp_path / "photos/a/00.png").write_bytes(b"broken")
    lacking = open_source(sweep.recipe.data, sweep.store).names.index("a/00.png") // 10
    with pytest.raises(UndecodableImage):
        made(sweep, lambda of, latents, left: encode_here(of, latents, sorted(left, key=lambda n: n == lacking)))
    encoded: list[list[int]] = []

    def counted(*arguments: Any) -> None:
        encoded.append(arguments[-1])
        encode_here(*arguments)

    another = sweep_with_the_vae_of(skipping(sweep), open_folder(tmp_path) / "sweeps/another")
    assert made(another, counted).refused == ("a/00.png",)
    assert encoded == [[lacking]]
    words = r"1 undecodable images were left out, the first is a/00.png: --set data.undecodable=skip, or repair them"
    with pytest.raises(UserError, match=words):
        make_latents(sweep)
    assert state.find_latents(sweep.folder) is None
    with pytest.raises(UserError, match=words):
        open_latents(latents_of(sweep), sweep.recipe, 1, print)
    open_latents(latents_of(sweep), another.recipe, 1, print)


def test_a_set_without_an_image_is_refused(sweep: Sweep, tmp_path: Path) -> None:
    for path in (tmp_path / "photos").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no image could be decoded; the first of 26: \['[ab]/\d\d.png'\]"):
        made(skipping(sweep))


def test_a_set_has_one_kind_of_device_and_one_listing(photos: Recipe, tmp_path: Path) -> None:
    latents, source = open_folder(tmp_path / "one"), open_source(photos.data)
    cpu = made_from().encoding
    require_one_kind(latents, cpu, source)
    require_one_kind(latents, cpu, open_source(photos.data))
    with pytest.raises(UserError, match=r"begun with device 'cpu', now 'cuda': finish it as it was begun"):
        require_one_kind(latents, cpu.model_copy(update={"device": "cuda"}), source)
    (tmp_path / "photos/a/new.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"begun with listing '\w+', now '\w+'; order '\w+', now '\w+': finish it"):
        require_one_kind(latents, cpu, open_source(photos.data))


def test_the_padding_of_the_last_batch_changes_no_other_sample(sweep: Sweep) -> None:
    source, encoder = open_source(sweep.recipe.data), vae.load(sweep)
    images, settings = [source.pixels(i, 32) for i in range(4)], sweep.recipe.precompute
    complete = begin_encoding(encoder, images, settings)()
    np.testing.assert_array_equal(begin_encoding(encoder, images[:3], settings)(), complete[:3])


def test_bf16_rounds_the_products_and_is_a_set_of_its_own(sweep: Sweep) -> None:
    facts, source = made(sweep), open_source(sweep.recipe.data)
    rounded = sweep.recipe.precompute.model_copy(update={"precision": "bf16"})
    other = replace(sweep, recipe=sweep.recipe.model_copy(update={"precompute": rounded}))
    assert (facts.made_from.precision, made(other).made_from.precision) == ("fp32", "bf16")
    assert latents_of(other) != latents_of(sweep)
    images, encoder = [source.pixels(i, 32) for i in range(4)], vae.load(sweep)
    exact, bf16 = (begin_encoding(encoder, images, one.recipe.precompute)().astype(np.float32) for one in (sweep, other))
    difference = np.linalg.norm(bf16 - exact) / np.linalg.norm(exact)
    assert 1e-4 < difference < 0.02


def test_the_horizontal_flip_is_encoded_with_the_image(sweep: Sweep) -> None:
    source, encoder = open_source(sweep.recipe.data), vae.load(sweep)
    image = source.pixels(0, 32)[None]
    (moments,) = encoder.begin(image)()
    np.testing.assert_array_equal(moments[1], encoder.encode(image[:, :, ::-1]).half().numpy()[0])
    assert not np.array_equal(moments[0], moments[1])


def test_every_shard_holds_its_positions_in_their_order(sweep: Sweep) -> None:
    """For any read-ahead: 26 images in shards of ten, batches of four."""
    setup = Setup(open_source(sweep.recipe.data), vae.load(sweep), sweep.recipe)
    reports: list[int] = []
    content = list(encode_shards(setup, [2, 0], reports.append))
    assert [(m.number, [s.position for s in m.samples]) for m in content] == [(2, [*range(20, 26)]), (0, [*range(10)])]
    assert reports == [4, 2, 4, 4, 2]
    for sample in content[1].samples:
        assert (sample.name, sample.label) == (setup.source.names[sample.position], setup.source.labels[sample.position])


BATCH_S, HOST_S = 0.1, 0.05


@dataclass(frozen=True)
class Simulated(vae.PixelVae):
    """A device that encodes one batch after the other, each for BATCH_S, while the host continues."""

    ends_s: list[float] = field(default_factory=list)

    def begin(self, pixels_BHWC: np.ndarray, precision: str = "fp32") -> Callable[[], np.ndarray]:
        result = super().begin(pixels_BHWC, precision)
        self.ends_s.append(end_s := max(time.monotonic(), *self.ends_s[-1:], 0.0) + BATCH_S)

        def wait() -> np.ndarray:
            time.sleep(max(0.0, end_s - time.monotonic()))
            return result()

        return wait


def test_encoding_takes_the_time_of_the_network(sweep: Sweep) -> None:
    """90 % of it, though the host needs half as long for each batch: it works while the next is encoded.

    The median: a machine may pause.
    """
    device = Simulated()
    one = sweep.recipe.model_copy(update={"precompute": Precompute(shard_images=26, encode_images=3)})
    (shard,) = encode_shards(Setup(open_source(one.data), device, one), [0], lambda _: time.sleep(HOST_S))
    assert (len(shard.samples), len(device.ends_s)) == (26, 9)
    assert np.median(np.diff(device.ends_s)) < BATCH_S / 0.9


# -- reruns after a failure --------------------------------------------------------------------------------------------


EncodeOf = Callable[[Sweep, Folder, list[int]], None]


def encode_here(sweep: Sweep, latents: Folder, left: list[int]) -> None:
    """Encode in this process, as a worker on Ray does."""
    Encoder(sweep, "cpu").encode(latents, encoding_here(sweep), deal_of(left))


def latents_of(sweep: Sweep) -> Folder:
    return shards.latents_folder(sweep, vae.load(sweep).identity)


def made(sweep: Sweep, encode: EncodeOf = encode_here) -> LatentsManifest:
    """Make the sweep's latents; return their manifest."""

    class Replaced(OneEncoder):
        def encode(self, latents: Folder, encoding: Encoding, _: Source, left: list[int]) -> None:
            encode(self.job.sweep, latents, left)

    return LatentsManifest.require(make_latents(sweep, Replaced))


def skipping(sweep: Sweep) -> Sweep:
    """Return the sweep with a recipe that skips undecodable images."""
    data = sweep.recipe.data.model_copy(update={"undecodable": "skip"})
    return replace(sweep, recipe=sweep.recipe.model_copy(update={"data": data}))


def test_a_rerun_after_a_refused_write_ends_in_the_same_bytes(sweep: Sweep, store_url: str) -> None:
    """After one shard, and between a tar and its sidecar; damage, an incomplete pair and strays meanwhile."""
    other = sweep_with_the_vae_of(sweep, open_folder(store_url) / "elsewhere/sweeps/other")
    undisturbed, latents = made(sweep), latents_of(other)
    refused = OSError(errno.EINVAL, "Invalid request")
    with store_requests.failing(refused, "create", "000001.json"), pytest.raises(StorageError, match="Invalid request"):
        made(other)
    assert latents.list() == ["000000.json", "000000.tar", "000001.tar", "begun.json", Hardware.NAME]
    for name in ("000002.json", "000003.json", "000003.tar"):
        latents.write(name, b"{}")
    encoded: list[list[int]] = []

    def counted(*arguments: Any) -> None:
        encoded.append(arguments[-1])
        encode_here(*arguments)

    assert made(other, counted) == undisturbed
    assert encoded == [[1, 2]]
    names = [f"00000{n}.{kind}" for n in range(3) for kind in ("json", "tar")]
    assert latents.list() == sorted([*names, "begun.json", Hardware.NAME, manifest.NAME])
    calm = latents_of(sweep)
    assert [latents.read(name) for name in names] == [calm.read(name) for name in names]


def die_between_tar_and_sidecar(sweep: str) -> None:
    """In a process of its own: kill -9 when the fourth shard's tar is written and its sidecar is not."""
    create = Folder.create

    def create_or_die(self: Folder, path: str, data: bytes) -> bool:
        if path == "000003.json":
            os.kill(os.getpid(), signal.SIGKILL)
        return create(self, path, data)

    Folder.create = create_or_die  # type: ignore[method-assign]
    made(Sweep.open(sweep))


def test_a_rerun_after_kill_9_ends_in_the_same_bytes(sweep: Sweep) -> None:
    small = sweep.recipe.precompute.model_copy(update={"shard_images": 2})
    sweep = replace(sweep, recipe=sweep.recipe.model_copy(update={"precompute": small}))
    sweep.save_recipe()
    url = sweep.folder.url
    code = f"from tests.pipelines import test_precompute as t; t.die_between_tar_and_sidecar({url!r})"
    died = subprocess.run([sys.executable, "-c", code], cwd=TINY.parents[2], capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    latents = latents_of(sweep)
    assert len(shards.finished(latents, range(13))) == 3
    elsewhere = sweep_with_the_vae_of(sweep, open_folder(f"{url}/elsewhere/sweeps/calm"))
    assert made(sweep) == made(elsewhere)
    calm = latents_of(elsewhere)
    assert latents.list() == calm.list()
    assert [latents.read(name) for name in latents.list()] == [calm.read(name) for name in calm.list()]


def test_two_precomputes_at_once_make_one_set(sweep: Sweep, store_url: str) -> None:
    other = sweep_with_the_vae_of(sweep, open_folder(store_url) / "elsewhere/sweeps/other")
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: made(other), range(2))
    assert one == two == made(sweep)
    latents = latents_of(other)
    assert shards.finished(latents, range(3)) == {0, 1, 2}


def test_a_shard_that_shrank_is_encoded_again_and_never_sealed(sweep: Sweep) -> None:
    lefts: list[list[int]] = []

    def truncate(sweep: Sweep, latents: Folder, left: list[int]) -> None:
        encode_here(sweep, latents, left)
        lefts.append(left)
        if len(lefts) == 1:
            latents.write("000001.tar", b"short")

    facts, latents = made(sweep, truncate), latents_of(sweep)
    assert (facts.count, lefts) == (26, [[0, 1, 2], [1]])
    latents.write("000001.tar", b"short")
    with pytest.raises(StorageError, match=r"000001.tar: 5 bytes, its sidecar says \d+: rerun the same command"):
        shards.write_manifest(latents, range(3), facts.made_from)


def test_a_second_sweep_on_the_same_images_and_vae_makes_nothing(sweep: Sweep, tmp_path: Path) -> None:
    """Its training finds the latents at once; the images may be gone."""
    made(sweep)
    second = sweep_with_the_vae_of(sweep, open_folder(tmp_path) / "sweeps/second")
    shutil.rmtree(tmp_path / "photos")
    make_latents(second)
    assert state.find_latents(second.folder) == latents_of(sweep)


def test_a_stop_request_is_obeyed_within_a_batch(sweep: Sweep, tmp_path: Path) -> None:
    encoder = Encoder(sweep, "cpu")
    encoder.stop()
    with pytest.raises(Preempted, match="stopped as requested"):
        encoder.encode(open_folder(tmp_path) / "one", encoder.encoding(), deal_of([0, 1, 2]))
    assert encoder.poll()[0] == 4
    assert (open_folder(tmp_path) / "one").list() == [Hardware.NAME]


def test_an_encoder_of_another_kind_is_refused(sweep: Sweep, tmp_path: Path) -> None:
    latents, other = open_folder(tmp_path) / "one", encoding_here(sweep).model_copy(update={"torch": "2.10.0"})
    with pytest.raises(UserError, match=r"this worker encodes with .*, the first one with .*torch='2.10.0'.*use equal nodes"):
        Encoder(sweep, "cpu").encode(latents, other, deal_of([0]))
    assert latents.list() == []


def test_an_attempt_reads_the_sidecars_of_finished_shards_and_no_shard(sweep: Sweep) -> None:
    facts, latents, at_start = made(sweep), latents_of(sweep), list[str]()
    latents.delete(manifest.NAME)
    latents.delete("000001.json")

    def encode(*arguments: Any) -> None:
        at_start.extend(path for verb, path in requests if verb == "read")
        encode_here(*arguments)

    with store_requests.noted() as requests:
        assert made(sweep, encode) == facts
    assert [at_start.count(f"{latents}/{name}.json") for name in ("000000", "000002")] == [1, 1]
    assert not [path for verb, path in requests if verb == "read" and path.endswith(".tar")]


def test_a_finished_set_is_sealed_without_an_encoder(sweep: Sweep) -> None:
    """Its driver died before the manifest."""
    facts, latents = made(sweep), latents_of(sweep)
    latents.delete(manifest.NAME)

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is left to encode")

    assert made(sweep, refuse) == facts


def test_another_kind_of_hardware_may_not_fill_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = open_folder(tmp_path)
    require_same_hardware(latents, "cpu")
    require_same_hardware(latents, "cpu")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "a slide rule")
    with pytest.raises(UserError, match=r"started on 'CPU with .*', this worker has 'CPU with a slide rule'"):
        require_same_hardware(latents, "cpu")
