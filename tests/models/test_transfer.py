"""Learning-rate transfer over width: layers and scans change alike at each width, and nothing changes at the base width."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dis_scale import diffusion
from dis_scale.models import build, construct, transfer
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.dis.s6 import Mixer, taps_and_bias
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dit.settings import MODERN, Dit
from dis_scale.models.tokens import product
from dis_scale.recipe import Flow, LatentShape, Train
from dis_scale.scan import causal_conv_silu
from dis_scale.training.engine import parameter_groups

SHAPE, WIDTHS = LatentShape(4, 8), (64, 128, 256)
BATCH, STEPS, RATE = 64, 3, 3e-3
MODELS = [
    Dit(kind="dit", width=64, depth=1, heads=2, patch=2),
    Dis(kind="dis", width=64, depth=2, patch=2),
    DiffuSsm(kind="diffussm", width=64, depth=1),
]


Sizes = dict[str, float]


def dit(width: int) -> Dit:
    return Dit(kind="dit", width=width, depth=2, heads=width // 32, patch=2)


def dis(width: int) -> Dis:
    return Dis(kind="dis", width=width, depth=2, patch=2)


def coordinates(at_width: Callable[[int], Dit | Dis], base_width: int | None) -> tuple[Sizes, Sizes]:
    """Slopes over the width of a model's initial outputs by layer, and of their changes in three Adam steps."""
    initial, change = zip(*(sizes_at(at_width(width), base_width) for width in WIDTHS), strict=True)
    return slopes(initial), slopes(change)


def slopes(by_width: tuple[Sizes, ...]) -> Sizes:
    """Return each layer's slope on logarithmic axes; layers that start at zero have none."""
    sizes = {name: [layer[name] for layer in by_width] for name in by_width[0]}
    return {n: float(np.polyfit(np.log(WIDTHS), np.log(s), 1)[0]) for n, s in sizes.items() if min(s) > 0}


def sizes_at(settings: Dit | Dis, base_width: int | None) -> tuple[Sizes, Sizes]:
    """Return the mean absolute output of each layer, and its change. All widths see the same batch."""
    model = build(settings, SHAPE, 10)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("modulation.weight"):  # at zero they would close every block in the first steps
            weight.data = torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5
    if base_width:
        transfer.scale_initial(model, base_width)
    training = Train(publish_images=(BATCH,), batch_images=BATCH, lanes=1, base_width=base_width)
    optimizer = torch.optim.AdamW(g | {"lr": RATE * g["rate"]} for g in parameter_groups(model, training))
    blocks = {f"block {i}": block for i, block in enumerate(model.get_submodule("blocks").children())}
    outputs = dict[str, torch.Tensor]()
    for name, layer in {"embedding": model.get_submodule("patches"), "time": model.time, **blocks, "output": model}.items():
        layer.register_forward_hook(partial(keep, outputs, name))
    for name, mixer in model.named_modules():
        if isinstance(mixer, Mixer):
            mixer.register_forward_hook(partial(keep_scan, outputs, name))
    process, rng, y_B = (diffusion.build(Flow(kind="flow"), model.shape), np.random.default_rng(0), torch.arange(BATCH) % 10)
    means = rng.standard_normal((10, 4, 8, 8))[y_B]
    x_BCHW, noise_BCHW = (torch.from_numpy(x).float() for x in rng.standard_normal((2, BATCH, 4, 8, 8)))
    batch = (0.8 * torch.from_numpy(means).float() + 0.6 * x_BCHW, process.sample_times(rng, BATCH), noise_BCHW)
    for step in range(STEPS + 1):
        loss = process.losses(lambda x, t: model(x, t, y_B), *batch).total.mean()
        if step == 0:
            first = dict(outputs)
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    changes = {name: out - first[name] for name, out in outputs.items()}
    return {name: mean_size(out) for name, out in first.items()}, {name: mean_size(x) for name, x in changes.items()}


def mean_size(tensor: torch.Tensor) -> float:
    return float(tensor.abs().mean())


def keep(
    outputs: dict[str, torch.Tensor], name: str, _layer: object, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]
) -> None:
    """Keep a layer's output; of a DiS block the branch that it adds."""
    outputs[name] = (output[0] if isinstance(output, tuple) else output).detach().float()


