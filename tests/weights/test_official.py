"""Equality with the public code of DiS (as restated in tests/support/public_dis.py) and with diffusers' DiT."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dis_scale.diffusion import build as build_process
from dis_scale.diffusion.generate import SampleNoise, generate
from dis_scale.models import build
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dit.network import DiT
from dis_scale.models.dit.public import SiT
from dis_scale.models.dit.settings import Dit
from dis_scale.models.families import preset
from dis_scale.models.public import layout, read_public, to_official
from dis_scale.process.errors import UserError
from dis_scale.recipe import Flow, LatentShape, Sampling, TrainedVae
from dis_scale.vae import new
from dis_scale.weights.export import read_weights, save
from dis_scale.weights.opening import open_for_sampling
from tests.support.public_dis import DIT, dit_model, public_model, sit_state

CASES = pytest.mark.parametrize(
    ("D", "depth", "p", "C", "size", "classes"),
    [(48, 4, 2, 4, 8, 10), (40, 2, 4, 3, 16, None), (33, 4, 8, 3, 16, 5)],
    ids=["latent", "pixel-unconditional", "odd-width"],
)


def inputs(C: int, size: int, classes: int | None, batch: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(1)
    y = None if classes is None else torch.tensor([0, classes // 2, classes])
    return torch.randn(batch, C, size, size), torch.tensor([0.0, 250.5, 999.0]), y


def near(got: Tensor, expected: Tensor) -> bool:
    """Within 1e-5 of the largest output, which is about 1."""
    return float((got - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


@CASES
@pytest.mark.parametrize("scan", ["auto", "reference"])
def test_outputs_and_gradients_equal_the_public_code(
    D: int, depth: int, p: int, C: int, size: int, classes: int | None, scan: str
) -> None:
    public = public_model(D, depth, p, C, size, classes)
    ours = read_public(public.state_dict())
    blocks: Any = ours.blocks
    for block in blocks:
        block.mixer.scan = scan
    x, t, y = inputs(C, size, classes)
    expected, got = public(x, t, y), ours(x, t, y)
    assert near(got.detach(), expected.detach())
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    for name, parts in layout(ours).items():
        for public_name, view in parts:
            gradient, theirs = ours.get_parameter(name).grad, public.get_parameter(public_name).grad
            assert gradient is not None
            assert theirs is not None
            assert float((view(gradient) - theirs).norm() / theirs.norm()) < 1e-4, public_name


def test_drop_path_equals_the_public_code() -> None:
    public = public_model(48, 4, 2, 4, 8, 10)
    ours, (x, t, y) = read_public(public.state_dict()), inputs(4, 8, 10)
    drop = torch.bernoulli(torch.full((len(ours.drop_rates), 3), 0.5), generator=torch.Generator().manual_seed(0)) * 2
    # The first block adds nothing to the stream, so its mask is never used.
    expected = public(x, t, y, [torch.ones(3, 1, 1), *drop[:, :, None, None]])
    assert near(ours(x, t, y, drop).detach(), expected.detach())


@CASES
def test_round_trip_is_bit_for_bit(D: int, depth: int, p: int, C: int, size: int, classes: int | None) -> None:
    state = public_model(D, depth, p, C, size, classes).state_dict()
    back = to_official(read_public(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) and back[name].shape == state[name].shape for name in state)


def test_errors_name_the_weight() -> None:
    state = public_model(48, 4, 2, 4, 8, 10).state_dict()
    name = "out_blocks.1.mixer.dt_proj_b.bias"
    faults = [
        ({k: v for k, v in state.items() if k != name}, f"{name} is missing"),
        (state | {"mid_block.skip_linear.bias": torch.zeros(48)}, "mid_block.skip_linear.bias is not known"),
        (state | {name: torch.zeros(95)}, rf"{name} has shape \(95,\), expected \(96,\)"),
        (state | {name: torch.full((96,), float("nan"))}, "blocks.4.mixer.dynamics is not finite"),
        ({}, "patch_embed.proj.weight is missing"),
    ]
    for broken, message in faults:
        with pytest.raises(UserError, match=message):
            read_public(broken)


def test_options_that_the_public_code_lacks_are_errors() -> None:
    model = build(Dis(kind="dis", width=32, depth=2, patch=2, conditioning="adaln_zero"), LatentShape(4, 8), 10)
    with pytest.raises(UserError, match="no conditioning: adaln_zero"):
        to_official(model)


def test_published_files_are_read_without_unpickling_code(tmp_path: Path) -> None:
    state = public_model(48, 2, 2, 4, 8, 10).state_dict()
    torch.save({"model": {}, "ema": state, "opt": {}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "train.pt")
    assert read_public(read_weights(tmp_path / "train.pt")).settings.width == 48
    torch.save({"ema": print}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot read weights from"):
        read_weights(tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        read_weights(tmp_path / "list.pt")


def test_dit_round_trip_and_its_published_names() -> None:
    model = dit_model()
    state = to_official(model)
    assert state["x_embedder.proj.weight"].shape == (64, 4, 2, 2)
    assert {"pos_embed", "blocks.2.attn.qkv.bias", "blocks.0.mlp.fc2.weight", "t_embedder.mlp.2.bias"} <= state.keys()
    again = read_public(state, heads=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    x, t, y = inputs(4, 8, 10)
    assert torch.equal(model(x, t, y), again(x, t, y))
    with pytest.raises(UserError, match="a DiT of width 64 is not a published one"):
        read_public(state)
    with pytest.raises(UserError, match="pos_embed is not DiT's"):
        read_public(state | {"pos_embed": state["pos_embed"] + 1}, heads=4)


def test_a_public_sit_is_sampled_as_a_flow_in_its_own_time_and_direction() -> None:
    """Euler's steps as SiT takes them, from noise at t = 0 to data at t = 1 along its velocity, give the same samples."""
    state = sit_state()
    sit, network = read_public(state, heads=4), build(DIT, LatentShape(4, 8), 10)
    network.load_state_dict(sit.state_dict())
    assert (type(sit), type(read_public(to_official(dit_model()), heads=4))) == (SiT, DiT)
    noise, labels = SampleNoise(3, [0, 1]), [1, 7]
    x = noise.start((2, 4, 8, 8))
    with torch.no_grad():
        for step in range(5):
            x = x + network(x, torch.full((2,), step / 5), torch.tensor(labels))[:, :4] / 5
        got = generate(sit, build_process(Flow(kind="flow"), sit.shape), labels, [0, 1], Sampling(sampler="euler", steps=5), seed=3)
    assert float((got - noise.start((2, 4, 8, 8))).abs().max()) > 0.1, "the samples have moved"
    assert near(got, x)
    back = to_official(sit)
    assert all(torch.equal(back[name], state[name]) for name in state if name != "pos_embed")


