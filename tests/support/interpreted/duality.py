"""State-space duality."""

from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from dis_scale.models.checkpointing import run_block
from dis_scale.models.dis.network import DiSBlock
from dis_scale.models.dis.settings import Dis
from tests.support import ssd
from tests.support.interpreted.blocks import verified


@pytest.mark.parametrize(("combine", "width"), [("sum", 64), ("hydra", 64), ("hydra", 128)])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_the_self_test_of_state_space_duality_passes(
    combine: str, width: int, dtype: torch.dtype, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chunks; of four heads, Hydra's mixer is one function. The interpreter would multiply the bits of bfloat16 as integers."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def multiply_wide(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(builder, *[builder.cast_impl(x, tl.float32) for x in (a, b)], *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply_wide)
    settings = {"kind": "dis", "width": width, "depth": 2, "patch": 2, "mixer": "ssd", "combine": combine, "state_size": 16}
    verified(Dis.model_validate(settings), 66, dtype)
    assert taken == ([width == 128] if combine == "hydra" else [])


@pytest.mark.parametrize(
    ("combine", "width", "conditioning"), [("sum", 64, "adaln_zero"), ("hydra", 128, "tokens"), ("hydra", 128, "adaln_zero")]
)
def test_a_recomputed_block_has_the_same_gradients(combine: str, width: int, conditioning: str) -> None:
    """It keeps states only when it is computed again. Two chunks of 20 tokens, also behind a modulation and before a gate."""
    given = {"mixer": "ssd", "combine": combine, "state_size": 16, "conditioning": conditioning}
    made = DiSBlock(Dis.model_validate({"kind": "dis", "width": width, "depth": 2, "patch": 2, **given}), "triton", skip=False)
    torch.manual_seed(0)
    if made.modulation is not None:
        torch.nn.init.normal_(made.modulation.weight, std=0.1)
    h, r = torch.randn(1, 40, width).requires_grad_(), torch.randn(1, 40, width)
    c = None if made.modulation is None else torch.randn(1, width)
    inputs = [h, *made.parameters()]

    def gradients(mode: str) -> list[torch.Tensor]:
        outs = run_block(mode, 0, made, h, r, c, None, None)
        return list(torch.autograd.grad(outs, inputs, [torch.cos(out.detach()) for out in outs]))

    kept = gradients("none")
    for mode in ("block", "selective"):
        for got, expected in zip(gradients(mode), kept, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# L, H, P, N: one chunk; two, the second incomplete, of all heads in one program; three, with a program for each of 17 heads,
# and two for the sums of their decays.
DUAL = [(7, 1, 3, 5), (63, 3, 16, 64), (66, 17, 20, 16)]


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("sizes", DUAL, ids=str)
def test_state_space_duality(sizes: tuple[int, int, int, int], *, exclusive: bool) -> None:
    """Also of one direction; against the recurrence in float64."""
    exact, single = (ssd.inputs(*sizes, dtype) for dtype in (torch.float64, torch.float32))
    for present in ((True, True), (True, False), (False, True)):
        if sizes != DUAL[-1] and not all(present):
            continue
        results = []
        for (x, own, *ways), backend in ((exact, "reference"), (single, "triton")):
            earlier, later = (way if is_present else None for way, is_present in zip(ways, present, strict=True))
            results.append(ssd.outputs_and_gradients((x, own, earlier, later), exclusive=exclusive, backend=backend))
        for a, b in zip(*results, strict=True):  # A's gradient is a sum over all tokens, in which most cancels
            assert (a - b).abs().max() <= (5e-5 if a.ndim == 1 else 1e-5) * a.abs().max()
