"""Parameters and multiply-adds, compared with tables that were counted on the public code."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from dis_scale.models import build, construct, families
from dis_scale.models.checkpointing import WORTH_KEEPING_MACS
from dis_scale.models.cost import price_model
from dis_scale.models.diffussm import s4d
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.dis import s6
from dis_scale.models.dis import ssd as duality
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dit.settings import Dit
from dis_scale.models.settings import FamilySettings
from dis_scale.models.tokens import Backbone
from dis_scale.recipe import LatentShape
from dis_scale.scan import Direction
from dis_scale.scan.duality import Way
from dis_scale.scan.norms import by_definition
from tests.support.prices import preset_settings, price, price_of

DIS = {
    ("DiS-S368/2", 32): (29_132_752, 7.57), ("DiS-S/2", 32): (31_606_688, 8.19), ("DiS-B/2", 32): (121_163_552, 30.58),
    ("DiS-M/2", 32): (231_414_560, 60.07), ("DiS-L/2", 32): (407_249_952, 104.88), ("DiS-H/2", 32): (906_966_560, 231.69),
    ("DiS-S368/4", 32): (29_115_184, 1.94), ("DiS-B/4", 32): (121_126_784, 7.83), ("DiS-M/4", 32): (231_377_792, 15.38),
    ("DiS-L/4", 32): (407_200_896, 26.85), ("DiS-H/4", 32): (906_892_928, 59.30), ("DiS-B/8", 32): (121_532_672, 2.15),
    ("DiS-S368/2", 64): (29_415_376, 30.1), ("DiS-B/2", 64): (121_753_376, 121.6), ("DiS-M/2", 64): (232_004_384, 238.9),
    ("DiS-L/2", 64): (408_036_384, 417.1), ("DiS-H/2", 64): (908_146_208, 921.3),
}  # fmt: skip
"""Parameters and forward gmacs of presets at sizes of latents. Other patches and sizes are the same settings in other pairs."""
DIT = {"DiT-S/2": (32.865, 6.056), "DiT-B/2": (130.316, 23.005), "DiT-L/2": (457.841, 80.698), "DiT-XL/2": (674.835, 118.62)}
"""Millions of parameters without the fixed table, and forward gmacs."""


@pytest.mark.parametrize(("name", "size"), DIS)
def test_a_dis_has_the_parameters_and_gmacs_of_the_public_code(name: str, size: int) -> None:
    parameters, gmacs = DIS[name, size]
    cost = price_of(name, size)
    assert cost.parameters == parameters
    assert cost.gmacs_forward == pytest.approx(gmacs, rel=0.005)


@pytest.mark.parametrize("name", DIT)
def test_a_dit_has_the_parameters_and_gmacs_of_the_public_code(name: str) -> None:
    millions, gmacs = DIT[name]
    assert price_of(name).parameters / 1e6 == pytest.approx(millions, abs=5e-4)
    assert price_of(name).gmacs_forward == pytest.approx(gmacs, rel=0.005)


def test_forward_gmacs_of_the_smallest_agree_to_two_digits() -> None:
    assert price_of("DiS-S368/8").parameters == 29_309_872
    assert price_of("DiS-S368/8").gmacs_forward == pytest.approx(0.53, abs=0.005)


@pytest.mark.parametrize(("name", "gflops"), [("S368", 0.4316), ("B", 1.8642), ("M", 3.7044), ("L", 6.5792), ("H", 14.7888)])
def test_thop_gflops_equal_the_papers_column(name: str, gflops: float) -> None:
    found = families.find("dis").thop_gflops(preset_settings(f"DiS-{name}/4"), LatentShape(3, 32), None)
    assert found == pytest.approx(gflops, abs=5.1e-5)


def test_a_price_has_the_thop_gflops_of_its_family() -> None:
    cost = price_of("DiS-S368/4")
    assert cost.thop_gflops == families.find("dis").thop_gflops(cost.settings, cost.shape, 1000)


def test_shares_of_the_multiply_adds_of_h() -> None:
    parts = defaultdict[str, float](float)
    for part in price_of("DiS-H/2").parts:
        parts[part.name.rpartition(".")[2]] += part.macs
    shares = {name: 100 * macs / sum(parts.values()) for name, macs in parts.items()}
    for name, share in {"in_proj": 51.5, "out_proj": 25.7, "skip": 12.6, "x_proj": 4.3, "dt_proj": 3.2, "scan": 2.5}.items():
        assert shares[name] == pytest.approx(share, abs=0.1)


SMALL = LatentShape(4, 16)
SETTINGS: dict[str, FamilySettings] = {
    "dis": Dis(kind="dis", width=64, depth=4, patch=2),
    "dit": Dit(kind="dit", width=64, depth=4, heads=4, patch=2),
    "modern dit": Dit(**families.preset("DiT+-S/2") | {"width": 64, "depth": 4, "heads": 4}),
    "diffussm": DiffuSsm(kind="diffussm", width=64, depth=4),
    "diffussm-4": DiffuSsm(kind="diffussm", width=64, depth=4, hourglass=4),
    "hybrid": Dis(kind="dis", width=64, depth=4, patch=2, attention_every=2),
    "hybrid with hydra": Dis(kind="dis", width=64, depth=4, patch=2, attention_every=2, mixer="ssd", combine="hydra"),
    "dis without skips": Dis(kind="dis", width=64, depth=4, patch=2, skip="none"),
    "dis with added skips": Dis(kind="dis", width=64, depth=4, patch=2, skip="add", position="none"),
    "dis by turns": Dis(
        kind="dis", width=64, depth=4, patch=2, order=("raster", "column"), directions="alternate", spectrum="tied"
    ),
    "dis in one direction": Dis(kind="dis", width=64, depth=4, patch=2, directions=1),
    "dis by norms alone": Dis(kind="dis", width=64, depth=4, patch=2, conditioning="adaln_zero_alone"),
    "ssd": Dis(kind="dis", width=64, depth=4, patch=2, mixer="ssd"),
    "hydra": Dis(kind="dis", width=64, depth=4, patch=2, mixer="ssd", combine="hydra"),
    "diffussm in patches": DiffuSsm(kind="diffussm", width=64, depth=4, patch=2, position="sine"),
    "diffussm in one direction": DiffuSsm(kind="diffussm", width=64, depth=4, bidirectional=False),
}
NOT_PRODUCTS = ("conv", "scan", "ssd", "D u and gate", "FFT", "spectra's product")
CountMacs = Callable[[FamilySettings, bool], dict[str, float]]
"""Counts the multiply-adds of a forward pass by kind, `product` or `convolution`; if True, also those of the backward pass."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CountMacs:
    """torch's own count of one additional sample on the meta device, without the scan, which torch cannot count.

    The difference of two batches removes what a micro-batch computes once: DiffuSSM's kernels, whose complex products torch
    counts as real ones.
    """
    replaced = {
        "two_way_scan": lambda f, b, z, **_: (f.delta_BLE + b.delta_BLE) * _use_inputs(f, b) * z,
        "two_way_conv_silu": _convolutions,
        "selective_scan": lambda u, delta, A, B, C, *_, **__: delta * (B * C).sum(-1, keepdim=True),
        "causal_conv_silu": lambda x, w, b, **_: _convolution(x, w, b),
    }

    def count(settings: FamilySettings, backward: bool) -> dict[str, float]:
        with monkeypatch.context() as patched:
            for name, function in replaced.items():
                patched.setattr(s6, name, function)
            patched.setattr(duality, "causal_conv_silu", replaced["causal_conv_silu"])
            patched.setattr(duality, "ssd", _without_products)
            two, one = _macs(settings, 2, backward), _macs(settings, 1, backward)
        return {kind: two[kind] - one[kind] for kind in one}

    return count


