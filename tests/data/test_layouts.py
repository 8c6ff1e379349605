"""Latents of other programs: each is read once with its class, what is not an autoencoder's own is refused, exports come back.

The programs' own ways of reading are written out below from their sources; they know nothing of the project.
"""

import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image

from dis_scale.data import given as exporting
from dis_scale.data import layouts, shards
from dis_scale.data.latents import Latents
from dis_scale.data.matching import UNMATCHED
from dis_scale.data.mixing import permutation
from dis_scale.data.sources import open_source
from dis_scale.process.errors import StorageError, UndecodableImage, UserError
from dis_scale.recipe import Data, LatentShape, reading
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import REAL, Sweep
from dis_scale.sweep.documents import EncodedBy, LatentsManifest
from dis_scale.vae import from_path, load
from dis_scale.vae.exported import ProgramVae, load_exported
from tests.conftest import TINY
from tests.support.autoencoders import exported
from tests.support.commands import invoke
from tests.support.labelled_images import latents_source, png
from tests.support.stages import make_latents

IMAGES = 1797


WITHOUT_IMAGES = [
    "evaluate.extractor={kind: inception}", "evaluate.samples=5000", "evaluate.reference=adm.npz", "evaluate.floor=false",
]  # fmt: skip


SCALE: dict[str, Any] = {"scale": 0.3, "shift": -0.2}


def sweep_of(root: Path, vae: str, *more: str) -> Sweep:
    recipe = reading.load(TINY, [f"vae={vae}", "precompute.shard_images=450", *more])
    sweep = Sweep.below(open_folder(root), recipe)
    sweep.save_recipe()
    return sweep


def given(root: Path, vae: str, layout: str, url: Path, *more: str) -> Sweep:
    declared = f"data.source={{kind: latents, layout: {layout}, url: {url}}}"
    return sweep_of(root, vae, declared, *WITHOUT_IMAGES, *more)


def stored(latents: Folder) -> dict[int, tuple[bytes, int]]:
    """Moments of the unflipped images and their classes by place in the source, whose digits are listed in the mixed order."""
    everything, places = dict[int, tuple[bytes, int]](), permutation(IMAGES)
    for entry in LatentsManifest.require(latents).shards:
        data = latents.read(entry.name)
        shard = shards.unpack(data, entry.name)
        values = zip(places[shards.positions(data)].tolist(), shard.moments[:, 0], shard.labels.tolist(), strict=True)
        everything |= {position: (moments.tobytes(), label) for position, moments, label in values}
    return everything


def as_edm2_reads(folder: Path) -> dict[str, tuple[np.ndarray, int]]:
    """What EDM2's `ImageFolderDataset` returns: all `.npy` by name, shaped to three axes, and the class of `dataset.json`."""
    labels = dict(json.loads((folder / "dataset.json").read_text())["labels"])
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.npy"))
    arrays = [np.load(folder / name) for name in names]
    return {n: (a.reshape(-1, *a.shape[-2:]), labels[n]) for n, a in zip(names, arrays, strict=True)}


def as_maskdit_reads(folder: Path) -> dict[str, tuple[np.ndarray, int]]:
    """What MaskDiT's loader returns of each sample: `latent` unpickled, `cls` as a number."""
    found = dict[str, dict[str, bytes]]()
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[kind] = file.read()
    return {key: (pickle.loads(each["latent"]), int(each["cls"].decode())) for key, each in found.items()}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Folder]:
    """An autoencoder with a variance, and the latents that it makes of the digits."""
    root = tmp_path_factory.mktemp("encoded")
    vae = exported(root / "vae", posterior=True, **SCALE).model_dump_json(exclude_none=True)
    return vae, make_latents(sweep_of(root / "root", vae))


def export(latents: Folder, layout: str, out: Path) -> Path:
    code, output = invoke("data", "export", latents.url, "--layout", layout, "--out", str(out))
    assert code == 0, output
    assert f"exported {IMAGES:,} latents" in output
    return out


def zipped(folder: Path) -> Path:
    """A zip as EDM2's tool writes it: members as they are, without folders of their own."""
    out = folder.with_suffix(".zip")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            file.write(path, path.relative_to(folder))
    return out


