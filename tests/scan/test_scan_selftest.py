"""The comparison of a backend with the reference at a worker's start: right backends pass, wrong ones are named."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from dis_scale import models
from dis_scale.models.dis import network, verification
from dis_scale.models.dis.settings import Dis
from dis_scale.process.errors import DisScaleError
from dis_scale.recipe import LatentShape
from dis_scale.scan import Direction, _backend, _choose, chunked
from dis_scale.scan.backend import Backend, from_one_way
from dis_scale.scan.reference import causal_conv_silu, selective_scan
from dis_scale.scan.selftest import TOLERANCE, Case, distinct, errors, filling_of, verify
from tests.support.scans import SANITIZED, h200

__all__ = ["h200"]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
L2 = Case(258, 2048, 16)
"""DiS-L/2 at 256 pixels."""


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["reference", "native", "chunked"])
def test_a_right_backend_passes(backend: str, dtype: torch.dtype) -> None:
    """Products of one type, weights and dynamics in float32."""
    state = torch.get_rng_state()
    verify(backend, CPU, dtype)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pass_without_gradients_compares_outputs_alone() -> None:
    assert list(errors("chunked", CPU, torch.float32, Case(gradients=False))) == [
        "output of forward conv", "output of backward conv", "output of scan",
    ]  # fmt: skip


def test_one_direction_is_compared_by_the_one_way_functions() -> None:
    found = errors("chunked", CPU, torch.float32, Case(directions=1))
    assert {"output of forward conv", "output of scan", "gradient of forward A"} <= found.keys()
    assert not [what for what in found if "backward" in what]
    assert all(error < TOLERANCE[torch.float32] for error in found.values())


def image_counts(name: str, case: Case, *images: int) -> list[int]:
    return [one.images for one in distinct(name, CUDA, [case._replace(images=n) for n in images])]


def test_each_choice_of_lanes_is_compared_once(h200: None) -> None:
    """For DiS-L/2 32 images and 31 get one lane per channel, 8 and 13 get four forward, and 8 two backward where 13 get one."""
    assert image_counts("triton", L2, 32, 31, 8, 2) == [2, 8, 32]
    assert image_counts("triton", L2, 8, 13) == [8, 13]
    assert image_counts("triton", L2._replace(gradients=False), 8, 13) == [13]
    assert image_counts("chunked", L2, 32, 31, 8, 2) == [32]


def test_a_recomputed_blocks_second_pass_is_compared_too(h200: None) -> None:
    both = [L2._replace(images=32, keeping=keeping) for keeping in (False, True)]
    assert distinct("triton", CUDA, both) == both
    assert len(distinct("mamba", CUDA, both)) == 1


def test_compute_sanitizer_sees_one_lane_and_four(h200: None) -> None:
    assert [filling_of(CUDA, case)[:2] for case in SANITIZED] == [(1, 1), (4, 4), (4, 4)]
    assert eval(str(SANITIZED)) == SANITIZED, "its program has them as text"


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("images", [1, 2, 8, 32])
def test_the_lanes_are_those_that_the_backend_selects(h200: None, images: int, directions: int) -> None:
    from dis_scale.scan import triton

    (L, E, N, *_) = case = L2._replace(images=images, directions=directions)
    with FakeTensorMode():
        u, A, rest = torch.empty(images, L, E, device=CUDA), torch.empty(E, N), [torch.empty(1)] * 4
        selected = triton._filling([Direction(u, u, A, *rest)] * directions)
    assert filling_of(CUDA, case) == selected


def launches_of(run: Callable[[], object]) -> set[tuple[object, ...]]:
    """Triton's launches by kernel, types and constants, which are all that it compiles for; none runs."""
    from benchmarks.account import recorded

    seen = set[tuple[object, ...]]()
    with recorded() as launched:
        run()
    for launch, tensors, _ in launched:
        types = tuple(getattr(x, "dtype", None) for x in tree_leaves(tensors))
        seen.add((launch.kernel.__name__, types, *sorted((name, str(value)) for name, value in launch.numbers.items())))
    return seen


@pytest.mark.parametrize(("checkpointing", "keeps"), [("none", False), ("none", True), ("block", False)])
@pytest.mark.parametrize("directions", [2, 1])
def test_a_model_compiles_nothing_after_the_self_test(
    monkeypatch: pytest.MonkeyPatch, directions: Literal[1, 2], checkpointing: str, keeps: bool
) -> None:
    """In training, in bfloat16, with tensors of the self-test's types and strides; also if all scans keep their states."""
    pytest.importorskip("triton", reason="Triton comes only with PyTorch's builds for Linux")
    monkeypatch.setattr("dis_scale.scan.problem", lambda *_: None)
    settings = Dis(kind="dis", width=64, depth=2, patch=2, directions=directions)
    options = {"scan": "triton", "checkpointing": checkpointing, "precision": "bf16"}
    model = models.build(settings, LatentShape(4, 8), 10, **options)  # type: ignore[arg-type]
    model.keeps_states = keeps
    images, t, y = torch.randn(3, 4, 8, 8), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    try:
        launched = launches_of(lambda: model(images, t, y).sum().backward())
        monkeypatch.setattr(verification, "require_small", lambda *_: None)
        network._verify_once.cache_clear()
        compared = launches_of(lambda: model.verify_kernels(CPU, [3], training=True))
    finally:
        for cached in (_backend, _choose, network._verify_once):
            cached.cache_clear()
    assert {name for name, *_ in launched} >= {"scan_forward", "scan_backward", "conv_forward", "conv_backward"}
    assert launched <= compared
    keeping = {("KEEP", "True") in launch for launch in launched if launch[0] == "scan_forward"}
    assert keeping == {"none": {keeps}, "block": {False, True}}[checkpointing]


def wrong_gradient(direction: Direction, reverse: bool) -> Tensor:
    """Right outputs; in the reversed direction the gradient of A is doubled."""
    A = direction.A_EN
    return selective_scan(direction._replace(A_EN=A + (A - A.detach()) * reverse), reverse)


def without_the_last_channel(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """As a kernel that does not write the end of an incomplete group."""
    y = causal_conv_silu(x, weight, bias, reverse)
    return torch.cat([y[..., :-1], y[..., -1:] * 0], -1)


def not_a_number(direction: Direction, reverse: bool) -> Tensor:
    return selective_scan(direction, reverse) * float("nan")


WRONG: dict[str, tuple[Backend, str]] = {
    "gradient": (from_one_way(wrong_gradient, causal_conv_silu), r"gradient of backward A is off by 1\.0e\+00"),
    "conv": (from_one_way(selective_scan, without_the_last_channel), r"output of forward conv is off by \d"),
    "NaN": (from_one_way(not_a_number, causal_conv_silu), "output of scan is off by nan"),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_backend_is_an_error_that_names_another(monkeypatch: pytest.MonkeyPatch, wrong: str, dtype: torch.dtype) -> None:
    backend, message = WRONG[wrong]
    monkeypatch.setattr(chunked, "backend", backend)
    _backend.cache_clear()
    verify.cache_clear()
    try:
        with pytest.raises(DisScaleError, match=f"the chunked scan is wrong on cpu: {message}.*: set the backend to reference"):
            verify("chunked", CPU, dtype)
    finally:
        _backend.cache_clear()
        verify.cache_clear()