def _macs(settings: FamilySettings, batch: int, backward: bool) -> dict[str, float]:
    with torch.device("meta"):
        model = construct(settings, SMALL, 10)
        inputs = torch.empty(batch, 4, 16, 16), torch.empty(batch), torch.empty(batch, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        out = model(*inputs)
        if backward:
            out.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    convolution = sum(flops for operator, flops in counts.items() if "conv" in str(operator))
    return {"convolution": convolution / 2, "product": (sum(counts.values()) - convolution) / 2}


def _use_inputs(f: Direction, b: Direction) -> Tensor:
    """Use B and C without a product, so that their gradients are computed."""
    return (f.B_BLN * f.C_BLN + b.B_BLN * b.C_BLN).sum(-1, keepdim=True)


def _without_products(x: Tensor, own: Tensor, *ways: Way | None, **_: Any) -> Tensor:
    uses = [way.step_BLH[..., None] * (way.B_BLN * way.C_BLN).sum(-1)[..., None, None] for way in ways if way]
    return sum(uses, own[..., None]) * x


def _convolutions(x_BLE: Tensor, w_f: Tensor, b_f: Tensor, w_b: Tensor, b_b: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return _convolution(x_BLE, w_f, b_f), _convolution(x_BLE, w_b, b_b)


def _convolution(x_BLE: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv1d(F.pad(x_BLE.transpose(1, 2), (w.shape[1] - 1, 0)), w[:, None], b, groups=len(b)).transpose(1, 2)


@pytest.mark.parametrize("name", SETTINGS)
def test_forward_agrees_with_torchs_counter(name: str, counted: CountMacs) -> None:
    """Products, forward convolutions, and attention (products on the meta device). torch counts FFTs as 0."""
    parts = price(SETTINGS[name], SMALL, 10).parts
    theirs = counted(SETTINGS[name], False)
    assert theirs["product"] == sum(part.macs for part in parts if part.name not in NOT_PRODUCTS)
    assert theirs["convolution"] == sum(part.macs for part in parts if part.name == "conv")


@pytest.mark.parametrize("name", SETTINGS)
def test_training_agrees_with_torchs_counter(name: str, counted: CountMacs) -> None:
    """Products and attention. Of a depthwise convolution's backward pass torch counts every pair of channels."""
    parts = price(SETTINGS[name], SMALL, 10).parts
    expected = sum(part.macs * part.passes for part in parts if part.name not in NOT_PRODUCTS)
    assert counted(SETTINGS[name], True)["product"] == expected


def by_formula(settings: FamilySettings, size: int) -> dict[str, float]:
    """Multiply-adds that torch counts as 0: a scan has 4.5 for each channel, state and token, an FFT of n points 1.25 n log2 n."""
    L, D = (size // settings.patch) ** 2, settings.width
    if isinstance(settings, Dis):
        L += settings.extra_tokens(10)
        mixers = settings.depth + 1 - (settings.depth + 1) // (settings.attention_every or settings.depth + 2)
        channels = mixers * settings.ways * s6.inner_width(D)
        if settings.mixer == "ssd":
            own = 1 if settings.combine == "hydra" else 2
            return {"ssd": (2.5 * settings.state_size + own / 2) * channels * L}
        return {"scan": 4.5 * channels * L * settings.state_size, "D u and gate": 2 * channels * L}
    if isinstance(settings, DiffuSsm):
        channels = settings.depth * (2 if settings.bidirectional else 1) * D
        return {"FFT": 2 * channels * fft_macs(2 * L), "spectra's product": 4 * channels * (L + 1)}
    return {}


def fft_macs(points: int) -> float:
    return 1.25 * points * math.log2(points)


@pytest.mark.parametrize("name", SETTINGS)
def test_scans_gates_and_ffts_have_the_cost_of_their_formulas(name: str) -> None:
    parts = {part.name: part.macs for part in price(SETTINGS[name], SMALL, 10).parts}
    expected = by_formula(SETTINGS[name], 16)
    assert {part: parts.get(part) for part in expected} == {part: pytest.approx(macs) for part, macs in expected.items()}
    assert parts.keys() & set(NOT_PRODUCTS) - {"conv"} == expected.keys()


@pytest.mark.parametrize("name", ["diffussm", "diffussm in one direction"])
def test_kernels_are_computed_once_per_forward_pass(name: str) -> None:
    """For each mode and tap a complex power (4) and the real part of a complex product (2), then one FFT of the kernel."""
    settings, L = SETTINGS[name], 16**2
    assert isinstance(settings, DiffuSsm)
    kernels = settings.depth * settings.width * (2 if settings.bidirectional else 1)
    macs = kernels * (settings.state_size // 2 * L * 6 + fft_macs(2 * L))
    assert price(settings, SMALL, 10).kernel_gmacs == pytest.approx(macs / 1e9, rel=1e-9)


@pytest.mark.parametrize("name", SETTINGS)
def test_activation_bytes_equal_what_autograd_keeps(name: str) -> None:
    kept = [_kept_elements(SETTINGS[name], batch) for batch in (2, 4)]
    per_sample = (kept[1] - kept[0]) / 2  # removes what a micro-batch keeps once
    assert price(SETTINGS[name], SMALL, 10).activation_bytes("none") / 4 == per_sample


def _kept_elements(settings: FamilySettings, batch: int) -> int:
    model = build(settings, SMALL, 10)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = dict[int, Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.randn(batch, 4, 16, 16), torch.rand(batch), torch.arange(batch))
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() // 4 for address, tensor in kept.items() if address not in own)


@pytest.mark.parametrize("name", ["diffussm", "diffussm in one direction", "diffussm in chunks"])
def test_kernels_are_kept_once_per_forward_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "diffussm in chunks":
        name = "diffussm"
        monkeypatch.setattr(s4d, "CHUNK", 2**18)
    two, four = (_kept_elements(SETTINGS[name], batch) for batch in (2, 4))
    assert price_model(SETTINGS[name], SMALL, 10).kept.fixed_bytes("none") / 4 == 2 * two - four


@pytest.mark.parametrize("mode", ["block", "every_2", "selective"])
@pytest.mark.parametrize("name", ["dis", "dit", "diffussm"])
def test_activation_bytes_equal_what_a_forward_pass_leaves_allocated(name: str, mode: str) -> None:
    settings = SETTINGS[name].model_copy(update={"width": 2 * WORTH_KEEPING_MACS})
    left = [_left_bytes(build(settings, SMALL, 10, checkpointing=mode), batch) for batch in (2, 4)]
    assert (left[1] - left[0]) / 2 == pytest.approx(price(settings, SMALL, 10).kept.left_bytes(mode), rel=0.1)


def _left_bytes(model: Backbone, batch: int) -> int:
    inputs = torch.randn(batch, 4, 16, 16), torch.rand(batch), torch.arange(batch)
    with profile(profile_memory=True) as recorded:
        out = model(*inputs)
    assert out.requires_grad
    return sum(event.self_cpu_memory_usage for event in recorded.key_averages())


def test_the_norm_behind_a_gate_keeps_its_inputs_alone_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its kernel does; PyTorch's operations would keep float32 copies of both, and the gate's."""
    cost = price_of("DiS2-S/2")
    half, single = cost.activation_bytes("none", "bf16"), cost.activation_bytes()
    monkeypatch.setattr(duality, "gated_rms_norm", lambda y_BLE, z_BLE, weight_E, _: by_definition(y_BLE, z_BLE, weight_E))
    by_operations = price_model(cost.settings, cost.shape, cost.num_classes)
    assert isinstance(cost.settings, Dis)
    more = by_operations.activation_bytes("none", "bf16") - half
    assert more / (cost.settings.depth + 1) > 3 * 4 * 258 * 768  # bytes of three float32 tensors in each block
    assert by_operations.activation_bytes() == single


def test_checkpointing_keeps_one_block_and_the_boundaries() -> None:
    h = price_of("DiS-H/2")
    assert h.activation_bytes("block") < h.activation_bytes("none") / 6
    assert h.gmacs_training == pytest.approx(3 * h.gmacs_forward, rel=1e-3)


def test_parameters_by_part_of_h() -> None:
    parts = price_of("DiS-H/2").parameters_by_part
    assert parts["mixer.in_proj"] == 49 * 1536 * 6144
    assert parts["skip"] == 24 * (2 * 1536 * 1536 + 1536)
