"""Who encodes a shard changes nothing in it; what cannot be decoded is refused by name, or skipped and counted."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dis_scale import vae
from dis_scale.data import shards
from dis_scale.data.encode import HARDWARE, Setup, encode_images, encode_shards, require_same_hardware
from dis_scale.data.sources import open_source
from dis_scale.errors import Preempted, StorageError, UndecodableImage, UserError
from dis_scale.recipe import Recipe, TrainedVae, reading
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder, open_folder
from pipelines import precompute, stage
from pipelines.precompute import Dealer, Encode, Encoder
from tests.conftest import TINY


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
def sweep(tmp_path: Path, photos: Recipe) -> Folder:
    made = open_folder(tmp_path) / "sweeps/photos"
    assert isinstance(photos.vae, TrainedVae)
    vae.save(made / "vae", vae.new(photos.vae, photos.data.resolution))
    return made


def shards_by(workers: int, sweep: Folder, recipe: Recipe, at: Folder) -> dict[str, bytes]:
    """The three shards as made by so many workers at once."""
    dealer = Dealer([0, 1, 2])
    with ThreadPoolExecutor(workers) as pool:
        done = [pool.submit(Encoder().encode, sweep, at, recipe, "cpu", dealer.next) for _ in range(workers)]
    for each in done:
        each.result()
    return {name: at.read(name) for name in at.list() if name != HARDWARE}


@pytest.mark.parametrize("workers", [2, 8])
def test_many_encoders_make_the_same_bytes_as_one(workers: int, sweep: Folder, photos: Recipe, tmp_path: Path) -> None:
    one = shards_by(1, sweep, photos, open_folder(tmp_path) / "one")
    assert sorted(one) == [f"00000{n}.{kind}" for n in range(3) for kind in ("json", "tar")]
    assert one == shards_by(workers, sweep, photos, open_folder(tmp_path) / "many")


def test_a_broken_image_is_refused_by_name_and_nothing_is_half_written(
    sweep: Folder, photos: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "photos/a/00.png").write_bytes(b"broken")
    with pytest.raises(
        UndecodableImage,
        match=r"image a/00.png cannot be decoded: .*; repair or remove it, or --set data.undecodable=skip",
    ):
        shards_by(1, sweep, photos, open_folder(tmp_path) / "one")
    assert (open_folder(tmp_path) / "one").list() == [HARDWARE]


def test_an_image_that_is_gone_is_no_broken_image(sweep: Folder, photos: Recipe, tmp_path: Path) -> None:
    """Skipping is for what cannot be decoded: storage that is away must not thin the set out."""
    open_source(photos.data, shards.store_of(sweep))
    (tmp_path / "photos/a/00.png").unlink()
    with pytest.raises(StorageError, match=r"image a/00.png is gone") as caught:
        shards_by(1, sweep, skipping(photos), open_folder(tmp_path) / "one")
    assert not isinstance(caught.value, UndecodableImage)


def test_a_broken_image_is_skipped_counted_and_listed_by_choice(sweep: Folder, photos: Recipe, tmp_path: Path) -> None:
    (tmp_path / "photos/a/00.png").write_bytes(b"broken")
    found = made(sweep, skipping(photos))
    assert (found["count"], found["images"], found["refused"]) == (25, 26, ["a/00.png"])
    assert [shard["count"] for shard in found["shards"]] == [9, 10, 6]


def test_a_set_without_an_image_is_refused(sweep: Folder, photos: Recipe, tmp_path: Path) -> None:
    for path in (tmp_path / "photos").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no image could be decoded; the first of 26: \['a/00.png'\]"):
        made(sweep, skipping(photos))


def test_hardware_of_another_kind_may_not_fill_one_set(tmp_path: Path) -> None:
    precompute._require_one_kind(open_folder(tmp_path), "cpu", "listing")
    precompute._require_one_kind(open_folder(tmp_path), "cpu", "listing")
    with pytest.raises(UserError, match=r"begun with device 'cpu', now 'cuda': finish it as it was begun"):
        precompute._require_one_kind(open_folder(tmp_path), "cuda", "listing")
    with pytest.raises(UserError, match=r"begun with listing 'listing', now 'with more images'"):
        precompute._require_one_kind(open_folder(tmp_path), "cpu", "with more images")


def test_the_padding_of_the_last_batch_changes_no_other_sample(sweep: Folder, photos: Recipe) -> None:
    source, encoder = open_source(photos.data), vae.load(photos.vae, sweep)
    images = np.stack([source.pixels(i, 32) for i in range(4)])
    np.testing.assert_array_equal(encode_images(encoder, images[:3], 4), encode_images(encoder, images, 4)[:3])


def test_the_horizontal_flip_is_encoded_with_the_image(sweep: Folder, photos: Recipe) -> None:
    source, encoder = open_source(photos.data), vae.load(photos.vae, sweep)
    image = source.pixels(0, 32)[None]
    (moments,) = encode_images(encoder, image, 1)
    np.testing.assert_array_equal(moments[1], encoder.encode(image[:, :, ::-1]).half().numpy()[0])
    assert not np.array_equal(moments[0], moments[1])


def test_every_shard_holds_its_positions_in_their_order(sweep: Folder, photos: Recipe) -> None:
    """Whatever the read-ahead: 26 images in shards of ten, batches of four."""
    setup = Setup(open_source(photos.data), vae.load(photos.vae, sweep), photos)
    reports: list[int] = []
    content = list(encode_shards(setup, [2, 0], reports.append))
    assert [(m.number, [s.position for s in m.samples]) for m in content] == [(2, [*range(20, 26)]), (0, [*range(10)])]
    assert reports == [4, 2, 4, 4, 2]
    for sample in content[1].samples:
        assert (sample.name, sample.label) == (
            setup.source.names[sample.position],
            setup.source.labels[sample.position],
        )


# -- again, after any accident -----------------------------------------------------------------------------------------


def here(sweep: Folder, latents: Folder, setup: Setup, device: str, left: list[int]) -> None:
    """Workers as on Ray, in this process."""
    Encoder().encode(sweep, latents, setup.recipe, device, Dealer(left).next)


def place_of(sweep: Folder, recipe: Recipe) -> Folder:
    return shards.latents_folder(sweep, recipe, vae.load(recipe.vae, sweep).identity)


def made(sweep: Folder, recipe: Recipe, how: Encode = here) -> dict[str, Any]:
    """The sealed set's manifest."""
    latents = place_of(sweep, recipe)
    setup = Setup(open_source(recipe.data, shards.store_of(sweep)), vae.load(recipe.vae, sweep), recipe)
    precompute.make(sweep, latents, setup, "cpu", how)
    found = manifest.find(latents)
    assert found is not None
    return found