def test_a_sit_becomes_a_dit_of_our_flow() -> None:
    """At all times, between the grid's points too: features of SiT's times are sums of ours."""
    sit, (x, _, y) = read_public(sit_state(), heads=4), inputs(4, 8, 10)
    flow = sit.as_ours()
    assert type(flow) is DiT
    with torch.no_grad():
        for t in ([0.0, 1.3, 500.77], [999.9, 1000.0, 250.01]):
            assert near(flow(x, torch.tensor(t), y), sit(x, torch.tensor(t), y))


def test_a_public_sit_is_assumed_to_be_a_flow_and_not_exported(tmp_path: Path) -> None:
    torch.save({"ema": sit_state()}, tmp_path / "sit.pt")
    new(TrainedVae(kind="trained", widths=(8,)), 8).save_pretrained(tmp_path / "vae")
    opened = open_for_sampling(tmp_path / "sit.pt", str(tmp_path / "vae"), heads=4)
    assert (opened.process.kind, opened.sampling.sampler, opened.sampling.steps) == ("flow", "euler_maruyama", 250)
    assert opened.notes[0].startswith("assumed  linear flow: its variance is zero, as in SiT; latents by scale 0.18215")
    with pytest.raises(UserError, match="a public SiT is not described by settings of ours"):
        save(opened.model, tmp_path / "sit.safetensors")


def test_published_width_determines_the_heads_of_dit() -> None:
    published = build(Dit(kind="dit", width=384, depth=1, heads=6, patch=8), LatentShape(4, 32), 1000)
    settings = read_public(to_official(published)).settings
    assert isinstance(settings, Dit)
    assert settings.heads == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_public_files_of_halves_are_read_in_float32(dtype: torch.dtype) -> None:
    """Their table of positions is as exact as they are, and no kernel has a tolerance for scans in half precision."""
    for kind in (Dit(**preset("DiT-S/8")), Dis(kind="dis", width=32, depth=2, patch=4)):
        weights = to_official(build(kind, LatentShape(4, 32), 10))
        model = read_public({name: weight.to(dtype) for name, weight in weights.items()})
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        own = to_official(model)
        assert all(torch.equal(own[name], weights[name].to(dtype).float()) for name in own if name != "pos_embed")


def test_sizes_that_no_model_has_are_refused_in_words() -> None:
    weights = to_official(build(Dit(kind="dit", width=32, depth=1, heads=2, patch=2), LatentShape(4, 8), 10))
    with pytest.raises(UserError, match=r"no model of these sizes: .*heads"):
        read_public(weights, heads=5)


def test_published_count_of_dit_includes_the_fixed_table() -> None:
    state = to_official(build(Dit(**preset("DiT-S/2")), LatentShape(4, 32), 1000))
    assert sum(weight.numel() for weight in state.values()) / 1e6 == pytest.approx(32.963, abs=5e-4)


def test_dit_equals_diffusers() -> None:
    from diffusers import DiTTransformer2DModel

    model = dit_model()
    theirs = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6,
    ).eval()  # fmt: skip
    missing, unexpected = theirs.load_state_dict(_for_diffusers(to_official(model), depth=3), strict=False)
    assert not missing
    assert not unexpected
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # the published DiT's frequencies
    x, t, y = inputs(4, 8, 10)
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
        assert near(model(x, t, y), expected)


def _for_diffusers(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Published names to diffusers': one embedder per block; query, key and value separate."""
    out = {f"pos_embed.proj.{kind}": state[f"x_embedder.proj.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        out[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        out[f"proj_out_2.{kind}"] = state[f"final_layer.linear.{kind}"]
        for i in range(depth):
            ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
            for name, part in zip("qkv", state[f"{ours}.attn.qkv.{kind}"].chunk(3), strict=True):
                out[f"{theirs}.attn1.to_{name}.{kind}"] = part
            out[f"{theirs}.attn1.to_out.0.{kind}"] = state[f"{ours}.attn.proj.{kind}"]
            out[f"{theirs}.ff.net.0.proj.{kind}"] = state[f"{ours}.mlp.fc1.{kind}"]
            out[f"{theirs}.ff.net.2.{kind}"] = state[f"{ours}.mlp.fc2.{kind}"]
            out[f"{theirs}.norm1.linear.{kind}"] = state[f"{ours}.adaLN_modulation.1.{kind}"]
            embedder = f"{theirs}.norm1.emb.timestep_embedder.linear"
            out[f"{embedder}_1.{kind}"] = state[f"t_embedder.mlp.0.{kind}"]
            out[f"{embedder}_2.{kind}"] = state[f"t_embedder.mlp.2.{kind}"]
            table = f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"
            out[table] = state["y_embedder.embedding_table.weight"]
    return out
