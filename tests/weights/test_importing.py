"""Public weights as a published checkpoint: sampled, evaluated and trained from as one that was trained here."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dis_scale.models import build
from dis_scale.models.dit.settings import Dit
from dis_scale.models.public import read_public, to_official
from dis_scale.recipe import Gaussian, LatentShape, Sampling, reading
from dis_scale.storage import lease
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sampled, Sweep, command_lease, state
from dis_scale.sweep.documents import EncodedBy, PublishedManifest
from dis_scale.vae import PixelVae
from dis_scale.vae.scaling import Scaling
from dis_scale.weights import warm_start
from dis_scale.weights.export import SamplingFacts, load, sampling_facts, save
from dis_scale.weights.opening import labels_in_turn, open_for_sampling, sample_pictures
from dis_scale.weights.published import load_published
from tests.conftest import TINY
from tests.support.commands import invoke
from tests.support.documents import put_latents, put_metrics
from tests.support.leases import run_elsewhere
from tests.support.public_dis import public_model, sit_state

SETTINGS = ("vae={kind: none}", "evaluate.variants={}", "evaluate.steps=2")
PUBLIC = {"D": 16, "depth": 2, "p": 4, "C": 3, "size": 32, "classes": 10}


def words(root: Path, file: Path, *settings: str, model: str = "dis") -> list[str]:
    """The command that imports a file into the tiny sweep below `root`."""
    every = (*SETTINGS, f"storage.root={root}", *settings)
    command = ["import", str(file), str(TINY), "--model", model, "--images", "1024"]
    return [*command, *(word for each in every for word in ("--set", each))]


def sweep_below(root: Path, *settings: str) -> Sweep:
    return Sweep.below(open_folder(root), reading.load(TINY, [*SETTINGS, "models.dis.train.publish_images=[1024]", *settings]))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small DiS in the public code's layout, as its training state has it."""
    torch.save({"ema": public_model(**PUBLIC).state_dict()}, tmp_path / "dis.pt")
    return tmp_path / "dis.pt"


def test_imported_weights_compute_what_the_public_code_does_and_are_due_for_evaluation(tmp_path: Path, file: Path) -> None:
    code, output = invoke(*words(tmp_path, file))
    assert code == 0, output
    sweep, public = sweep_below(tmp_path), public_model(**PUBLIC)
    run = sweep.run("dis")
    assert f"imported {run.published_at(1024)}: " in output
    model = build(sweep.recipe.models["dis"], LatentShape(3, 32), 10)
    model.load_state_dict(load_published(run, 1024))
    x, t, y = torch.randn(2, 3, 32, 32), torch.tensor([3.0, 700.0]), torch.tensor([1, 7])
    assert torch.allclose(model.eval()(x, t, y), public(x, t, y), atol=1e-5)
    assert state.trained(sweep, "dis")
    assert state.Backlog(sweep, ("dis",)).left() == [Sampled("dis", 1024)]
    assert invoke(*words(tmp_path, file))[0] == 0, "a rerun changes nothing"
    assert invoke("export", run.published_at(1024).url, str(tmp_path / "export"))[0] == 0
    card = (tmp_path / "export/README.md").read_text()
    assert "weights are those of `dis.pt`" in card
    assert "images seen" not in card, "nobody here knows the price"


def test_imported_weights_are_sampled_and_begin_another_training(tmp_path: Path, file: Path) -> None:
    assert invoke(*words(tmp_path, file))[0] == 0
    sweep = sweep_below(tmp_path)
    opened = open_for_sampling(sweep.run("dis").published_at(1024).url, None)
    sampling = opened.sampling_with(steps=2, guidance=1.5)
    (images,) = sample_pictures(opened, labels_in_turn(opened, [1, 7], 2), sampling=sampling)
    assert images.shape == (2, 32, 32, 3)
    start = f"models.dis.start={{kind: sweep, url: {sweep}, model: dis, images: 1024}}"
    source = warm_start.read_source(sweep_below(tmp_path / "other", start).recipe, "dis")
    assert all(torch.equal(weight, source.weights[name]) for name, weight in load_published(sweep.run("dis"), 1024).items())


