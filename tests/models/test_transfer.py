"""Learning-rate transfer over width: layers of a DiT change alike at each width, and nothing changes at the base width."""

import pytest
import torch

from benchmarks.coordinates import measure, slopes
from dis_scale.models import build, construct, transfer
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dit.settings import Dit
from dis_scale.recipe import LatentShape, Rates, Train
from dis_scale.training.engine import parameter_groups

SHAPE, WIDTHS = LatentShape(4, 8), (64, 128, 256)
MODELS = [
    Dit(kind="dit", width=64, depth=1, heads=2, patch=2),
    Dis(kind="dis", width=64, depth=2, patch=2),
    DiffuSsm(kind="diffussm", width=64, depth=1),
]


def coordinates(kind: str, base_width: int | None) -> tuple[dict[str, float], dict[str, float]]:
    """Slopes over the width of the initial outputs and of their changes in three steps."""
    measured = {width: measure(kind, width, base_width, steps=3) for width in WIDTHS}
    return slopes({w: m.initial for w, m in measured.items()}), slopes({w: m.change for w, m in measured.items()})


def test_layers_of_a_dit_change_alike_at_each_width() -> None:
    """Within 0.15: a width four times as large changes a layer at most 1.23 times as much. A missing rule costs 0.4 to 1.1."""
    initial, change = coordinates("dit", base_width=64)
    assert {name: slope for name, slope in initial.items() if abs(slope) > 0.15} == {}
    assert {name: slope for name, slope in change.items() if abs(slope) > 0.15} == {}
    assert change.keys() == {"embedding", "time", "block 0", "block 1", "output"}


def test_without_a_base_width_they_change_more_at_larger_widths() -> None:
    initial, change = coordinates("dit", base_width=None)
    assert change["block 1"] > 0.5
    assert initial["embedding"] < -0.3
    assert initial["time"] > 0.3


@pytest.mark.parametrize("settings", MODELS, ids=lambda s: s.kind)
def test_nothing_changes_at_the_base_width(settings: Dit | Dis | DiffuSsm) -> None:
    model, scaled = build(settings, SHAPE, 10), build(settings, SHAPE, 10)
    transfer.scale_initial(scaled, 64)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), scaled.parameters(), strict=True))
    groups = [parameter_groups(model, train(base_width)) for base_width in (None, 64)]
    assert groups[0] == groups[1]


def train(base_width: int | None) -> Train:
    rates = Rates(hidden=0.5, output=3.0, dynamics=0.25)
    return Train(publish_images=(8,), batch_images=8, lanes=1, weight_decay=0.1, rates=rates, base_width=base_width)


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
        "dis": {f"mixer.{name}" for name in ("in_proj", "out_proj", "rightward.dt_proj", "leftward.x_proj")}
        | {"time.up.weight"},
        "diffussm": {f"{name}.weight" for name in ("W0", "W_up", "W_down", "W1", "W2", "W3", "W4")},
    }[settings.kind]
    assert always | own <= doubled
    kept = {name for name, factor in growth.items() if factor == 1}
    assert {"label.weight", "time.up.bias", "final.bias"} <= kept
    assert not any(
        name.endswith(("A_log", "dt_bias", "conv_weight", "log_dt", ".C", ".B", "position")) for name in doubled
    )
    plain, scaled = ({p: g for g in parameter_groups(model, train(b)) for p in g["params"]} for b in (None, 32))
    for name, p in model.named_parameters():
        assert scaled[p]["rate"] == plain[p]["rate"] / growth[name], name
        assert scaled[p]["weight_decay"] * scaled[p]["rate"] == pytest.approx(
            plain[p]["weight_decay"] * plain[p]["rate"]
        )


@pytest.mark.parametrize("settings", MODELS, ids=lambda s: s.kind)
def test_the_model_says_its_factor(settings: Dit | Dis | DiffuSsm) -> None:
    line = transfer.words(settings, 32)
    assert line.startswith("learning rate of sums over the width x 0.5 (width 64, base_width 32")
    assert ("experimental" in line) == (settings.kind != "dit")
