"""State-space duality: three forms of one function, its gradients, and what it refuses."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from dis_scale.process.errors import UserError
from dis_scale.scan import duality as module
from dis_scale.scan import triton_ssd
from dis_scale.scan.duality import Way, chunked, recurrence, ssd
from tests.support.ssd import inputs, outputs_and_gradients


def dense(x_BLHP: Tensor, own_BLH: Tensor, earlier: Way | None, later: Way | None, exclusive: bool) -> Tensor:
    """The masked quadratic form, one pair of tokens at a time: each weight is a product of the factors between them."""
    y_BLHP = own_BLH[..., None] * x_BLHP
    for way, sign in ((earlier, 1), (later, -1)):
        if way is None:
            continue
        factor_BLH = (way.step_BLH * way.A_H).exp()
        for i in range(x_BLHP.shape[1]):
            weight_BH = x_BLHP.new_ones(()) if exclusive else factor_BLH[:, i]
            for j in range(i - sign, x_BLHP.shape[1] if sign < 0 else -1, -sign):
                score_B1 = (way.C_BLN[:, i] * way.B_BLN[:, j]).sum(-1, keepdim=True)
                y_BLHP[:, i] += (weight_BH * score_B1 * way.step_BLH[:, j])[..., None] * x_BLHP[:, j]
                weight_BH = weight_BH * factor_BLH[:, j]
    return y_BLHP


def results(form: module.Form, x_and_own: Sequence[Tensor], ways: Sequence[Way | None], exclusive: bool) -> list[Tensor]:
    """y, and the gradients of its squares."""
    leaves = [t.clone().requires_grad_() for t in (*x_and_own, *[t for way in ways if way for t in way])]
    each = module.ways_of(leaves[2:])
    y = form(leaves[0], leaves[1], each[0] if ways[0] else None, each[-1] if ways[1] else None, exclusive)
    return [y, *torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True)]


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 4, 16), (7, 2, 3, 16), (35, 1, 8, 128)])
def test_recurrence_and_chunks_are_the_quadratic_form(sizes: tuple[int, int, int, int], exclusive: bool) -> None:
    """Outputs and gradients, also of one direction, and of a length that chunks do not divide."""
    given = inputs(*sizes)
    for ways in (given[2:], (given[2], None), (None, given[3])):
        expected = results(dense, given[:2], ways, exclusive)
        for form in (recurrence, partial(chunked, most=8)):
            for got, exact in zip(results(form, given[:2], ways, exclusive), expected, strict=True):
                assert (got - exact).abs().max() <= 1e-9 * max(1.0, exact.detach().abs().max().item())


MINIMAL = [
    [0.134329165, -0.669107934, 0.235627451, 0.208757700, -0.557698963, 0.236076951, 1.056962220, -0.221936947],
    [-0.039755709, -0.116212731, 0.700676588, -0.234600460, -0.086563368, 0.420170899, -0.008932622, -0.024687555],
]  # fmt: skip
"""What mamba_ssm's `ssd_minimal_discrete` (commit e9594ce) returns for each head in chunks of 4, run outside of this project.

