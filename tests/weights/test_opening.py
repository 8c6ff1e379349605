"""`dis-scale sample`: equal pictures at any batch size, and one line for each mistake."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from sklearn.datasets import load_digits

import dis_scale
from dis_scale import models, vae
from dis_scale.cli.sampling import grid_columns
from dis_scale.evaluation.adm import open_reference, write_samples
from dis_scale.process.errors import StorageError, UserError
from dis_scale.recipe import Flow, Gaussian, LatentShape, Recipe, Sampling, TrainedVae, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.documents import EncodedBy
from dis_scale.vae import PixelVae
from dis_scale.vae.scaling import Scaling
from dis_scale.weights import opening as pictures
from dis_scale.weights.checkpoints import find_checkpoint, labels_in_words
from dis_scale.weights.export import SamplingFacts, open_checkpoint, save
from dis_scale.weights.opening import image_names, labels_in_turn, labels_of_all, open_for_sampling, sample_pictures
from tests.conftest import TINY
from tests.support import ranks
from tests.support.commands import answer, invoke
from tests.support.documents import put_latents, put_published
from tests.support.published import publish, published_sweep

ROOT = Path(__file__).parents[2]


@pytest.fixture
def files(tmp_path: Path, tiny: Recipe) -> tuple[Path, Path]:
    """An exported model and an autoencoder's folder."""
    model = models.build(tiny.models["dis"], LatentShape(4, 8), 10)
    save(model, tmp_path / "model.safetensors")
    vae.new(TrainedVae(kind="trained", widths=(8, 8, 8)), 32).save_pretrained(tmp_path / "vae")
    return tmp_path / "model.safetensors", tmp_path / "vae"


def test_pixels_agree_at_any_batch_split(files: tuple[Path, Path]) -> None:
    opened = open_for_sampling(files[0], str(files[1]))
    sampling = Sampling(sampler="ddpm", steps=5, guidance=1.5)
    labels = labels_in_turn(opened, [1, 7], 6)
    assert labels == [1, 7, 1, 7, 1, 7]
    (at_once,) = sample_pictures(opened, labels, sampling=sampling, seed=3, batch=6)
    reported = list[tuple[int, int]]()
    parts = sample_pictures(opened, labels, sampling=sampling, seed=3, batch=4, progress=lambda *each: reported.append(each))
    split = np.concatenate(list(parts))
    assert reported == [(done, 10) for done in range(1, 11)], "five steps of two parts"
    assert at_once.shape == (6, 32, 32, 3)
    assert np.abs(at_once.astype(int) - split.astype(int)).max() <= 1  # float32 sums of another batch size
    (other,) = sample_pictures(opened, labels, sampling=sampling, seed=4, batch=6)
    assert not np.array_equal(at_once, other)


