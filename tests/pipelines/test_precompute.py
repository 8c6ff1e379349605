"""Who encodes a shard changes nothing in it; what cannot be decoded is refused by name, or skipped and counted."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dis_scale import recipe as recipes
from dis_scale import vae
from dis_scale.data.sources import open_source
from dis_scale.errors import StorageError, UndecodableImage, UserError
from dis_scale.recipe import Recipe, TrainedVae
from dis_scale.storage import Folder, folder
from pipelines import precompute
from pipelines.precompute import Encoder
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
    return recipes.load(TINY, [source, *sizes])


@pytest.fixture
def sweep(tmp_path: Path, photos: Recipe) -> Folder:
    made = folder(tmp_path) / "sweeps/photos"
    assert isinstance(photos.vae, TrainedVae)
    vae.save(made / "vae", vae.new(photos.vae, photos.data.resolution))
    return made


def shards_by(workers: int, sweep: Folder, recipe: Recipe, at: Folder) -> dict[str, bytes]:
    for worker in range(workers):
        Encoder().encode(sweep, at, recipe, "cpu", list(range(3))[worker::workers])
    return {name: at.read(name) for name in at.list()}


def test_two_encoders_make_the_same_bytes_as_one(sweep: Folder, photos: Recipe, tmp_path: Path) -> None:
    one = shards_by(1, sweep, photos, folder(tmp_path) / "one")
    two = shards_by(2, sweep, photos, folder(tmp_path) / "two")
    assert sorted(one) == [f"00000{n}.{kind}" for n in range(3) for kind in ("json", "tar")]
    assert one == two


def test_a_broken_image_is_refused_by_name_and_nothing_is_half_written(
    sweep: Folder, photos: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "photos/a/00.png").write_bytes(b"broken")
    with pytest.raises(
        UndecodableImage,
        match=r"image a/00.png cannot be decoded: .*; mend or remove it, or --set data.undecodable=skip",
    ):
        shards_by(1, sweep, photos, folder(tmp_path) / "one")
    assert (folder(tmp_path) / "one").list() == []


def test_an_image_that_is_gone_is_no_broken_image(sweep: Folder, photos: Recipe, tmp_path: Path) -> None:
    """Skipping is for what cannot be decoded: storage that is away must not thin the set out."""
    skipping = photos.model_copy(update={"data": photos.data.model_copy(update={"undecodable": "skip"})})
    source = open_source(skipping.data)
    (tmp_path / "photos/a/00.png").unlink()
    with pytest.raises(StorageError, match=r"image a/00.png is gone") as caught:
        precompute._decode(source, skipping, 0)
    assert not isinstance(caught.value, UndecodableImage)


def test_a_broken_image_is_skipped_and_counted_by_choice(sweep: Folder, photos: Recipe, tmp_path: Path) -> None:
    (tmp_path / "photos/a/00.png").write_bytes(b"broken")
    skipping = photos.model_copy(update={"data": photos.data.model_copy(update={"undecodable": "skip"})})
    place = folder(tmp_path) / "one"
    shards_by(1, sweep, skipping, place)
    sidecar = place.read_json("000000.json")
    assert (sidecar["count"], sidecar["refused"]) == (9, ["a/00.png"])


def test_hardware_of_another_kind_may_not_fill_one_set(tmp_path: Path) -> None:
    precompute._require_one_kind(folder(tmp_path), "cpu", "listing")
    precompute._require_one_kind(folder(tmp_path), "cpu", "listing")
    with pytest.raises(UserError, match=r"begun with device 'cpu', now 'cuda': finish it as it was begun"):
        precompute._require_one_kind(folder(tmp_path), "cuda", "listing")
    with pytest.raises(UserError, match=r"begun with listing 'listing', now 'with more images'"):
        precompute._require_one_kind(folder(tmp_path), "cpu", "with more images")


def test_the_padding_of_the_last_batch_changes_no_other_sample(sweep: Folder, photos: Recipe) -> None:
    source, encoder = open_source(photos.data), vae.load(photos.vae, sweep)
    images = {i: source.pixels(i, 32) for i in range(6)}
    padded = precompute._encode(encoder, source, images, 4)
    full = precompute._encode(encoder, source, {i: images[i] for i in range(4)}, 4)
    for one, other in zip(padded[:4], full, strict=True):
        np.testing.assert_array_equal(one.moments, other.moments)
    assert [s.position for s in padded] == list(range(6))


def test_the_mirror_image_is_encoded_beside_the_image(sweep: Folder, photos: Recipe) -> None:
    source, encoder = open_source(photos.data), vae.load(photos.vae, sweep)
    image = source.pixels(0, 32)
    (sample,) = precompute._encode(encoder, source, {0: image}, 1)
    mirrored = encoder.encode(image[None, :, ::-1]).half().numpy()[0]
    np.testing.assert_array_equal(sample.moments[1], mirrored)
    assert not np.array_equal(sample.moments[0], sample.moments[1])