flash-linear-attention's `naive_recurrent_simple_gla` (fla-core 0.6.0) returns it to 6e-8, in float32.
"""


def test_triton_narrows_no_tensor_of_float64() -> None:
    x, own, way, _ = inputs(4, 1, 2, 3)
    for x_BLHP, own_BLH, earlier in ((x, own.float(), None), (x.float(), own, None), (x.float(), own.float(), way)):
        with pytest.raises(UserError, match="the triton scan computes in float32, got float64"):
            triton_ssd.ssd(x_BLHP, own_BLH, earlier, None, False)


@pytest.mark.parametrize("form", [recurrence, chunked])
def test_one_direction_is_mamba_2s(form: module.Form) -> None:
    def waves(*shape: int) -> Tensor:
        return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).cos().view(shape)

    x, step, B, C = waves(1, 8, 2, 1), waves(1, 8, 2).exp() / 4, waves(1, 8, 3), waves(1, 8, 3) + 1
    own = (B * C).sum(-1)[..., None] * step
    y = form(x, own, Way(step, -torch.tensor([1.0, 8.0], dtype=torch.float64), B, C), None, False)
    assert torch.allclose(y[0, :, :, 0].T, torch.tensor(MINIMAL, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("sizes", [(66, 4, 64, 64), (258, 1, 16, 16), (131, 2, 64, 128), (127, 1, 8, 16), (1000, 1, 4, 16)])
def test_chunks_in_float32_have_the_definitions_outputs_and_gradients(sizes: tuple[int, int, int, int], exclusive: bool) -> None:
    """Also where the exponents' sums over a chunk are so large that their differences would lose their digits."""
    exact, rounded = (inputs(*sizes, dtype) for dtype in (torch.float64, torch.float32))
    forms = (
        outputs_and_gradients(exact, exclusive=exclusive, backend="reference"),
        outputs_and_gradients(rounded, exclusive=exclusive, backend="chunked"),
    )
    for a, b in zip(*forms, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("L", [1, 3, 5, 8])
def test_gradients_are_those_of_differences(L: int, exclusive: bool) -> None:
    """Of one chunk, of two, and of three: one that takes a state and passes one on."""
    x, own, *ways = inputs(L, 2, 2, 3)
    leaves = [t.requires_grad_() for t in (x, own, *ways[0], *ways[1])]

    def function(x: Tensor, own: Tensor, *ways: Tensor) -> Tensor:
        return chunked(x, own, Way(*ways[:4]), Way(*ways[4:]), exclusive, most=3)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("exclusive", [False, True])
def test_the_later_tokens_are_the_earlier_ones_of_the_image_turned_around(exclusive: bool) -> None:
    x, own, earlier, later = inputs(19, 2, 4, 16)
    turned = [Way(*[t.flip(1) if t.ndim == 3 else t for t in way]) for way in (later, earlier)]
    assert torch.allclose(
        ssd(x, own, earlier, later, exclusive), ssd(x.flip(1), own.flip(1), turned[0], turned[1], exclusive).flip(1)
    )


def test_a_step_of_zero_and_a_decay_to_nothing_have_finite_gradients() -> None:
    """softplus gives zero for -104 in float32, and a factor of exp(-800) is zero."""
    x, own, earlier, later = inputs(9, 1, 2, 4, torch.float32)
    step = torch.tensor([0.0, 1e-38, 100.0] * 3).view(1, 9, 1).expand(2, 9, 1)
    leaves = [t.clone().requires_grad_() for t in (x, own, step, *earlier[1:])]
    y = ssd(leaves[0], leaves[1], Way(*leaves[2:]), later._replace(A_H=torch.tensor([-800.0])))
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), leaves))


def test_inputs_that_do_not_fit_are_named() -> None:
    x, own, earlier, later = inputs(4, 2, 4, 8)
    with pytest.raises(UserError, match=r"ssd: C_BLN is \(2, 3, 8\) torch.float64 on cpu, expected \(2, 4, 8\) of floats on cpu"):
        ssd(x, own, earlier, later._replace(C_BLN=later.C_BLN[:, 1:]))
    with pytest.raises(UserError, match="a direction with a state at least"):
        ssd(x, own, None, None)
    with pytest.raises(UserError, match=r"ssd: x_BLHP is \(2, 4, 2, 4\) torch.int64 on cpu, expected .* of floats on cpu"):
        ssd(x.long(), own, earlier, later)
    with pytest.raises(UserError, match="a direction with a state at least"):
        ssd(x, own, earlier._replace(B_BLN=earlier.B_BLN[:, :, :0], C_BLN=earlier.C_BLN[:, :, :0]), None)


def test_a_second_derivative_is_refused_where_it_would_lack_terms() -> None:
    x, own, earlier, later = inputs(4, 2, 4, 8)
    with pytest.raises(NotImplementedError, match="the chunked scan is differentiable once"):
        torch.autograd.grad(ssd(x.requires_grad_(), own, earlier, later).square().sum(), x, create_graph=True)