def skipping(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"undecodable": "skip"})})


class Killed(Exception):
    pass


def test_what_a_killed_worker_left_is_taken_up_to_the_same_bytes(
    sweep: Folder, photos: Recipe, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after one shard, and between a tar and its sidecar; damage, a torn pair and strays meanwhile."""
    other = open_folder(store_url) / "elsewhere/sweeps/other"
    vae.save(other / "vae", vae.load(photos.vae, sweep).net)
    undisturbed, latents = made(sweep, photos), place_of(other, photos)
    put = Folder.write_json

    def killed(self: Folder, path: str, value: Any) -> None:
        if path == "000001.json":
            raise Killed
        put(self, path, value)

    monkeypatch.setattr(Folder, "write_json", killed)
    with pytest.raises(Killed):
        made(other, photos)
    monkeypatch.undo()
    assert latents.list() == ["000000.json", "000000.tar", "000001.tar", "begun.json", HARDWARE]
    for name in ("000002.json", "000003.json", "000003.tar"):
        latents.write(name, b"{}")
    asked: list[list[int]] = []

    def counted(*arguments: Any) -> None:
        asked.append(arguments[-1])
        here(*arguments)

    assert made(other, photos, counted) == undisturbed
    assert asked == [[1, 2]]
    names = [f"00000{n}.{kind}" for n in range(3) for kind in ("json", "tar")]
    assert latents.list() == sorted([*names, "begun.json", HARDWARE, manifest.NAME])
    mine = place_of(sweep, photos)
    assert [latents.read(name) for name in names] == [mine.read(name) for name in names]


def die_between_tar_and_sidecar(sweep: str) -> None:
    """In a process of its own: kill -9 when the fourth shard's tar stands and its sidecar does not."""
    put = Folder.write_json

    def put_or_die(self: Folder, path: str, value: Any) -> None:
        if path == "000003.json":
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, path, value)

    Folder.write_json = put_or_die  # type: ignore[method-assign]
    made(open_folder(sweep), stage.load_recipe(open_folder(sweep)))


