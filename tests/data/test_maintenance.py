"""`dis-scale data`: damage is named and repaired byte for byte; a set is described."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dis_scale import vae
from dis_scale.data.sources import open_source
from dis_scale.evaluation.sampling import COLUMN_NAMES
from dis_scale.recipe import TrainedVae, reading
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sweep
from dis_scale.sweep.documents import Hardware, LatentsManifest, ShardSidecar
from tests.conftest import TINY
from tests.support.commands import invoke
from tests.support.labelled_images import png
from tests.support.stages import make_latents

SIZES = ("data.num_classes=2", "precompute.shard_images=10", "precompute.encode_images=4")


def photos(store: Folder, images: Path, how: str = "{kind: trained, widths: [8, 8, 8]}") -> tuple[Sweep, Folder]:
    """Make (sweep, its latents) of 26 images in three shards; one image is refused."""
    for i in range(26):
        open_folder(images).write(f"{'ab'[i % 2]}/{i:02d}.png", png(i) if i != 8 else b"broken")
    source = f"data.source={{kind: folder, url: {images}}}"
    recipe = reading.load(TINY, [source, *SIZES, f"vae={how}", "data.undecodable=skip"])
    sweep = Sweep(store / "sweeps/photos", recipe)
    sweep.save_recipe()
    if isinstance(recipe.vae, TrainedVae):
        torch.manual_seed(0)
        vae.save(sweep.vae, vae.new(recipe.vae, 32))
    return sweep, make_latents(sweep)


def run(*arguments: str) -> tuple[int, str]:
    return invoke("data", *arguments)


def test_images_are_shown_above_what_the_latents_hold_of_them(tmp_path: Path) -> None:
    """Latents of pixels hold the images themselves, so another image's would be another picture."""
    sweep, _ = photos(open_folder(tmp_path) / "store", tmp_path / "images", how="{kind: none}")
    code, output = run("show", sweep.folder.url, "--out", str(tmp_path / "latents.png"))
    (decibels,) = re.findall(r"^error    PSNR (\S+) dB; the mean of a colour is off by 0.0 of 255", output, re.MULTILINE)
    assert (code, float(decibels) > 45) == (0, True), "float16"
    shown = Image.open(tmp_path / "latents.png")
    rows = np.asarray(shown).astype(int).reshape(3, 16 + 2 * 64, 640, 3)[:, 16:].reshape(3, 2, 64, 640, 3)
    names = np.array(json.loads(shown.info[COLUMN_NAMES])).reshape(3, 2, 10)
    assert (names[:, 1] == "").all(), "originals only have names"
    source = open_source(sweep.recipe.data)
    decoded = zip(source.decoded(range(26), 32), source.labels, strict=True)
    images = [(image, label) for image, label in decoded if isinstance(image, np.ndarray)]
    tiles = rows[:, 0, ::2].reshape(3, 32, 10, 64, 3)[:, :, :, ::2].swapaxes(1, 2).reshape(30, 32, 32, 3)[:25]
    for name, tile in zip(names[:, 0].ravel()[:25], tiles, strict=True):
        of_class = [image for image, label in images if source.label_names[label] == name]
        assert min(np.abs(image - tile).max() for image in of_class) <= 1
    assert np.abs(rows[:, 0] - rows[:, 1]).max() <= 1
    assert len(np.unique(rows[0, 0][:, ::64], axis=1)[0]) > 5, "they differ from each other"
    (tmp_path / "images" / "a" / "00.png").unlink()
    code, output = run("show", sweep.folder.url, "--out", str(tmp_path / "latents.png"))
    assert (code, "error    not known, the originals cannot be read: " in output) == (0, True)
    assert Image.open(tmp_path / "latents.png").size == (640, 3 * (16 + 64))


def test_damage_is_named_and_repaired_to_the_same_bytes(store_url: str, tmp_path: Path) -> None:
    sweep, latents = photos(open_folder(store_url) / "store", tmp_path / "images")
    for url in (sweep.folder.url, latents.url):
        code, output = run("verify", url)
        assert (code, output.splitlines()[-2:]) == (0, ["verify: 3/3 shards", f"complete {latents}"])
    before = {name: latents.read(name) for name in latents.list()}

    flipped = bytearray(before["000001.tar"])
    flipped[700] ^= 1
    latents.write("000001.tar", bytes(flipped))
    latents.delete("000002.tar")
    code, output = run("verify", sweep.folder.url)
    assert code == 1
    assert f"damaged  {latents}/000001.tar: damaged: its sha256 differs from the manifest's\n" in output
    assert f"damaged  {latents}/000002.tar: damaged: missing, though its manifest names it\n" in output
    assert f"2 of 3 shards damaged; to rebuild them: dis-scale data repair {sweep}" in output
    code, output = run("verify", "--fast", sweep.folder.url)
    assert (code, "000001" in output, "000002.tar: missing" in output) == (1, False, True)

    code, output = run("repair", sweep.folder.url)
    assert (code, output.splitlines()[-1]) == (0, "repaired 000001.tar, 000002.tar")
    assert {name: latents.read(name) for name in latents.list()} == before
    assert run("repair", sweep.folder.url)[1].endswith("nothing to repair: every shard is complete\n")
    assert run("verify", "--fast", sweep.folder.url) == (0, f"complete {latents} by its sizes\n")