@pytest.mark.parametrize("layout", ["edm2", "edm2 in a zip", "repa", "webdataset"])
def test_an_export_comes_back_to_the_bit(layout: str, encoded: tuple[str, Folder], tmp_path: Path) -> None:
    vae, latents = encoded
    kind = layout.split()[0]
    out = export(latents, kind, tmp_path / "out")
    original = stored(latents)
    if kind == "webdataset":
        theirs = as_maskdit_reads(out)
        assert sorted(map(int, theirs)) == sorted(original)
        for key, (moments, _) in theirs.items():
            assert moments.dtype == np.float32
            assert moments.astype(np.float16).tobytes() == original[int(key)][0]
    else:
        theirs = as_edm2_reads(out / "vae-sd" if kind == "repa" else out)
        assert sorted(int(key[-12:-4]) for key in theirs) == sorted(original)
        for key, (moments, _) in theirs.items():
            mean, deviation = np.split(moments, 2)
            assert moments.dtype == np.float32
            assert (deviation == np.float32(np.exp(-2))).all()
            assert mean.astype(np.float16).tobytes() == original[int(key[-12:-4])][0][: mean.size * 2]
    # numbered in the source's own order, in which the digits begin with 0 to 9
    first = sorted((key, y) for key, (_, y) in theirs.items())[:10]
    assert [y for _, y in first] == list(range(10))
    sweep = given(tmp_path / "root", vae, kind, zipped(out) if "zip" in layout else out)
    back = make_latents(sweep)
    assert LatentsManifest.require(back).encoding.sides == 1
    assert sorted(stored_as_listed(back)) == sorted(original.values())
    assert Image.open(io.BytesIO(sweep.folder.read(REAL))).width > 32
    positions = np.arange(64)
    moments, labels = Latents(back, seed=0).read(positions, np.zeros(64, np.int64))
    assert moments.shape == (64, 24, 16, 16)
    assert len(set(labels.tolist())) == 10


@pytest.mark.parametrize("kind", ["tar", "parquet", "csv", "latents"])
def test_repas_layout_is_refused_where_its_images_would_have_another_order(
    kind: str, encoded: tuple[str, Folder], tmp_path: Path
) -> None:
    latents = open_folder(tmp_path / "latents")
    manifest = LatentsManifest.require(encoded[1])
    source = {"kind": kind, "url": "x"}
    manifest.changed(made_from=manifest.made_from.model_copy(update={"source": source})).write(latents)
    code, output = invoke("data", "export", latents.url, "--layout", "repa", "--out", str(tmp_path / "out"))
    assert (code, f"of kind {kind}, 0 left out: use --layout edm2" in " ".join(output.split())) == (2, True), output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("beside", "classes", "words"),
    [
        ("top.png", 2, r"REPA would pair latents with other images: its tool also takes top.png, which the listing"),
        ("a/.x.png", 2, r"its tool also takes a/.x.png, which the listing left out: remove them and their like"),
        ("a/.DS_Store", 2, r"its tool also takes a/.DS_Store, which the listing left out"),
        ("__MACOSX/z.png", 2, r"its tool also takes __MACOSX/z.png, which"),
        ("a/x.jp2", 2, r"its tool also takes a/x.jp2, which"),
        ("a/notes.txt", "none", r"it has no classes, and REPA needs one for each image: use --layout edm2"),
        ("a/notes.txt", 2, None),
    ],
)
def test_repas_layout_is_refused_if_its_code_would_read_other_images_or_no_classes(
    beside: str, classes: int | str, words: str | None, tmp_path: Path
) -> None:
    images, out = open_folder(tmp_path / "images"), open_folder(tmp_path / "out")
    for name in ("a/1.png", "b/2.png", beside):
        images.write(name, png(1))
    more = [f"data.source={{kind: folder, url: {images}}}", f"data.num_classes={classes}"]
    more += [*WITHOUT_IMAGES[:2], "evaluate.guidance=1", "evaluate.variants={}"] if classes == "none" else []
    latents = make_latents(sweep_of(tmp_path / "root", "{kind: none}", *more))
    if words is None:
        assert exporting.export(latents, "repa", out, lambda *_: None) == 2
        return
    with pytest.raises(UserError, match=words):
        exporting.export(latents, "repa", out, lambda *_: None)