def test_a_process_killed_with_9_is_taken_up_to_the_same_bytes(sweep: Folder, photos: Recipe) -> None:
    small = photos.model_copy(update={"precompute": photos.precompute.model_copy(update={"shard_images": 2})})
    sweep.write(reading.FILE, reading.dump(small).encode())
    code = f"from tests.pipelines import test_precompute as t; t.die_between_tar_and_sidecar({sweep.url!r})"
    died = subprocess.run([sys.executable, "-c", code], cwd=TINY.parents[2], capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    latents = place_of(sweep, small)
    assert len(shards.finished(latents, range(13))) == 3
    elsewhere = open_folder(f"{sweep.url}/elsewhere/sweeps/calm")
    vae.save(elsewhere / "vae", vae.load(small.vae, sweep).net)
    assert made(sweep, small) == made(elsewhere, small)
    calm = place_of(elsewhere, small)
    assert latents.list() == calm.list()
    assert [latents.read(name) for name in latents.list()] == [calm.read(name) for name in calm.list()]


def test_two_precomputes_at_once_end_well(sweep: Folder, photos: Recipe, store_url: str) -> None:
    other = open_folder(store_url) / "elsewhere/sweeps/other"
    vae.save(other / "vae", vae.load(photos.vae, sweep).net)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: made(other, photos), range(2))
    assert one == two == made(sweep, photos)
    latents = place_of(other, photos)
    assert shards.finished(latents, range(3)) == {0, 1, 2}


def test_a_shard_that_shrank_before_the_seal_is_not_sealed(sweep: Folder, photos: Recipe) -> None:
    def torn(sweep: Folder, latents: Folder, *rest: Any) -> None:
        here(sweep, latents, *rest)
        latents.write("000001.tar", b"short")

    with pytest.raises(StorageError, match=r"000001.tar: 5 bytes, its sidecar says \d+: rerun the same command"):
        made(sweep, photos, torn)
    assert manifest.find(place_of(sweep, photos)) is None
    assert made(sweep, photos)["count"] == 26


def test_a_second_sweep_on_the_same_images_and_vae_makes_nothing(
    sweep: Folder, photos: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its training finds the latents at once; the images need not even be there any more."""
    made(sweep, photos)
    second = open_folder(tmp_path) / "sweeps/second"
    vae.save(second / "vae", vae.load(photos.vae, sweep).net)
    shutil.rmtree(tmp_path / "photos")
    monkeypatch.setattr(stage, "connect", lambda: None)
    monkeypatch.setattr(stage, "choose_device", lambda _: ("cpu", "test"))
    precompute.precompute(second, photos, [])
    assert shards.latents_of(second) == place_of(sweep, photos)


def test_who_wishes_to_stop_is_obeyed_within_a_batch(sweep: Folder, photos: Recipe, tmp_path: Path) -> None:
    encoder = Encoder()
    encoder.stop()
    with pytest.raises(Preempted, match="stopped as asked"):
        encoder.encode(sweep, open_folder(tmp_path) / "one", photos, "cpu", Dealer([0, 1, 2]).next)
    assert encoder.look()[0] == 4
    assert (open_folder(tmp_path) / "one").list() == [HARDWARE]


def test_another_kind_of_hardware_may_not_fill_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = open_folder(tmp_path)
    require_same_hardware(latents, "cpu")
    require_same_hardware(latents, "cpu")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "a slide rule")
    with pytest.raises(UserError, match=r"started on 'CPU with .*', this worker has 'CPU with a slide rule'"):
        require_same_hardware(latents, "cpu")