@torch.no_grad()
def keep_scan(outputs: dict[str, torch.Tensor], name: str, mixer: Mixer, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    """Keep step, B and C of the forward direction, and what the mixer adds."""
    x_BLE = product(inputs[0], mixer.in_proj).chunk(2, dim=-1)[0]
    u_BLE = causal_conv_silu(x_BLE, *taps_and_bias(mixer.conv[0]), backend=mixer.scan)
    forward = mixer.directions(mixer.free_dynamics(), u_BLE, u_BLE)[0]
    step_BLE = F.softplus(forward.delta_BLE + forward.delta_bias_E)
    for part, tensor in {"step": step_BLE, "B": forward.B_BLN, "C": forward.C_BLN, "sum": output}.items():
        outputs[f"{name} {part}"] = tensor.detach().float()


def test_layers_of_a_dit_change_alike_at_each_width() -> None:
    """Within 0.15: a width four times as large changes a layer at most 1.23 times as much. A missing rule costs 0.4 to 1.1."""
    initial, change = coordinates(dit, base_width=64)
    assert {name: slope for name, slope in initial.items() if abs(slope) > 0.15} == {}
    assert {name: slope for name, slope in change.items() if abs(slope) > 0.15} == {}
    assert change.keys() == {"embedding", "time", "block 0", "block 1", "output"}


def test_without_a_base_width_they_change_more_at_larger_widths() -> None:
    initial, change = coordinates(dit, base_width=None)
    assert change["block 1"] > 0.5
    assert initial["embedding"] < -0.3
    assert initial["time"] > 0.3


def test_scans_change_alike_at_each_width() -> None:
    """B and C start as outputs, smaller with the root of the width. Without a base width all change more at larger widths."""
    initial, change = coordinates(dis, base_width=64)
    parts = {name: slope for name, slope in change.items() if name.startswith("blocks")}
    assert len(parts) == 3 * 4
    assert {name: slope for name, slope in parts.items() if abs(slope) > 0.3} == {}
    assert abs(np.mean([slope for name, slope in parts.items() if name.endswith("step")])) < 0.1, "one eps of Adam costs 0.24"
    assert all(-0.7 < slope < -0.3 for name, slope in initial.items() if name.endswith((" B", " C")))
    _, without = coordinates(dis, base_width=None)
    assert min(without[name] for name in parts if name.endswith((" B", " C"))) > 0.7
    assert min(without[name] for name in parts if name.endswith("step")) > 0.3
    assert min(without[name] for name in parts if name.endswith("sum")) > 0.25


@pytest.mark.parametrize("settings", MODELS, ids=lambda s: s.kind)
def test_nothing_changes_at_the_base_width(settings: Dit | Dis | DiffuSsm) -> None:
    model, scaled = build(settings, SHAPE, 10), build(settings, SHAPE, 10)
    transfer.scale_initial(scaled, 64)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), scaled.parameters(), strict=True))
    groups = [parameter_groups(model, train(base_width)) for base_width in (None, 64)]
    assert groups[0] == groups[1]
    assert {group["eps"] for group in parameter_groups(model, train(128))} == {1e-8}, "nor Adam's eps below it"


def train(base_width: int | None) -> Train:
    return Train(publish_images=(8,), batch_images=8, lanes=1, weight_decay=0.1, base_width=base_width)


@pytest.mark.parametrize("settings", MODELS, ids=lambda s: s.kind)
def test_sums_over_the_width_learn_slower_and_decay_as_fast(settings: Dit | Dis | DiffuSsm) -> None:
    """At twice the base width. Tables, biases, norms, dynamics and the images' own embedding keep their rate."""
    with torch.device("meta"):
        model = construct(settings, SHAPE, 10)
    growth = transfer.fan_in_growth(model, 32)
    assert set(growth.values()) == {1.0, 2.0}
    doubled = {name.rpartition("blocks.0.")[2] for name, factor in growth.items() if factor == 2}
    always = {"time.down.weight", "modulation.weight", "final.weight"}
    own = {
        "dit": {"qkv.weight", "out.weight", "up.weight", "down.weight"},
        "dis": {f"mixer.{name}" for name in ("in_proj", "out_proj", "dt_proj", "x_proj")} | {"time.up.weight"},
        "diffussm": {f"{name}.weight" for name in ("W0", "W_up", "W_down", "W1", "W2", "W3", "W4")},
    }[settings.kind]
    assert always | own <= doubled
    kept = {name for name, factor in growth.items() if factor == 1}
    assert {"label.weight", "time.up.bias", "final.bias"} <= kept
    assert not any(name.endswith(("dynamics", "A_log", "dt_bias", "conv", "log_dt", ".C", ".B", "position")) for name in doubled)
    plain, scaled = ({p: g for g in parameter_groups(model, train(b)) for p in g["params"]} for b in (None, 32))
    for name, p in model.named_parameters():
        assert scaled[p]["rate"] == plain[p]["rate"] / growth[name], name
        assert scaled[p]["eps"] == plain[p]["eps"] / 4
        assert scaled[p]["weight_decay"] * scaled[p]["rate"] == pytest.approx(plain[p]["weight_decay"] * plain[p]["rate"])


@pytest.mark.parametrize("settings", MODELS, ids=lambda s: s.kind)
def test_the_model_says_its_factor(settings: Dit | Dis | DiffuSsm) -> None:
    line = transfer.words(settings, 32)
    assert line.startswith("learning rate of sums over the width x 0.5 (width 64, base_width 32")
    assert ("experimental" in line) == (settings.kind != "dit")
    if isinstance(settings, Dit):
        modern = settings.model_copy(update={"modern": MODERN})
        assert transfer.words(modern, 32).endswith("experimental for dit + modern)")