def test_the_command_writes_a_grid(files: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["sample", str(files[0]), "--vae", str(files[1]), "--classes", "1,7", "--steps", "2"]
    code, output = invoke(*command, "--out", str(tmp_path / "grid.png"))
    assert code == 0, output
    assert Image.open(tmp_path / "grid.png").size == (2 * 64, 64)
    found = answer(*command, "--out", str(tmp_path / "grid.png"), "--json")
    assert (found["images"], found["sampler"], found["steps"]) == (2, "ddpm", 2)
    by_name = ["sample", "--checkpoint", *command[1:], "--out", str(tmp_path / "again.png")]
    assert invoke(*by_name)[0] == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    for wrong in (["sample"], [*by_name, str(files[0])]):
        code, output = invoke(*wrong)
        assert (code, "expected one checkpoint" in output) == (2, True)


def test_classes_have_their_names_and_a_run_its_newest_weights(tmp_path: Path) -> None:
    sweep = published_sweep(str(tmp_path))
    names = [f"kind {letter}" for letter in "abcdefghij"]
    latents = sweep.store / "latents/some"
    put_latents(latents, PixelVae().identity, (3, 32), label_names=tuple(names))
    state.use_latents(sweep, latents, PixelVae().identity)
    weights = sweep.run("dis").published_at(320)
    put_published(sweep.run("dis").published_at(160), b"older", images=160)
    opened = open_for_sampling(sweep.run("dis").folder.url, None)
    assert opened.located.folder == weights
    assert labels_in_words(opened.located.class_names, "kind c, 1,kind a") == [2, 1, 0]
    with pytest.raises(UserError, match=r"classes: got 'kin c' \(did you mean 'kind c'\?\), expected labels .*, or names: kind a"):
        labels_in_words(opened.located.class_names, "kind a,kin c")
    code, output = invoke("sample", weights.url, "--classes", "kin c")
    assert (code, "loading" in output) == (2, False), "refused before PyTorch and the weights are loaded"
    put_latents(latents, PixelVae().identity, (3, 32), label_names=("tench, Tinca tinca", "0", *names[2:]))
    assert labels_in_words(opened.located.class_names, "tench, Tinca tinca") == [0], "as ImageNet's names are"
    assert labels_in_words(["tench, Tinca tinca", "b"], 'b, "tench, Tinca tinca",1') == [1, 0, 1]
    for pasted in ("a,\nb,\r\n a", "a\nb\na\n"):
        assert labels_in_words(["a", "b"], pasted) == [0, 1, 0], "as a file of names is pasted"
    own = dis_scale.open_weights(weights.url)
    by_name, by_label = (
        np.stack([np.asarray(image) for image in own.sample(classes=of, steps=1)])
        for of in (["kind c", "tench, Tinca tinca"], [2, 0])
    )
    np.testing.assert_array_equal(by_name, by_label)
    with pytest.raises(UserError, match=r"got 'kind k' \(did you mean 'kind "):
        own.sample(classes=["kind k"])
    assert labels_in_words(opened.located.class_names, "0,2") == [1, 2], "a name wins over a label: folders may be numbered from 1"
    put_latents(latents, PixelVae().identity, (3, 32), label_names=tuple(names))
    found = answer(
        "sample", sweep.run("dis").folder.url, "--classes", "kind c", "--steps", "1", "--out", f"{tmp_path}/c.png", "--json"
    )
    assert found["images"] == 1
    for file, classes in (("three", "kind c,0,1"), ("many", "0,1,2,3,4,5,6,7,8,9,2")):
        how = ("--classes", classes, "--count", "11", "--steps", "1", "--out", f"{tmp_path}/{file}.png")
        assert invoke("sample", sweep.run("dis").folder.url, *how)[0] == 0
    three, many = (Image.open(f"{tmp_path}/{name}.png") for name in ("three", "many"))
    assert (three.size[1], json.loads(three.info["columns"])) == (16 + 2 * 64, ["kind c", "kind a", "kind b"] * 3)
    assert (many.size[1], json.loads(many.info["columns"])) == (2 * (16 + 64), [*names, "kind c"]), "under ten names"
    assert image_names(opened, 4) == []


def test_without_classes_the_command_samples_all_of_them_in_turn(files: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["sample", str(files[0]), "--vae", str(files[1]), "--steps", "2", "--out"]
    for name, more in (("all", []), ("named", ["--classes", "0,1,2,3,4,5,6,7,8,9"])):
        code, output = invoke(*command, str(tmp_path / f"{name}.png"), *more)
        assert code == 0, output
    assert (tmp_path / "all.png").read_bytes() == (tmp_path / "named.png").read_bytes()
    assert Image.open(tmp_path / "all.png").size == (10 * 64, 64)


@pytest.mark.parametrize(
    ("classes", "images", "columns"), [(3, 3, 3), (3, 20, 9), (2, 20, 10), (1, 30, 10), (1000, 100, 10), (7, 4, 4)]
)
def test_a_column_of_a_grid_has_one_class_if_the_classes_are_few(classes: int, images: int, columns: int) -> None:
    assert grid_columns(classes, images) == columns


def test_the_sweeps_channels_and_times_of_guidance_are_used(tmp_path: Path) -> None:
    """By the command and the Python API: the pictures are those of the sweep's own settings."""
    sweep = published_sweep(str(tmp_path), "evaluate.guidance_channels=3", "evaluate.guidance_interval=[100, 600]")
    published = sweep.run("dis").published_at(320).url
    opened = open_for_sampling(published, None)
    sampling = opened.sampling_with(steps=3, guidance=4.0)
    (own,) = sample_pictures(opened, [1, 7], sampling=sampling)
    always_guided = sampling.model_copy(update={"guidance_interval": None})
    (always,) = sample_pictures(opened, [1, 7], sampling=always_guided)
    assert not np.array_equal(own, always)
    code, output = invoke("sample", published, "--classes", "1,7", "--steps", "3", "--guidance", "4", "--npz",
                          f"{tmp_path}/a.npz", "--batch", "2", "--count", "2")  # fmt: skip
    assert (code, "guidance 4 on 3 channels between times 100 and 600" in output) == (0, True), output
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], own)
    pictures = dis_scale.Sweep.open(sweep.folder.url).sample("dis", classes=[1, 7], steps=3, guidance=4.0, batch=2)
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), own)