def test_the_folder_of_repas_latents_itself_is_refused(tmp_path: Path) -> None:
    settings = {"source": latents_source("repa", tmp_path / "vae-sd"), "resolution": 8, "num_classes": 10, "mirror": False}
    with pytest.raises(UserError, match=r"vae-sd has the latents: layout repa expects the folder above vae-sd"):
        open_source(Data.model_validate(settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mirror", ["false", "true"])
def test_safetensors_have_mirror_images_if_the_recipe_uses_them(dtype: torch.dtype, mirror: str, tmp_path: Path) -> None:
    vae = exported(tmp_path / "vae", posterior=False, **SCALE).model_dump_json(exclude_none=True)
    original = make_latents(sweep_of(tmp_path / "root", vae))
    folder = tmp_path / "given"
    folder.mkdir()
    rows = list[bytes]()
    for number, entry in enumerate(LatentsManifest.require(original).shards):
        shard = shards.unpack(original.read(entry.name), entry.name)
        image, flip = (torch.from_numpy(np.array(shard.moments[:, side])).to(dtype).contiguous() for side in (0, 1))
        tensors = {"latents": image, "labels": torch.from_numpy(np.array(shard.labels))}
        if mirror == "true":
            tensors["latents_flip"] = flip
            image = torch.stack([image, flip], 1)
        safetensors.torch.save_file(tensors, folder / f"latents_rank00_shard{number:03d}.safetensors", {"format": "pt"})
        rows += [each.half().numpy().tobytes() + bytes([y]) for each, y in zip(image, shard.labels.tolist(), strict=True)]
    back = make_latents(given(tmp_path / "root", vae, "safetensors", folder, f"data.mirror={mirror}"))
    read = [shards.unpack(back.read(e.name), e.name) for e in LatentsManifest.require(back).shards]
    sides = 1 + (mirror == "true")
    assert {shard.moments.shape[1:] for shard in read} == {(sides, 12, 16, 16)}
    got = [m.tobytes() + bytes([y]) for shard in read for m, y in zip(shard.moments, shard.labels.tolist(), strict=True)]
    assert sorted(got) == sorted(rows)
    if mirror == "false":
        with pytest.raises(UserError, match=r"no tensor 'latents_flip'.*set data.mirror: false"):
            make_latents(given(tmp_path / "other", vae, "safetensors", folder, "data.mirror=true"))


def rewrite(folder: Path, change: Callable[[list[Any]], Any]) -> None:
    where = folder / "dataset.json"
    labels = json.loads(where.read_text())
    where.write_text(json.dumps({"labels": change(labels["labels"])}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda labels: labels[1:], r"00000/img-mean-std-00000000.npy has no class in dataset.json"),
        (lambda labels: [*labels, ["00009/x.npy", 1]], r"1 files of dataset.json are not there: 00009/x.npy"),
        (lambda labels: None, "its labels are empty: set data.num_classes: none"),
        (lambda labels: [[name, [0.5]] for name, _ in labels], r"has the class \[0.5\], expected a number"),
        (lambda labels: [[name, y + 1] for name, y in labels], "data.num_classes: got 10, but .* has labels up to 10"),
        (lambda labels: 5, r"expected \{\"labels\": \[\[file, class\], ...\]\}"),
    ],
)
def test_classes_that_do_not_fit_are_refused(
    change: Callable[[list[Any]], Any], words: str, encoded: tuple[str, Folder], tmp_path: Path
) -> None:
    vae, latents = encoded
    out = export(latents, "edm2", tmp_path / "out")
    rewrite(out, change)
    with pytest.raises(UserError, match=words):
        make_latents(given(tmp_path / "root", vae, "edm2", out))


def test_what_is_beside_latents_is_counted_and_unlabelled_ones_need_no_classes(encoded: tuple[str, Folder], tmp_path: Path) -> None:
    vae, latents = encoded
    out = export(latents, "edm2", tmp_path / "out")
    (out / "readme.txt").write_text("hello")
    (out / "00000/._img-mean-std-00000000.npy").write_text("of macOS")
    (out / "dataset.json").unlink()
    with pytest.raises(
        UserError, match=r"no classes in .*dataset.json, which is beside the folder 00000; for latents without .*num_classes: none"
    ):
        make_latents(given(tmp_path / "root", vae, "edm2", out))
    unlabelled = given(tmp_path / "root", vae, "edm2", out, "data.num_classes=none", "evaluate.guidance=1", "evaluate.variants={}")
    manifest = LatentsManifest.require(make_latents(unlabelled))
    assert manifest.count == IMAGES
    assert manifest.labels == {"0": IMAGES}


def odd_files(out: Path) -> dict[str, int]:
    """One folder behind a link, a name as of an incomplete file, and other files beside the latents."""
    (out / "00001").rename(out.parent / "elsewhere")
    (out / "00001").symlink_to(out.parent / "elsewhere")
    old, new = layouts.edm2_file(3), "00000/deep/x.part-3.npy"
    (out / new).parent.mkdir()
    (out / old).rename(out / new)
    rewrite(out, lambda labels: [[new if name == old else name, y] for name, y in labels])
    for name in ("._img.npy", "00000/notes.txt", ".git/x.npy", "preview.png"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"none")
    return {"hidden": 2, ".txt": 1, ".png": 1}


def odd_tars(out: Path) -> dict[str, int]:
    """One tar behind a link; links, captions and a Mac's file in the other ones, and files beside them."""
    first, *others = sorted(out.glob("*.tar"))
    first.rename(out.parent / "elsewhere.tar")
    first.symlink_to(out.parent / "elsewhere.tar")
    for path in others:
        with tarfile.open(path, "a") as tar:
            for name, kind in (("l.latent", tarfile.SYMTYPE), ("0.txt", tarfile.REGTYPE), ("._x.latent", tarfile.REGTYPE)):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "0.latent"
                tar.addfile(member)
    for name in ("._000000.tar", "notes.txt"):
        (out / name).write_bytes(b"none")
    return {"links in tars": len(others), ".txt": len(others), "hidden": len(others) + 1, UNMATCHED: 1}


def odd_zip(out: Path) -> dict[str, int]:
    """As the files, but no link, which zips have not."""
    left_out = odd_files(out)
    (out / "00001").unlink()
    (out.parent / "elsewhere").rename(out / "00001")
    return left_out


@pytest.mark.parametrize(
    ("layout", "odd"), [("edm2", odd_files), ("edm2 in a zip", odd_zip), ("repa", odd_files), ("webdataset", odd_tars)]
)
def test_each_latent_comes_back_once_beside_other_files(
    layout: str, odd: Callable[[Path], dict[str, int]], encoded: tuple[str, Folder], tmp_path: Path
) -> None:
    vae, latents = encoded
    kind = layout.split()[0]
    out = export(latents, kind, tmp_path / "out")
    left_out = odd(out / "vae-sd" if layout == "repa" else out)
    sweep = given(tmp_path / "root", vae, kind, zipped(out) if "zip" in layout else out)
    assert sorted(stored_as_listed(make_latents(sweep))) == sorted(stored(latents).values())
    listed = open_source(sweep.recipe.data, sweep.store).listing.manifest.left_out
    assert {why: count for why, (count, _) in listed.items()} == left_out


def test_each_row_of_safetensors_comes_back_once_beside_other_files(tmp_path: Path) -> None:
    """One file behind a link, one without rows, another tensor, a Mac's file, and files beside them."""
    vae = exported(tmp_path / "vae", posterior=False, **SCALE).model_dump_json(exclude_none=True)
    original, out = make_latents(sweep_of(tmp_path / "root", vae)), tmp_path / "out"
    out.mkdir()
    for entry in LatentsManifest.require(original).shards:
        shard = shards.unpack(original.read(entry.name), entry.name)
        tensors = {"latents": np.ascontiguousarray(shard.moments[:, 0]), "labels": shard.labels, "more": np.zeros(3)}
        safetensors.numpy.save_file(tensors, out / f"{entry.name[:-4]}.safetensors")
    safetensors.numpy.save_file({name: each[:0].copy() for name, each in tensors.items()}, out / "none.safetensors")
    (out / "000000.safetensors").rename(tmp_path / "elsewhere")
    (out / "000000.safetensors").symlink_to(tmp_path / "elsewhere")
    for name in ("._000000.safetensors", "latents_stats.pt", "deep/1.safetensors"):
        open_folder(out).write(name, b"none")
    sweep = given(tmp_path / "root", vae, "safetensors", out, "data.mirror=false")
    assert sorted(stored_as_listed(make_latents(sweep))) == sorted(stored_as_listed(original))
    listed = open_source(sweep.recipe.data, sweep.store).listing.manifest.left_out
    assert {why: count for why, (count, _) in listed.items()} == {"hidden": 1, UNMATCHED: 1, "sub-folders": 1}


def test_a_second_sweep_needs_no_originals_of_a_complete_set(encoded: tuple[str, Folder], tmp_path: Path) -> None:
    vae, latents = encoded
    out = export(latents, "edm2", tmp_path / "out")
    first = make_latents(given(tmp_path / "root", vae, "edm2", out))
    shutil.rmtree(out)
    second = given(tmp_path / "root", vae, "edm2", out, "name=second")
    assert make_latents(second) == first
    assert not second.folder.exists(REAL)


def test_a_set_with_a_shard_of_refused_images_is_exported(tmp_path: Path) -> None:
    last = permutation(9)[8]
    for number in range(9):
        broken = number == last
        open_folder(tmp_path / "set").write(f"a/{number}.png", b"broken" if broken else png(number))
    source = f"data.source={{kind: folder, url: {tmp_path}/set}}"
    skipping = ("data.num_classes=1", "data.undecodable=skip", "data.held_out_images=0", "precompute.shard_images=4")
    latents = make_latents(sweep_of(tmp_path / "root", "{kind: none}", source, *skipping))
    code, output = invoke("data", "export", latents.url, "--layout", "edm2", "--out", f"{tmp_path}/out")
    assert code == 0, output
    assert len(as_edm2_reads(tmp_path / "out")) == 8


def test_a_vae_with_a_variance_decodes_latents_that_were_stored_without(tmp_path: Path) -> None:
    settings = exported(tmp_path / "vae", posterior=True, **SCALE)
    ours = load_exported(settings)
    encoder = EncodedBy(identity=ours.identity, posterior=False, scale=ours.scale, shift=ours.shift)
    found = from_path(str(tmp_path / "vae"), encoder)
    assert (found.identity, found.latent(32)) == (ours.identity, ours.latent(32))


def test_the_grid_asks_a_program_once_for_the_shape_of_its_latents(
    encoded: tuple[str, Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, latents = encoded
    sweep = given(tmp_path / "root", vae, "edm2", export(latents, "edm2", tmp_path / "out"))
    decoder, asked, latent = load(sweep), list[int](), ProgramVae.latent

    def noted(vae: ProgramVae, resolution: int) -> LatentShape:
        asked.append(resolution)
        return latent(vae, resolution)

    monkeypatch.setattr(ProgramVae, "latent", noted)
    images = exporting.as_images(open_source(sweep.recipe.data), decoder)
    assert all(images.pixels(i, 32).shape == (32, 32, 3) for i in range(3))
    assert asked == [32]


def scaled(out: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in out.rglob("*.npy"):
        np.save(path, change(np.load(path)))


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        (lambda z: z * np.float32(0.3), [], "deviation 0.19 after the scale of vae, .* are they scaled already"),
        (lambda z: z[:, ::2, ::2], [], r"latents are \(1, 24, 8, 8\), and vae makes \(1, 24, 16, 16\)"),
        (lambda z: np.concatenate([z[:12] + 20, z[12:]]), [], "-[0-9]+% explained .* expected over 0%"),
        (lambda z: np.concatenate([z[:12], z[12:] * 50]), [], "the variances of its latents are .* those that vae gives"),
        (lambda z: np.concatenate([z[:12], np.ones_like(z[12:])]), [], "is the second half deviations or log-variances"),
        (lambda z: z * np.nan, ["data.undecodable=skip"], "none of 64 latents can be read"),
    ],
)
def test_latents_that_are_not_the_autoencoders_own_are_refused_before_any_is_copied(
    change: Callable[[np.ndarray], np.ndarray], more: list[str], words: str, encoded: tuple[str, Folder], tmp_path: Path
) -> None:
    vae, latents = encoded
    out = export(latents, "edm2", tmp_path / "out")
    scaled(out, change)
    sweep = given(tmp_path / "root", vae, "edm2", out, *more)
    with pytest.raises(UserError, match=words):
        make_latents(sweep)
    assert not [name for name in (sweep.store / "latents").walk() if name.endswith(".tar")]


def test_one_latent_of_another_shape_is_named(encoded: tuple[str, Folder], tmp_path: Path) -> None:
    vae, latents = encoded
    out = export(latents, "edm2", tmp_path / "out")
    one = out / layouts.edm2_file(7)
    np.save(one, np.load(one)[:, 1:, 1:])
    with pytest.raises(UserError, match=r"latent 00000/img-mean-std-00000007.npy: got \(1, 24, 15, 15\), expected"):
        make_latents(given(tmp_path / "root", vae, "edm2", out))


def test_a_damaged_latent_is_skipped_if_the_recipe_says_so(encoded: tuple[str, Folder], tmp_path: Path) -> None:
    vae, latents = encoded
    out = export(latents, "edm2", tmp_path / "out")
    (out / layouts.edm2_file(7)).write_bytes(b"no array")
    with pytest.raises(UndecodableImage, match="img-mean-std-00000007"):
        make_latents(given(tmp_path / "root", vae, "edm2", out))
    back = make_latents(given(tmp_path / "other", vae, "edm2", out, "data.undecodable=skip"))
    assert LatentsManifest.require(back).refused == (layouts.edm2_file(7),)


def test_a_compressed_zip_and_a_damaged_one_are_refused(encoded: tuple[str, Folder], tmp_path: Path) -> None:
    vae, latents = encoded
    path = zipped(export(latents, "edm2", tmp_path / "out"))
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UserError, match="is compressed, and single latents are read: write it with zip -0"):
        make_latents(given(tmp_path / "root", vae, "edm2", tmp_path / "packed.zip"))
    (tmp_path / "cut.zip").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(StorageError, match=r"cut.zip: not a complete zip"):
        make_latents(given(tmp_path / "root", vae, "edm2", tmp_path / "cut.zip"))


def test_a_zip_that_was_streamed_is_read(encoded: tuple[str, Folder], tmp_path: Path) -> None:
    """Its members' sizes are after their bytes."""
    vae, latents = encoded
    out = export(latents, "edm2", tmp_path / "out")

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: object) -> int:
            raise OSError("a stream")

        def tell(self) -> int:
            raise OSError("a stream")

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as file:
        for path in sorted(path for path in out.rglob("*") if path.is_file()):
            file.writestr(str(path.relative_to(out)), path.read_bytes())
    (tmp_path / "streamed.zip").write_bytes(stream.getvalue())
    back = make_latents(given(tmp_path / "root", vae, "edm2", tmp_path / "streamed.zip"))
    assert sorted(stored_as_listed(back)) == sorted(stored(latents).values())


