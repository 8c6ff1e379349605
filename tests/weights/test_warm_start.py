"""A training that begins with the weights of a file or of another sweep: they are its count 0, and are read once."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from dis_scale.models import build
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dit.settings import Dit
from dis_scale.models.public import to_official
from dis_scale.models.tokens import Backbone
from dis_scale.process.errors import UserError
from dis_scale.recipe import FileStart, Gaussian, LatentShape, Recipe, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.documents import LatentsManifest
from dis_scale.weights import warm_start
from dis_scale.weights.export import SamplingFacts, read_weights, save
from dis_scale.weights.published import load_published
from dis_scale.weights.warm_start import StartWeights
from tests.conftest import TINY
from tests.support import ranks, small_latents

SMALL, LARGE = LatentShape(4, 8), LatentShape(4, 16)
GAUSSIAN = Gaussian(kind="gaussian")
DIT = Dit(kind="dit", width=16, depth=1, heads=2, patch=4)
DIS = Dis(kind="dis", width=16, depth=2, patch=2)
DIFFUSSM = DiffuSsm(kind="diffussm", width=16, depth=1)
SHORT = ("train.publish_images=[0, 32]", "train.resume_every_images=16", "train.workers=1")


def varied(settings: Dit | Dis | DiffuSsm, shape: LatentShape = SMALL, classes: int | None = 10) -> Backbone:
    """A model none of whose weights is its initial value."""
    model = build(settings, shape, classes, seed=5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


def public_file(folder: Path, settings: Dit | Dis = DIT) -> Path:
    """Weights in the public layout, as a training state with its average."""
    torch.save({"ema": to_official(varied(settings))}, folder / "public.pt")
    return folder / "public.pt"


def from_file(path: Path, *settings: str, model: str = "dit") -> Recipe:
    start = f"{{kind: file, path: {path}, sha256: {hashlib.sha256(path.read_bytes()).hexdigest()}}}"
    return reading.load(TINY, [*SHORT, f"models.{model}.start={start}", *settings])


def test_a_public_file_is_count_0_and_is_not_read_after_a_kill(tmp_path: Path) -> None:
    file = public_file(tmp_path)
    recipe, source = from_file(file, "train.workers=2"), varied(DIT).state_dict()
    (tmp_path / "faults").write_text("kill at step rank=0 images=16")
    with pytest.raises(ProcessExitedException):
        ranks.run(recipe, "dit", tmp_path, attempt=1, faults=tmp_path / "faults")
    file.unlink()
    ranks.run(recipe, "dit", tmp_path, attempt=2)
    run = ranks.sweep_of(tmp_path, recipe).run("dit")
    first, last = (load_published(run, images) for images in (0, 32))
    assert first.keys() == source.keys()
    assert all(torch.equal(first[name], source[name]) for name in source)
    assert not all(torch.equal(last[name], source[name]) for name in source)


def test_a_published_average_of_another_sweep_is_count_0(tmp_path: Path) -> None:
    first = reading.load(TINY, [*SHORT])
    ranks.run(first, "dis", tmp_path / "first", attempt=1)
    sweep = ranks.sweep_of(tmp_path / "first", first)
    sweep.save_recipe()
    start = f"{{kind: sweep, url: {sweep.folder}, model: dis, images: 32}}"
    second = reading.load(TINY, [*SHORT, f"models.dis.start={start}", "seed=1"])
    ranks.run(second, "dis", tmp_path / "second", attempt=1)
    run = ranks.sweep_of(tmp_path / "second", second).run("dis")
    theirs, ours = (load_published(r, n) for r, n in ((sweep.run("dis"), 32), (run, 0)))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    missing = start.replace("images: 32", "images: 48")
    with pytest.raises(UserError, match=r"models.dis.start.images: dis of .* has published no weights at 48 images: it has 0, 32"):
        warm_start.read_source(reading.load(TINY, [f"models.dis.start={missing}"]), "dis")
    other = reading.load(TINY, [f"models.dis.start={start}", "diffusion.betas=cosine"])
    warning = "warning: trained with another diffusion than this recipe's: {kind: gaussian, betas: linear, steps: 1000}"
    assert warm_start.read_source(other, "dis").notes == [warning]


@pytest.mark.parametrize("settings", [DIT, DIS, DIFFUSSM], ids=lambda s: s.kind)
def test_a_file_of_ours_gives_the_same_outputs(tmp_path: Path, settings: Dit | Dis | DiffuSsm) -> None:
    source, file = varied(settings), tmp_path / "ours.safetensors"
    save(source, file)
    model = build(settings.model_copy(update={"drop_path": 0.3} if settings.kind == "dis" else {}), SMALL, 10)
    recipe = from_file(file).model_copy(update={"models": {"m": from_file(file).models["dit"]}})
    fitted = warm_start.fit(warm_start.read_source(recipe, "m"), model, "here")
    model.load_state_dict(fitted.weights)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 10])
    assert fitted.notes == []
    assert torch.equal(model.eval()(x, t, y), source(x, t, y))


def test_a_url_may_have_a_query(tmp_path: Path) -> None:
    save(varied(DIT), tmp_path / "ours.safetensors")
    url = "memory://hub/ours.safetensors?download=true"
    open_folder("memory://hub").write("ours.safetensors?download=true", data := (tmp_path / "ours.safetensors").read_bytes())
    start = FileStart(kind="file", path=url, sha256=hashlib.sha256(data).hexdigest())
    assert warm_start.from_file(start, DIT, GAUSSIAN, "start").settings == DIT


def test_a_public_sit_starts_a_flow_alone(tmp_path: Path) -> None:
    """Its variance is zero: SiT's loss does not use it. The velocity of our flow is that of the SiT in its own time."""
    source = varied(DIT)
    public = to_official(source)
    finals = [*source.get_submodule("final").parameters(), *(public[f"final_layer.linear.{n}"] for n in ("weight", "bias"))]
    with torch.no_grad():
        for p in finals:
            p.unflatten(0, (16, 2, 4))[:, 1] = 0
    torch.save(public, tmp_path / "sit.pt")
    with pytest.raises(UserError, match="a DiT that was trained as a flow has no public layout"):
        to_official(source)
    flow = from_file(tmp_path / "sit.pt", "diffusion={kind: flow}", "evaluate.sampler=heun")
    model = build(DIT, SMALL, 10)
    model.load_state_dict(warm_start.fit(warm_start.read_source(flow, "dit"), model, "here").weights)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3.5, 700.0]), torch.tensor([1, 10])
    torch.testing.assert_close(model(x, t, y), -source(x, 1 - t / 1000, y), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"sit.pt predicts the velocity: set diffusion.predicts to it, got image"):
        of_images = "diffusion={kind: flow, predicts: image}"
        warm_start.read_source(from_file(tmp_path / "sit.pt", of_images, "evaluate.sampler=heun"), "dit")
    with pytest.raises(UserError, match=r"models.dit.start.path: .* holds a SiT, which predicts velocities"):
        warm_start.read_source(from_file(tmp_path / "sit.pt"), "dit")