def test_the_model_that_guides_a_sweep_guides_its_samples(tmp_path: Path) -> None:
    """And any other of its latents and classes does, by the command and the Python API."""
    sweep = published_sweep(str(tmp_path), "evaluate.guidance={by: dis, images: 160, scale: 3}")
    published = sweep.run("dis").published_at(320).url
    other = publish(sweep, 160, seed=5)
    opened = open_for_sampling(published, None)
    assert (opened.guide is not None, opened.sampling.scale) == (True, 3)
    own, plain = (dis_scale.open_weights(published).sample(classes=[1], steps=2, guidance=scale) for scale in (None, 1))
    assert np.asarray(own[0]).tolist() != np.asarray(plain[0]).tolist()
    code, output = invoke("sample", published, "--out", f"{tmp_path}/y.png", "--steps", "2", "--classes", "1")
    assert f"guidance 3 by {sweep.run('dis').published_at(160).url}" in output, output
    by_path = dis_scale.open_weights(published, guide=other).sample(classes=[1], steps=2, guidance=3)
    assert np.array_equal(np.asarray(by_path[0]), np.asarray(own[0]))
    unguided = published_sweep(str(tmp_path / "unguided"), "evaluate.guidance=1")
    with pytest.raises(UserError, match="guide: at guidance 1 nothing guides: give a scale of guidance, such as 2"):
        dis_scale.open_weights(unguided.run("dis").published_at(320).url, guide=other).sample(classes=[1], steps=2)
    code, output = invoke("sample", published, "--guide", other, "--guidance", "1", "--out", f"{tmp_path}/x.png")
    assert (code, "nothing guides" in output) == (2, True), output


def test_a_guide_that_is_missing_or_does_not_fit_is_named_where_it_is_used(tmp_path: Path) -> None:
    sweep = published_sweep(str(tmp_path), "evaluate.guidance={by: dis, images: 160, scale: 3}")
    published, out = sweep.run("dis").published_at(320).url, str(tmp_path / "x.png")
    code, output = invoke("sample", published, "--steps", "2", "--classes", "1", "--out", out)
    assert code == 2
    assert "000000000160" in output
    assert "it guides the samples: guidance 1 samples without" in output
    code, output = invoke("sample", published, "--steps", "2", "--classes", "1", "--out", out, "--guidance", "1")
    assert code == 0, output
    code, output = invoke("export", published, str(tmp_path / "export"))
    assert code == 0, output
    assert "guided by another model of the sweep, the pipeline's are not" in (tmp_path / "export/README.md").read_text()
    of_images = published_sweep(str(tmp_path / "other"), "diffusion={kind: flow, predicts: image}")
    other = of_images.run("dis").published_at(320).url
    with pytest.raises(UserError, match="cannot guide: it predicts the image of a flow process, expected the velocity"):
        _ = open_for_sampling(published, None, guide_at=other).guide
    linear, cosine = (
        published_sweep(str(tmp_path / betas), "evaluate.sampler=ddim", f"diffusion={{kind: gaussian, betas: {betas}}}")
        for betas in ("linear", "cosine")
    )
    by_cosine = open_for_sampling(linear.run("dis").published_at(320).url, None, guide_at=cosine.run("dis").published_at(320).url)
    with pytest.raises(UserError, match="cannot guide: its process has cosine betas and 1000 steps, expected linear betas"):
        _ = by_cosine.guide


