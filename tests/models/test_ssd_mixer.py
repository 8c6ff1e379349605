"""The mixers of state-space duality by their definitions: each token's own state, turned images, shifted outputs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dis_scale.models import build
from dis_scale.models.dis.network import DiS, DiSBlock
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dis.ssd import SsdMixer
from dis_scale.models.dis.verification import verify_block
from dis_scale.process.errors import UserError
from dis_scale.recipe import LatentShape, reading
from dis_scale.scan.selftest import Case
from tests.conftest import TINY
from tests.support.prices import price_of

E, N, H = 32, 8, 1


def mixer(**options: Any) -> SsdMixer:
    torch.manual_seed(0)
    settings = Dis(kind="dis", mixer="ssd", width=16, depth=2, patch=2, state_size=N, **options)
    made = SsdMixer(settings, "chunked").double()
    with torch.no_grad():
        made.norm.uniform_(0.5, 2)
        made.D.uniform_(-2, 2)
    return made


def convolved(x_BLX: Tensor, rows_XE: Tensor, before: int, after: int) -> Tensor:
    weight, bias = rows_XE[:-1].T, rows_XE[-1]
    padded = F.pad(x_BLX.transpose(1, 2), (before, after))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=len(bias))).transpose(1, 2)


def one_way(x_BLE: Tensor, step_BL1: Tensor, A: Tensor, B_BLN: Tensor, C_BLN: Tensor) -> Tensor:
    """Mamba-2's recurrence of one head: S = a S + step B x, and y = C S (arXiv 2405.21060, equation 2)."""
    S, ys = x_BLE.new_zeros(len(x_BLE), N, E), []
    for i in range(x_BLE.shape[1]):
        S = (step_BL1[:, i] * A).exp()[..., None] * S
        S = S + step_BL1[:, i, :, None] * B_BLN[:, i, :, None] * x_BLE[:, i, None]
        ys.append((C_BLN[:, i, :, None] * S).sum(1))
    return torch.stack(ys, 1)


def finished(made: SsdMixer, y_BLE: Tensor, z_BLE: Tensor) -> Tensor:
    gated = y_BLE * F.silu(z_BLE)
    return gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt() * made.norm @ made.out_proj.T