def keys_kernel(x: float) -> float:
    """Keys' cubic convolution with a = -1/2 (1981)."""
    x = abs(x)
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x <= 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def doubling(before: int) -> np.ndarray:
    """The matrix that doubles a row: kernel values around each new pixel's centre, those outside left out, scaled to sum to 1."""
    rows = [[keys_kernel(j + 0.5 - (i + 0.5) / 2) for j in range(before)] for i in range(2 * before)]
    scaled: np.ndarray = np.array(rows) / np.sum(rows, axis=1, keepdims=True)
    return scaled


@pytest.mark.parametrize("classes", [10, None])
def test_learned_positions_are_interpolated_to_twice_the_pixels(classes: int | None) -> None:
    source, model = varied(DIS, SMALL, classes), build(DIS, LARGE, classes)
    fitted = warm_start.fit(StartWeights(DIS, source.state_dict(), GAUSSIAN, []), model, "here")
    extras = 1 if classes is None else 2
    before, after = (w["position"][0].detach().numpy() for w in (source.state_dict(), fitted.weights))
    grid, A = before[extras:].reshape(4, 4, -1), doubling(4)
    assert np.array_equal(after[:extras], before[:extras])
    np.testing.assert_allclose(after[extras:].reshape(8, 8, -1), np.einsum("ij,kl,jld->ikd", A, A, grid), atol=1e-6)
    assert fitted.notes == ["positions of 64 patches interpolated"]
    model.load_state_dict(fitted.weights)


def test_fixed_positions_are_those_of_the_new_size() -> None:
    source, model, expected = varied(DIT), build(DIT, LARGE, 10), build(DIT, LARGE, 10)
    fitted = warm_start.fit(StartWeights(DIT, source.state_dict(), GAUSSIAN, []), model, "here")
    model.load_state_dict(fitted.weights)
    assert fitted.notes == []
    assert torch.equal(model.get_buffer("position"), expected.get_buffer("position"))