def test_a_guide_is_of_the_encoder_whatever_decodes(tmp_path: Path) -> None:
    """`--vae` may be a better decoder of the same latents."""
    sweep = published_sweep(str(tmp_path))
    put_latents(sweep.store / "latents/x", PixelVae().identity, (3, 32), label_names=("cat", "dog"))
    state.use_latents(sweep, sweep.store / "latents/x", PixelVae().identity)
    published, guide = sweep.run("dis").published_at(320).url, publish(sweep, 160, seed=1)
    opened = open_for_sampling(published, None, guide_at=guide)
    other: Any = SimpleNamespace(identity="another decoder")
    assert replace(opened, decoder=other).guide is not None
    with pytest.raises(UserError, match="cannot guide: its latents are of another autoencoder"):
        _ = replace(opened, encoder="another encoder").guide
    assert opened.facts
    changes = {
        "its latents are scaled by": replace(opened.facts, scaling=Scaling(0.5, 2.0)),
        "it has a class 'cat' in the place of 'dog'": replace(opened.facts, label_names=("dog", "cat")),
    }
    for words, facts in changes.items():
        with pytest.raises(UserError, match=f"cannot guide: {words}"):
            _ = replace(opened, facts=facts).guide


def test_a_checkpoint_in_an_object_store_gives_the_pictures_of_one_on_disk(tmp_path: Path) -> None:
    """From the published folder, or its file; the sweep around it is found as well."""
    here, away = (published_sweep(root) for root in (str(tmp_path), f"memory://bucket/{tmp_path.name}"))
    folders = [sweep.run("dis").published_at(320).url for sweep in (here, away)]
    found = []
    for at in [*folders, f"{folders[1]}/weights-0001.safetensors"]:
        opened = open_for_sampling(at, None)
        assert (opened.sampling.sampler, opened.sampling.steps) == ("euler", 2)
        assert str(opened.located.published) == "dis at 320 images"
        found.append(next(sample_pictures(opened, [1, 7])))
    assert all(np.array_equal(each, found[0]) for each in found)
    away.run("dis").published_at(320).write("weights-0001.safetensors", b"damaged")
    with pytest.raises(StorageError, match=r"weights-0001.safetensors"):
        open_for_sampling(folders[1], None)
    with pytest.raises(UserError, match=r"no checkpoint at memory://bucket/none: expected a published or exported folder"):
        open_for_sampling("memory://bucket/none", None)
    for sweep in (here, away):
        with pytest.raises(UserError, match=r"no checkpoint at .*, such as .*/runs/dis"):
            open_for_sampling(sweep.folder.url, None)
        exported = sweep.store / "exported"
        exported.write("weights.safetensors", b"a file")
        assert str(find_checkpoint(exported.url)) == f"{exported}/weights.safetensors"


def test_a_file_is_opened_by_a_url_with_a_query(files: tuple[Path, Path]) -> None:
    """As hubs give them and stores sign them: for this file, and not for a manifest beside it."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path.endswith("?signature=a/b"):
                super().do_GET()
            else:  # S3's answer to what is not signed
                self.send_error(403)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(files[0].parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/{files[0].name}?signature=a/b"
        there, here = (open_for_sampling(at, str(files[1])) for at in (url, files[0]))
    finally:
        server.shutdown()
    found, expected = (next(sample_pictures(each, [1])) for each in (there, here))
    assert np.array_equal(found, expected)


def test_a_gpu_samples_if_there_is_one(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    def sample(*_: object, device: torch.device, **__: object) -> Iterator[np.ndarray]:
        devices.append(device.type)
        yield np.zeros((1, 32, 32, 3), np.uint8)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(pictures, "sample_pictures", sample)
    command = ["sample", str(files[0]), "--vae", str(files[1]), "--classes", "1"]
    code, output = invoke(*command, "--out", str(tmp_path / "grid.png"))
    assert (code, devices, "fp32 on NVIDIA H200" in output) == (0, ["cuda"], True), output


def test_adms_file_has_all_images_as_numpy_and_our_reader_read_it(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The same images as in a grid of the same labels, whatever the batch; the file is absent until it is complete."""
    file = tmp_path / "samples.npz"
    base = ["sample", str(files[0]), "--vae", str(files[1]), "--steps", "2", "--count", "23", "--seed", "3"]
    code, output = invoke(*base, "--npz", str(file), "--batch", "8")
    assert (code, f"23 images in {file}" in output) == (0, True), output
    assert sorted(path.name for path in tmp_path.glob("*samples*")) == ["samples.npz"]
    images = np.load(file)["arr_0"]
    assert (images.shape, images.dtype) == ((23, 32, 32, 3), np.uint8)
    opened = open_for_sampling(files[0], str(files[1]))
    labels = labels_of_all(opened, "balanced", 23, 3)
    (expected,) = sample_pictures(opened, labels, sampling=opened.sampling_with(steps=2), seed=3, batch=23)
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1
    adm = open_reference(str(file))
    assert (adm.square_images(), np.concatenate(list(adm.images(10))).tolist()) == ((23, 32), images.tolist())
    adm.close()