def test_a_shard_is_repaired_whatever_its_sidecar_says(tmp_path: Path) -> None:
    """Another NumPy's sums differ in a bit: to an encoder it would be another's finished shard, of the same size."""
    sweep, latents = photos(open_folder(tmp_path) / "store", tmp_path / "images")
    good = latents.read("000001.tar")
    theirs = ShardSidecar.parse(latents.read("000001.json"), "000001.json")
    latents.write("000001.json", theirs.changed(refused=("another.png",)).signed().to_bytes())
    latents.write("000001.tar", good[:-1] + b"1")
    assert run("repair", sweep.folder.url)[1].splitlines()[-1] == "repaired 000001.tar"
    assert latents.read("000001.tar") == good


def test_a_short_shard_is_detected_by_its_size(tmp_path: Path) -> None:
    sweep, latents = photos(open_folder(tmp_path) / "store", tmp_path / "images")
    size = len(latents.read("000000.tar"))
    latents.write("000000.tar", latents.read("000000.tar")[:-1])
    assert f"000000.tar: {size - 1} bytes, its manifest says {size}" in run("verify", "--fast", sweep.folder.url)[1]


def test_a_shard_with_other_bytes_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, latents = photos(open_folder(tmp_path) / "store", tmp_path / "images")
    latents.write("000000.tar", b"damaged")
    first = open_source(sweep.recipe.data, sweep.store).names[0]
    (tmp_path / "images" / first).write_bytes(png(99))
    code, output = run("repair", sweep.folder.url)
    assert code == 1
    assert "000000.tar: rebuilt, it has other bytes" in output
    assert "an image has changed" in output
    assert latents.read("000000.tar") == b"damaged"

    good = latents.read("000001.tar")
    latents.write("000001.tar", b"damaged, too")
    (tmp_path / "images" / first).unlink()
    code, output = run("repair", sweep.folder.url)
    assert (code, "1 of 2 damaged shards cannot be rebuilt: 000000.tar; the first: " in output) == (1, True), output
    assert latents.read("000001.tar") == good, "the others are rebuilt"

    monkeypatch.setattr(torch, "__version__", "9.9")
    code, output = run("repair", sweep.folder.url)
    assert code == 2
    assert "now 9.9: a rebuilt shard would have other bytes" in output


def with_another_order(latents: Folder) -> None:
    made = LatentsManifest.require(latents)
    made.changed(made_from=made.made_from.model_copy(update={"order": "other"})).write(latents)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_another_order, "encoded with order other, now"),
        (Hardware(hardware="CPU with VSX").write, "encoded on 'CPU with VSX', this is 'CPU with "),
    ],
    ids=["order", "hardware"],
)
def test_a_set_that_was_made_otherwise_is_not_repaired(tmp_path: Path, change: Callable[[Folder], None], words: str) -> None:
    sweep, latents = photos(open_folder(tmp_path) / "store", tmp_path / "images")
    change(latents)
    latents.write("000000.tar", b"damaged")
    code, output = run("repair", sweep.folder.url)
    assert (code, words in output) == (2, True)


def test_a_folder_of_latents_alone_cannot_be_repaired(tmp_path: Path) -> None:
    _, latents = photos(open_folder(tmp_path) / "store", tmp_path / "images")
    code, output = run("repair", latents.url)
    assert (code, "a folder of latents: give the sweep's folder" in output) == (2, True)


@pytest.mark.parametrize("command", ["verify", "repair", "show"])
def test_other_folders_are_refused(command: str, tmp_path: Path) -> None:
    code, output = run(command, str(tmp_path))
    assert code == 2
    assert f"{tmp_path}: neither a sweep with complete latents nor a folder of complete latents" in output


def test_show_describes_a_set_and_its_images(tmp_path: Path) -> None:
    sweep, latents = photos(open_folder(tmp_path) / "store", tmp_path / "images")
    code, output = run("show", sweep.folder.url, "--out", str(tmp_path / "grid.png"))
    assert code == 0
    lines = dict(line.split(None, 1) for line in output.splitlines())
    size = sum(len(latents.read(f"00000{n}.tar")) for n in range(3)) / 1e6
    assert lines["images"] == f"25 in 3 shards, {size:.1f} MB, 1 refused: a/08.png"
    assert lines["latent"] == "4x8x8, float16 moments of image and horizontal flip"
    assert lines["labels"] == "2 of 2 classes: a 12, b 13"
    assert lines["source"].startswith(f"url {tmp_path}/images, kind folder; listing ")
    assert lines["vae"] == vae.load(sweep).identity[:12]
    assert lines["grid"] == f"{tmp_path}/grid.png"
    assert Image.open(tmp_path / "grid.png").size == (10 * 64, 3 * 16 + 6 * 64)

    code, output = run("show", latents.url)
    assert (code, output.splitlines()[-1]) == (0, "grid     none: to decode images, give the sweep's folder or --vae")
    vae.new(TrainedVae(kind="trained", widths=(8, 8)), 32).save_pretrained(tmp_path / "other")
    code, output = run("show", latents.url, "--vae", str(tmp_path / "other"))
    assert (code, "latents of another VAE" in output) == (2, True)


def test_show_needs_no_vae_for_pixels(tmp_path: Path) -> None:
    """The grid has the source's pictures."""
    _, latents = photos(open_folder(tmp_path) / "store", tmp_path / "images", "{kind: none}")
    code, _ = run("show", latents.url, "--out", str(tmp_path / "grid.png"))
    assert code == 0
    assert run("show", latents.url, "--vae", "none", "--out", str(tmp_path / "grid.png"))[0] == 0
    recipe = reading.load(TINY, [f"data.source={{kind: folder, url: {tmp_path}/images}}", "data.num_classes=2"])
    first = Image.fromarray(open_source(recipe.data).pixels(0, 32)).resize((64, 64), Image.Resampling.NEAREST)
    assert Image.open(tmp_path / "grid.png").crop((0, 16, 64, 16 + 64)).tobytes() == first.tobytes()