def test_a_sit_is_published_as_our_flow(tmp_path: Path) -> None:
    theirs = sit_state()
    torch.save(theirs, tmp_path / "sit.pt")
    sit = read_public(theirs, heads=4)
    assert isinstance(sit.settings, Dit)
    sizes = ", ".join(f"{name}: {getattr(sit.settings, name)}" for name in ("width", "depth", "heads", "patch"))
    flow = [
        f"models={{sit: {{kind: dit, {sizes}}}}}", "diffusion={kind: flow}", "evaluate.sampler=euler", "data.resolution=64",
        "vae={kind: pretrained, path: stabilityai/sd-vae-ft-ema}",
    ]  # fmt: skip
    command = ["import", str(tmp_path / "sit.pt"), str(TINY), "--model", "sit", "--images", "1024"]
    every = ["evaluate.variants={}", f"storage.root={tmp_path}", *flow]
    code, output = invoke(*command, *(word for each in every for word in ("--set", each)))
    assert code == 0, output
    run = Sweep.open(str(tmp_path / "sweeps/tiny")).run("sit")
    expected = sit.as_ours().state_dict()
    assert all(torch.equal(w, expected[name]) for name, w in load_published(run, 1024).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["models.dis.width=32"], "its model has width 16, this one 32: expected the same"),
        (["data.resolution=64"], "positions of 256 patches interpolated: expected weights for as many pixels"),
        (
            ["data.num_classes=none", "evaluate.extractor={kind: exported, name: x, path: x.pt}", "evaluate.guidance=1.0"],
            "only one of the two models has classes",
        ),
        (["models.dis.start={kind: sweep, url: x, model: y, images: 16}"], "import: dis would also be trained: expected a"),
        (["diffusion.betas=cosine"], "trained with another process: expected diffusion: {kind: gaussian, betas: linear, steps"),
        (["diffusion={kind: flow}", "evaluate.sampler=heun"], "trained with another process: expected diffusion: {kind: gaussian,"),
        (["evaluate.ema_width=0.07"], "import: evaluate.ema_width needs averages"),
    ],
)
def test_what_is_not_this_model_is_refused_before_anything_is_written(
    tmp_path: Path, file: Path, settings: list[str], message: str
) -> None:
    code, output = invoke(*words(tmp_path, file, *settings))
    assert (code, message in output) == (2, True), output
    assert not (tmp_path / "sweeps").exists()


def ours(tmp_path: Path, scaling: Scaling | None = None, label_dropout: float = 0.1, **vae: Any) -> Path:
    """A file of ours for the tiny sweep in pixels, trained on latents of this autoencoder and scaling."""
    their_vae = EncodedBy(**{"identity": PixelVae().identity, "posterior": True, "shift": 0.0, "scale": 1.0} | vae)
    sampling = Sampling(sampler="ddim", steps=4)
    facts = SamplingFacts(Gaussian(kind="gaussian"), their_vae, scaling, sampling, label_dropout=label_dropout)
    save(build(sweep_below(tmp_path).recipe.models["dis"], LatentShape(3, 32), 10, seed=5), tmp_path / "ours.safetensors", facts)
    return tmp_path / "ours.safetensors"


def test_a_file_of_ours_is_imported_with_the_latents_of_its_sweep(tmp_path: Path) -> None:
    assert invoke(*words(tmp_path, ours(tmp_path)))[0] == 0
    run = sweep_below(tmp_path).run("dis")
    imported, theirs = load_published(run, 1024), load(tmp_path / "ours.safetensors").state_dict()
    assert imported.keys() == theirs.keys()
    assert all(torch.equal(imported[name], weight) for name, weight in theirs.items())


def test_weights_that_never_lacked_a_label_are_imported_where_nothing_guides(tmp_path: Path) -> None:
    """And nothing does later: the imported file says so, too."""
    latents = open_folder(tmp_path) / "latents/made"
    put_latents(latents, PixelVae().identity, (3, 32), mean=(0.0,) * 3, std=[0.5] * 3, posterior_variance=[0.0] * 3)
    state.use_latents(sweep_below(tmp_path), latents, PixelVae().identity)
    assert invoke(*words(tmp_path, ours(tmp_path, label_dropout=0.0), "evaluate.guidance=1"))[0] == 0
    (published,) = Path(sweep_below(tmp_path).run("dis").published_at(1024).url).glob("*.safetensors")
    facts = sampling_facts(published)
    assert facts
    assert facts.label_dropout == 0