def test_no_file_is_left_of_samples_that_end_early(tmp_path: Path) -> None:
    def parts() -> Iterator[np.ndarray]:
        yield np.zeros((2, 4, 4, 3), np.uint8)
        raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        write_samples(tmp_path / "a.npz", 4, parts())
    assert not list(tmp_path.iterdir())


def test_labels_of_all_classes_are_balanced_or_uniform(files: tuple[Path, Path]) -> None:
    opened = open_for_sampling(files[0], str(files[1]))
    balanced, random = (np.array(labels_of_all(opened, how, 5000, 0)) for how in ("balanced", "uniform"))
    assert (np.bincount(balanced) == 500).all()
    assert np.abs(np.bincount(random, minlength=10) - 500).max() < 5 * (5000 * 0.1 * 0.9) ** 0.5
    assert not (np.bincount(random, minlength=10) == 500).all()
    assert labels_of_all(opened, "uniform", 10, 0) == random[:10].tolist()


def test_a_file_tells_how_to_sample_from_it(files: tuple[Path, Path], tmp_path: Path, tiny: Recipe) -> None:
    """Process, scaling, sampler, steps and guidance, outside a sweep; another autoencoder than the latents' is named."""
    scaling = Scaling([0.1, 0.2, 0.3, 0.4], [0.5, 1.0, 2.0, 4.0])
    theirs = EncodedBy(identity=vae.from_path(str(files[1])).identity, shift=0.0, scale=1.0)
    sampling = Sampling(sampler="euler", steps=7, guidance=1.5, guidance_channels=3, guidance_interval=(100.0, 900.0))
    facts = SamplingFacts(Flow(kind="flow", shift=3.0), theirs, scaling, sampling)
    model = models.build(tiny.models["dis"], LatentShape(4, 8), 10)
    save(model, tmp_path / "a.safetensors", facts)
    opened = open_for_sampling(tmp_path / "a.safetensors", str(files[1]))
    assert (opened.process, opened.sampling) == (facts.diffusion, sampling)
    assert (opened.decoder.scaling, opened.notes) == (scaling, [])
    assert opened.sampling_with(guidance=3.0).scale == 3
    (images,) = sample_pictures(opened, [3], sampling=Sampling(sampler="euler", steps=2))
    assert images.shape == (1, 32, 32, 3)

    facts = replace(facts, vae=theirs.model_copy(update={"identity": "0" * 64}), scaling=None)
    save(model, tmp_path / "b.safetensors", facts)
    opened = open_for_sampling(tmp_path / "b.safetensors", str(files[1]))
    assert opened.decoder.scaling == Scaling(0.0, 0.18215)
    (note,) = opened.notes
    assert note.endswith(f"its identity is {theirs.identity[:12]}, theirs is 000000000000")


def test_weights_that_never_lacked_a_label_are_not_guided_by_themselves(tmp_path: Path, tiny: Recipe) -> None:
    """Also outside their sweep: the model without labels that would guide is as it was initialised."""
    encoder = EncodedBy(identity=vae.PixelVae().identity, shift=0.0, scale=1.0)
    facts = SamplingFacts(Flow(kind="flow"), encoder, None, Sampling(sampler="euler", steps=2), label_dropout=0.0)
    ours, guide, exported = (tmp_path / name for name in ("ours.safetensors", "guide.safetensors", "exported"))
    for seed, path in enumerate((ours, guide)):
        save(models.build(tiny.models["dis"], LatentShape(3, 8), 10, seed=seed), path, facts)
    command = ["sample", str(ours), "--vae", "none", "--out", str(tmp_path / "x.png"), "--guidance"]
    code, output = invoke(*command, "2")
    assert (code, "--guidance: got 2, expected 1: the model did not learn to do without labels" in output) == (2, True), output
    assert invoke(*command, "1")[0] == 0
    assert invoke(*command, "2", "--guide", str(guide))[0] == 0
    assert invoke("export", str(ours), str(exported))[0] == 0
    pipeline = DiffusionPipeline.from_pretrained(exported, custom_pipeline=str(exported), trust_remote_code=True)
    assert len(pipeline(class_labels=[1], num_inference_steps=2).images) == 1
    with pytest.raises(ValueError, match="the model did not learn to do without labels"):
        pipeline(class_labels=[1], num_inference_steps=2, guidance_scale=2.0)