def test_another_number_of_classes_gets_a_new_table() -> None:
    source, model = varied(DIT, classes=1000), build(DIT, SMALL, 10)
    initial = model.state_dict()["label.weight"].clone()
    fitted = warm_start.fit(StartWeights(DIT, source.state_dict(), GAUSSIAN, []), model, "here")
    assert fitted.notes == ["new table of 10 classes instead of 1000"]
    assert torch.equal(fitted.weights["label.weight"], initial)
    assert torch.equal(fitted.weights["final.weight"], source.state_dict()["final.weight"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["models.dit.depth=2"], r"models.dit.start: its model has depth 1, this one 2: expected the same"),
        (["models.dit.width=32"], r"models.dit.start: its model has width 16, this one 32"),
        (["models.dit.start.sha256='" + "0" * 64 + "'"], r"models.dit.start.path: .* has sha256 .*, the recipe expects 0000"),
        (["models.dit.start.path=nowhere.pt"], r"models.dit.start.path: no file nowhere.pt"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(tmp_path: Path, settings: list[str], words: str) -> None:
    recipe = from_file(public_file(tmp_path), *settings)
    with pytest.raises(UserError, match=words):
        warm_start.require_fits(recipe, recipe.models, SMALL)


@pytest.mark.parametrize(
    ("source", "shape", "classes", "words"),
    [
        (DIS, SMALL, 10, "its model has kind dis, this one dit"),
        (DIT, LatentShape(3, 8), 10, r"patches.weight has shape .*expected latents of as many channels"),
        (DIT, SMALL, None, r"only one of the two models has classes, or weights are missing: label.weight"),
    ],
)
def test_another_model_is_refused(source: Dit | Dis, shape: LatentShape, classes: int | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        warm_start.fit(
            StartWeights(source, varied(source, shape, classes).state_dict(), GAUSSIAN, []), build(DIT, SMALL, 10), "here"
        )


def test_a_file_that_fits_is_accepted_for_more_pixels(tmp_path: Path) -> None:
    file = public_file(tmp_path, DIS)
    recipe = from_file(file, f"models.dis={{kind: dis, width: 16, depth: 2, patch: 2, start: {{kind: file, path: {file}, sha256: "
                       f"{hashlib.sha256(file.read_bytes()).hexdigest()}}}}}", "models.dit.start=null")  # fmt: skip
    warm_start.require_fits(recipe, recipe.models, LARGE)
    assert math.isqrt(read_weights(file)["pos_embed"].shape[1] - 2) == 4


def test_a_start_is_part_of_a_models_identity_and_not_of_its_branches() -> None:
    start = "{kind: sweep, url: other, model: a, images: 16}"
    recipe = reading.load(TINY, [f"models.dit.start={start}", "train.cooldowns={images: [320], share: 0.2}"])
    assert recipe.models["dit-at-320"].start is None
    assert recipe.start_of("dit-at-320") == recipe.start_of("dit") == recipe.models["dit"].start
    assert recipe.start_of("dis") is None
    with pytest.raises(UserError, match=r"models.b.branch: a branch begins with its trunk's weights"):
        reading.load(TINY, [
            f"models.b={{kind: dit, width: 16, depth: 1, heads: 2, patch: 4, start: {start}, branch: {{of: dit, at: 160}}}}"
        ])  # fmt: skip


def test_a_start_on_other_latents_is_named(tmp_path: Path) -> None:
    """A trained autoencoder depends on its sweep: settings alone would not tell."""
    store = open_folder(tmp_path)
    latents = small_latents.make(store / "latents/some", [4])
    theirs, ours = (Sweep.below(store, reading.load(TINY, [f"name={name}"])) for name in ("theirs", "ours"))
    for sweep in (theirs, ours):
        state.use_latents(sweep, latents, LatentsManifest.require(latents).encoding.identity)
    facts = SamplingFacts.of_sweep(theirs)
    assert facts is not None
    assert warm_start.latents_difference(facts, ours) == ""
    other = replace(facts, vae=facts.vae.model_copy(update={"identity": "another"}))
    assert warm_start.latents_difference(other, ours).startswith("latents of autoencoder another, this sweep's is vvvv")
    scaled = replace(ours, recipe=reading.load(TINY, ["data.normalise=channels"]))
    words = "latents that were scaled otherwise than by data.normalise channels"
    assert warm_start.latents_difference(facts, scaled) == words


def test_a_file_that_predicts_noise_is_named_under_a_flow(tmp_path: Path) -> None:
    torch.save(to_official(varied(DIT)), tmp_path / "dit.pt")
    flow = from_file(tmp_path / "dit.pt", "diffusion={kind: flow}", "evaluate.sampler=heun")
    warning = "warning: trained with another diffusion than this recipe's: {kind: gaussian, betas: linear, steps: 1000}"
    assert warm_start.read_source(from_file(tmp_path / "dit.pt", "diffusion.betas=cosine"), "dit").notes == [warning]
    assert warm_start.read_source(flow, "dit").notes == [warning]
    assert warm_start.read_source(from_file(tmp_path / "dit.pt"), "dit").notes == []