@pytest.mark.parametrize(
    ("facts", "settings", "message"),
    [
        ({"label_dropout": 0.0}, ["evaluate.guidance=1.5"], "it did not learn to do without labels: expected evaluate.guidance: 1"),
        ({"identity": "0" * 64}, [], "trained on latents of autoencoder 000000000000, this sweep's is "),
        ({"scaling": Scaling([0.1] * 3, [2.0] * 3)}, [], "scaled otherwise than by data.normalise vae"),
        ({}, ["data.normalise=channels"], "scaled otherwise than by data.normalise channels"),
        ({"scale": 0.5}, [], "latents with shift 0.0 and scale 0.5, this sweep's have 0.0 and 1.0"),
        ({}, ["vae={kind: trained, widths: [8], latent_channels: 3}"], "this sweep's is still to be trained"),
    ],
)
def test_a_file_of_ours_of_other_latents_is_refused(
    tmp_path: Path, facts: dict[str, Any], settings: list[str], message: str
) -> None:
    code, output = invoke(*words(tmp_path, ours(tmp_path, **facts), *settings))
    assert (code, message in output) == (2, True), output
    assert not (tmp_path / "sweeps").exists()


def test_the_latents_that_a_sweep_has_are_compared(tmp_path: Path) -> None:
    """By channel, to within a hundredth."""
    settings = ("data.normalise=channels",)
    sweep, latents = sweep_below(tmp_path, *settings), open_folder(tmp_path) / "latents/made"
    put_latents(latents, PixelVae().identity, (3, 32), mean=(0.1, 0.2, 0.3), std=[0.5] * 3, posterior_variance=[0.0] * 3)
    state.use_latents(sweep, latents, PixelVae().identity)
    other = ours(tmp_path, Scaling([0.1, 0.2, 0.3], [2.0, 2.0, 3.0]))
    code, output = invoke(*words(tmp_path, other, *settings))
    assert (code, "and scale [2.0, 2.0, 3.0], this sweep's have" in output) == (2, True), output
    same = ours(tmp_path, Scaling([0.1, 0.2, 0.301], [2.0, 2.0, 2.01]))
    code, output = invoke(*words(tmp_path, same, *settings))
    assert code == 0, output


def test_other_weights_or_a_running_sweep_are_refused(tmp_path: Path, file: Path) -> None:
    sweep = sweep_below(tmp_path)
    run_elsewhere(command_lease(sweep.folder))
    code, output = invoke(*words(tmp_path, file))
    assert (code, "one writer at a time" in output) == (69, True), output
    sweep.leases.delete()
    assert invoke(*words(tmp_path, file))[0] == 0
    torch.save(to_official(build(sweep.recipe.models["dis"], LatentShape(3, 32), 10, seed=1)), file)
    code, output = invoke(*words(tmp_path, file))
    assert (code, "already holds other weights" in output) == (2, True), output
    (holding,) = lease.last_holdings(sweep.lease("sweep"), 1)
    assert holding.end
    assert holding.end.why == "", "the sweep itself has not failed"
    published = sweep.run("dis").published_at(1024)
    assert PublishedManifest.require(published).imported.name == "dis.pt"  # type: ignore[union-attr]
    evaluation = sweep.evaluation(Sampled("dis", 1024))
    put_metrics(evaluation, {sweep.recipe.evaluate.metric: 9.0})
    published.delete()
    code, output = invoke(*words(tmp_path, file))
    assert (code, "is the evaluation of weights that are no more there: delete it, too" in output) == (2, True), output
    evaluation.delete()
    assert invoke(*words(tmp_path, file))[0] == 0
    assert state.Backlog(sweep).left() == [Sampled("dis", 1024)]


def test_a_url_with_credentials_is_refused_before_it_is_read(tmp_path: Path, file: Path) -> None:
    command, secret = words(tmp_path, file), "memory://me:pa55word@hub/dis.pt"
    open_folder("memory://me:pa55word@hub").write("dis.pt", file.read_bytes())
    command[1] = secret
    for each in (command, ["sample", str(file), "--vae", secret]):
        code, output = invoke(*each)
        assert (code, "a URL with credentials" in output, "pa55word" in output) == (2, True, False), output


def test_public_weights_fit_latents_by_the_autoencoders_own_scale_alone(tmp_path: Path, file: Path) -> None:
    code, output = invoke(*words(tmp_path, file, "data.normalise=channels"))
    assert (code, "expected data.normalise: vae, the autoencoder's own" in output) == (2, True), output