def sizes(made: SsdMixer, h_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, B and C; z; the steps; and A."""
    mixed, z, raw = (h_BLD @ made.in_proj.T).split([4 * N + E, E, 2], dim=-1)
    return mixed, z, F.softplus(raw + made.dt_bias), -made.A_log.exp()


def by_sum(made: SsdMixer, h_BLD: Tensor) -> Tensor:
    mixed, z, step, A = sizes(made, h_BLD)
    B, C, x = convolved(mixed[..., : 2 * N + E], made.conv[0], 3, 0).split([N, N, E], -1)
    y = one_way(x, step[..., :1], A[0], B, C) + made.D[0] * x
    turned = mixed[..., 2 * N :].flip(1)
    x, B, C = convolved(turned, made.conv[1], 3, 0).split([E, N, N], -1)
    y = y + (one_way(x, step[..., 1:].flip(1), A[1], B, C) + made.D[1] * x).flip(1)
    return finished(made, y, z)


def by_hydra(made: SsdMixer, h_BLD: Tensor) -> Tensor:
    """shift(SS(x)) + flip(shift(SS(flip x))) + (W x + D) x (arXiv 2407.09941, equation 8)."""
    mixed, z, step, A = sizes(made, h_BLD)
    Bf, Cf, x, Bb, Cb = convolved(mixed, made.conv[0], 3, 3).split([N, N, E, N, N], -1)
    assert made.own_proj is not None
    y = (x @ made.own_proj.T + made.D) * x
    for i, (B, C) in enumerate(((Bf, Cf), (Bb, Cb))):
        turned = [t.flip(1) if i else t for t in (x, step[..., i : i + 1], B, C)]
        shifted = F.pad(one_way(turned[0], turned[1], A[i], *turned[2:])[:, :-1], (0, 0, 1, 0))
        y = y + (shifted.flip(1) if i else shifted)
    return finished(made, y, z)


@pytest.mark.parametrize(("combine", "definition"), [("sum", by_sum), ("hydra", by_hydra)])
def test_a_mixer_is_that_of_its_definition_with_its_gradients(combine: str, definition: object) -> None:
    made = mixer(combine=combine)
    h = torch.randn(2, 11, 16, dtype=torch.float64, requires_grad=True)
    ours, theirs = made(h), definition(made, h)  # type: ignore[operator]
    assert torch.allclose(ours, theirs, atol=1e-12)
    weights = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), [h, *made.parameters()]) for y in (ours, theirs)), strict=True):
        assert torch.allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("combine", ["sum", "hydra"])
def test_one_direction_sees_no_later_token(combine: str) -> None:
    """Hydra's convolution is not centred then."""
    made, h = mixer(combine=combine, directions=1), torch.randn(1, 12, 16, dtype=torch.float64)
    changed = h.clone()
    changed[:, 8:] += 1
    same = (made(h) == made(changed)).all(-1)[0]
    assert same.tolist() == [i < 8 for i in range(12)]


def test_presets_have_the_parameters_of_those_with_selective_scans() -> None:
    """Not B: a block is 4 % of it, so that 3.7 % fewer is the nearest."""
    for size in "SBMLH":
        ours, theirs = (price_of(f"{name}-{size}/2").parameters for name in ("DiS2", "DiS"))
        assert abs(ours / theirs - 1) < (0.037 if size == "B" else 0.03)


def test_settings_that_do_not_fit_are_refused() -> None:
    for option, message in {
        "width: 17": "mixer ssd needs an even width, got 17",
        "width: 62": "width 62 gives heads of 4 channels, expected at least 16",
        "width: 16, init: official": "init: official is of the mixer s6",
        "width: 16, spectrum: tied": "spectrum: tied is of the mixer s6",
        "width: 16, order: [column, column]": r"order: column in each block is \[column\]",
        "width: 16, attention_every: 1": "attention_every: 1 leaves no scan: leave mixer, order, spectrum and directions out",
        "width: 16, mixer: s6, combine: hydra": "combine: hydra is of the mixer ssd, got mixer: s6",
    }.items():
        with pytest.raises(UserError, match=message):
            mixer = "" if "mixer" in option else "mixer: ssd, "
            reading.load(TINY, [f"models.a={{kind: dis, depth: 2, patch: 2, {mixer}{option}}}"])
    assert "not known" in str(Dis(kind="dis", width=64, depth=2, patch=2, mixer="ssd").base_width_refusal(32, {}))
    model = build(Dis(kind="dis", width=16, depth=2, patch=2, mixer="ssd"), LatentShape(4, 8), 10)
    assert isinstance(model, DiS)
    assert model.settings.unpublished == "mixer"


def verify(settings: Dis, L: int, dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    verify_block(lambda scan: DiSBlock(settings, scan, skip=False), settings.width, "reference", cpu, dtype, Case(L))


def test_right_mixers_pass_the_self_test() -> None:
    """And the random state of the model's initial weights stays as it was. Wrong ones: test_verification.py."""
    settings = Dis(kind="dis", width=64, depth=2, patch=2, mixer="ssd", combine="hydra", state_size=N)
    state = torch.get_rng_state()
    verify(settings, 66, torch.float32)
    verify(settings, 66, torch.bfloat16)
    for combine in ("hydra", "sum"):  # of a single head the norm cancels the scale, and so nearly all of four gradients
        one_head = settings.model_copy(update={"width": 32, "combine": combine})
        for length in (35, 66, 258):
            verify(one_head, length, torch.bfloat16)
    assert torch.equal(state, torch.get_rng_state())