def stored_as_listed(latents: Folder) -> list[tuple[bytes, int]]:
    """Moments of the unflipped images and their classes."""
    read = [shards.unpack(latents.read(entry.name), entry.name) for entry in LatentsManifest.require(latents).shards]
    return [(m.tobytes(), y) for each in read for m, y in zip(each.moments[:, 0], each.labels.tolist(), strict=True)]


def test_an_export_needs_a_new_folder(encoded: tuple[str, Folder], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, output = invoke("data", "export", encoded[1].url, "--layout", "edm2", "--out", str(tmp_path))
    assert code == 2
    assert "it has files: give a new folder" in output


@pytest.mark.parametrize("layout", ["edm2", "webdataset"])
def test_an_export_that_was_cut_off_is_no_source_and_begins_again(
    encoded: tuple[str, Folder], tmp_path: Path, layout: exporting.Exported
) -> None:
    """Each of its files is whole, so only the missing ones tell."""
    latents, out = encoded[1], open_folder(tmp_path)
    settings = {"source": latents_source(layout, tmp_path), "resolution": 8, "num_classes": "none", "mirror": False}

    def killed(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exporting.export(latents, layout, out, killed)
    with pytest.raises(UserError, match="an export was cut off, and latents are missing"):
        open_source(Data.model_validate(settings))
    with pytest.raises(UserError, match="it has files: give a new folder"):
        exporting.export(latents, "edm2" if layout == "webdataset" else "webdataset", out, killed)
    assert exporting.export(latents, layout, out, lambda *_: None) == IMAGES
    assert len(open_source(Data.model_validate(settings))) == IMAGES


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.mirror=true"], "mirror: edm2 has no latents of mirror images: set it to false"),
        (["data.crop=[0, 0, 8]"], "crop: latents cannot be cropped"),
        (["vae={kind: none}"], "vae.kind: got none, expected pretrained or exported"),
        (["evaluate.reference=null"], "evaluate.extractor: inception needs images, and latents have none"),
        (["evaluate.floor=true"], "evaluate.floor: latents have no images to measure it with"),
        (["data.source={kind: latents, layout: edm3, url: /x}"], "edm3"),
        (["data.source.files='*.npy'"], "files: layout edm2 is read as a whole, by its dataset.json: remove it"),
    ],
)
def test_settings_that_need_images_are_refused(settings: list[str], words: str) -> None:
    good = ["data.source={kind: latents, layout: edm2, url: /x}", "vae={kind: pretrained, path: /y}", *WITHOUT_IMAGES]
    assert reading.load(TINY, good).data.given is not None
    with pytest.raises(UserError, match=words):
        reading.load(TINY, [*good, *settings])