def test_a_file_outside_its_sweep_knows_its_classes(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Also without PyTorch, to refuse a misspelt one at once; a damaged header has none."""
    model, names = open_checkpoint(files[0]), tuple(f"kind {letter}" for letter in "abcdefghij")
    encoder = EncodedBy(identity=vae.from_path(str(files[1])).identity, shift=0.0, scale=1.0)
    facts = SamplingFacts(Gaussian(kind="gaussian"), encoder, None, Sampling(sampler="ddim", steps=1), names)
    save(model, tmp_path / "named.safetensors", facts)
    command = ["sample", f"{tmp_path}/named.safetensors", "--vae", str(files[1]), "--out", f"{tmp_path}/grid.png"]
    assert invoke(*command, "--classes", "kind c,kind a")[0] == 0
    assert json.loads(Image.open(tmp_path / "grid.png").info["columns"]) == ["kind c", "kind a"]
    code, output = invoke(*command, "--classes", "kind k")
    assert (code, "did you mean 'kind " in output, "loading" in output) == (2, True, False)
    for damaged in (b"", b"\xff" * 40, b"\x05" + bytes(7) + b"no js", *map(_header, HEADERS)):
        (tmp_path / "named.safetensors").write_bytes(damaged)
        assert find_checkpoint(f"{tmp_path}/named.safetensors").class_names == ()


HEADERS = [
    {}, [], {"__metadata__": None}, {"__metadata__": {"format": "pt"}}, {"__metadata__": {"dis_scale": "[]"}},
    {"__metadata__": {"dis_scale": '{"sampling": null}'}}, {"__metadata__": {"dis_scale": '{"sampling": {"label_names": null}}'}},
]  # fmt: skip


def _header(content: Any) -> bytes:
    """The begin of a safetensors file."""
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


def test_a_file_without_facts_is_sampled_by_its_sweep(tmp_path: Path) -> None:
    recipe = reading.load(TINY, ["vae={kind: none}", "diffusion={kind: flow, shift: 3.0}", "evaluate.sampler=euler"])
    sweep, model = (Sweep.below(open_folder(tmp_path), recipe), models.build(recipe.models["dis"], LatentShape(3, 32), 10))
    sweep.save_recipe()
    file = tmp_path / "sweeps/tiny/model.safetensors"
    save(model, file)
    opened = open_for_sampling(file, None)
    assert (opened.process, opened.sampling.sampler, opened.notes) == (recipe.diffusion, "euler", [])
    latents = ranks.make_latents(sweep.store / "latents/other", recipe)
    state.use_latents(sweep, latents, "v")
    with pytest.raises(UserError, match=r"model.safetensors: latents of another VAE: theirs is v,"):
        open_for_sampling(file, None)


def test_a_trained_autoencoder_is_the_same_from_its_folder(tmp_path: Path) -> None:
    sweep = Sweep.below(open_folder(tmp_path), reading.load(TINY))
    vae.save(sweep.vae, vae.new(TrainedVae(kind="trained", widths=(8, 8, 8)), 32))
    assert vae.from_path(sweep.vae.url).identity == vae.load(sweep).identity


def test_what_a_file_does_not_tell_is_assumed_in_a_line(files: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["sample", str(files[0]), "--vae", str(files[1]), "--classes", "1", "--steps", "1"]
    code, output = invoke(*command, "--out", str(tmp_path / "grid.png"))
    words = "assumed  gaussian process, linear betas, 1000 steps; latents by scale 0.18215 and shift 0.0"
    assert (code, output.splitlines()[1].startswith(words)) == (0, True)


def test_pixels_need_no_autoencoder(tmp_path: Path, tiny: Recipe) -> None:
    model, identity = models.build(tiny.models["dis"], LatentShape(3, 8), 10), vae.PixelVae().identity
    facts = SamplingFacts(
        Gaussian(kind="gaussian"), EncodedBy(identity=identity, shift=0.0, scale=1.0), None, Sampling(sampler="ddim", steps=4)
    )
    save(model, tmp_path / "pixels.safetensors", facts)
    for path in (None, "none"):
        opened = open_for_sampling(tmp_path / "pixels.safetensors", path)
        assert (type(opened.decoder), opened.notes) == (vae.PixelVae, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "1,x"], "classes: got 'x', expected labels with commas between them"),
        (["--classes", "1", "--out", "grid.jpg"], "--out grid.jpg: a grid is a PNG: give a name that ends with .png"),
        (["--classes", "1²"], "classes: got '1²', expected labels with commas between them"),
        (["--classes", "9" * 20], "expected labels with commas between them"),
        (["--classes", "11"], "label 11 is out of range: expected 0 to 9"),
        (["--classes", "1", "--sampler", "euler"], "euler"),
        (["--classes", "1", "--vae", "/nowhere"], "vae.path: no autoencoder at '/nowhere'"),
        (
            ["--classes", "1", "--vae", "none"],
            "--vae none does not decode the model's latents, 4 channels of 8 x 8: it returns (1, 8, 8, 4)",
        ),
    ],
)
def test_mistakes_are_one_line(files: tuple[Path, Path], tmp_path: Path, arguments: list[str], message: str) -> None:
    base = ["sample", str(files[0]), "--vae", str(files[1]), "--out", str(tmp_path / "none.png")]
    code, output = invoke(*base, *arguments)
    assert code == 2
    assert message in output
    assert not (tmp_path / "none.png").exists()


def test_a_missing_checkpoint_is_named() -> None:
    code, output = invoke("sample", "none.pt")
    assert (code, "no checkpoint at none.pt" in output) == (2, True)


def test_an_autoencoder_of_other_channels_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    other = TrainedVae(kind="trained", widths=(8, 8, 8), latent_channels=3)
    vae.new(other, 32).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"other does not decode the model's latents, 4 channels of 8 x 8: .*channels"):
        open_for_sampling(files[0], str(tmp_path / "other"))


def test_weights_outside_a_sweep_need_a_vae(files: tuple[Path, Path]) -> None:
    """Or one beside them."""
    identity = open_for_sampling(files[0], None).decoder.identity
    assert identity == open_for_sampling(files[0], str(files[1])).decoder.identity
    files[1].rename(files[1].with_name("elsewhere"))
    code, output = invoke("sample", str(files[0]), "--classes", "1")
    assert (code, "is not in a sweep, so name the VAE of its latents" in output) == (2, True)


def test_programs_beside_weights_are_not_run(files: tuple[Path, Path]) -> None:
    """Loading one may run anything: whoever hands weights over must not decide that."""
    shutil.rmtree(files[1])
    files[1].mkdir()
    for name in ("encode.pt2", "decode.pt2"):
        (files[1] / name).write_bytes(b"a program")
    code, output = invoke("sample", str(files[0]), "--classes", "1")
    assert (code, f"has programs, which may do anything: if you trust it, name it: --vae {files[1]}" in output) == (2, True)


def test_the_examples_weights_draw_the_digits_that_are_asked_for() -> None:
    """By the nearest mean of the real digits; the files are those that the page names."""
    page = (ROOT / "examples/digits/README.md").read_text()
    for file in (ROOT / "examples/digits").rglob("*.safetensors"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in page
    opened = open_for_sampling(ROOT / "examples/digits", None)
    labels = labels_in_turn(opened, None, 20)
    pictures_BHW = np.concatenate(list(sample_pictures(opened, labels)))[..., 0]
    small_B64 = pictures_BHW.reshape(20, 8, 4, 8, 4).mean((2, 4)).reshape(20, 64) / 16
    images, digits = load_digits(return_X_y=True)
    means = np.stack([images[digits == digit].mean(0) for digit in range(10)])
    nearest = np.square(small_B64[:, None] - means).sum(2).argmin(1)
    assert (nearest == labels).mean() > 0.7
