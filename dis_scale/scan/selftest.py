"""Comparison of a backend with the reference on the device where it will run: `verify`, `distinct`, `errors`.

For kernels that the tests have not run on this device. Read next: reference.py.

Axes: B batch, L time, E channels, N states.
"""

import functools
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dis_scale.process.errors import WrongKernel
from dis_scale.scan import Direction, causal_conv_silu, selective_scan, two_way_conv_silu, two_way_scan
from dis_scale.scan.backend import KeepingStates
from dis_scale.scan.triton_fill import Filling

TAPS = 4
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2**-5}
"""Largest error by the type of the products, relative to a tensor's largest number.

In float32 it is ten times the tests' tolerance, in bfloat16 twice the four roundings of mamba-ssm (2^-8 each). A wrong kernel is
off by much more, and over a long sequence an approximate exponential multiplies its error.
"""


class Case(NamedTuple):
    """A pass through a model's scan and convolution: everything that selects kernels, except the types. The defaults are small."""

    L: int = 35
    E: int = 40
    N: int = 16
    images: int = 2
    directions: int = 2
    """1: `selective_scan` and `causal_conv_silu` instead of the two-way functions."""
    gradients: bool = True
    """Whether there is a backward pass; sampling has none."""
    keeping: bool = False
    """Whether scans keep their states, as in the second forward pass of a recomputed block."""

    def __str__(self) -> str:
        ways = "one way" if self.directions == 1 else "two-way"
        passes = "forward and backward" if self.gradients else "forward"
        return f"{self.images} images, L{self.L} E{self.E} N{self.N}, {ways}, {passes}{', recomputed' * self.keeping}"


@functools.cache
def verify(name: str, device: torch.device, dtype: torch.dtype, case: Case = Case()) -> None:
    """Compare a backend with the reference as `errors` does; WrongKernel names the backend to set instead.

    Kernels are compiled for L, E and N: after the cases of a model, training and sampling compile nothing. Once per process.
    """
    require_small(errors(name, device, dtype, case), name, device, dtype, case)


def require_small(
    found: Mapping[str, float], name: str, device: torch.device, dtype: torch.dtype, case: object, factor: float = 1.0
) -> None:
    """Raise a WrongKernel for an error beyond `factor` times TOLERANCE; it names the backend to set instead."""
    allowed = factor * TOLERANCE[dtype]
    for what, error in found.items():
        if not error <= allowed:  # it may be NaN
            instead = "reference" if name == "chunked" else "chunked"
            where = torch.cuda.get_device_name(device) if device.type == "cuda" else device
            raise WrongKernel(
                f"the {name} scan is wrong on {where}: {what} is off by {error:.1e} of its largest number, allowed are "
                f"{allowed:.1e} ({dtype}, {case}): set the backend to {instead}"
            )


def distinct(name: str, device: torch.device, cases: Iterable[Case]) -> list[Case]:
    """Return one case, the one with the most images, for each set of cases with the same compiled kernels of a backend."""
    return list({_kernels(name, device, case): case for case in sorted(cases)}.values())


def _kernels(name: str, device: torch.device, case: Case) -> tuple[Any, ...]:
    """Return the case without its images, and the lanes that Triton selects for them. The other backends keep no states."""
    if name != "triton":
        return case._replace(images=0, keeping=False)
    fill = filling_of(device, case)
    return case._replace(images=0), fill if case.gradients else fill.forward


def filling_of(device: torch.device, case: Case) -> Filling:
    """Return how the Triton backend fills this GPU: lanes of a channel in both passes, and whether both directions run at once."""
    from dis_scale.scan.triton_launch import filling_on  # Triton comes only with PyTorch's builds for Linux

    return filling_on(device, case.images, case.L, case.E, case.N, case.directions)


def errors(name: str, device: torch.device, dtype: torch.dtype, case: Case) -> dict[str, float]:
    """Largest error of each output and gradient of convolution and scan, relative to the tensor's largest number.

    `dtype` is the type of the products, float32 or bfloat16; every tensor has the type and the strides that a mixer passes.
    The backend computes all images of the case, two different ones in turn. No random state changes.
    """
    leaves = _random_leaves(case, dtype)
    expected = _results(leaves, "reference", device, torch.float64, case)
    got = _results(leaves, name, device, None, case)
    return {what: largest_error(x, expected[what]) for what, x in got.items()}


def largest_error(x: Tensor, exact: Tensor) -> float:
    """Return the largest error of x relative to the largest number of `exact`. x may repeat the images of `exact` in turn; only
    one repetition at a time is converted to float64."""
    largest = [(part.double() - exact[: len(part)]).abs().max() for part in x.split(len(exact))]
    least = torch.finfo(torch.float64).tiny  # if `exact` is all zeros, any other number is an error
    return (torch.stack(largest).max() / exact.abs().max().clamp(min=least)).item()


def _random_leaves(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs for two images. delta and A as in a trained mixer: some decays are near 1, some near 0.

    B and C are the last columns of a mixer's product, after those of the time step.
    """
    random, (L, E, N, *_) = torch.Generator().manual_seed(0), case

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    leaves = {"x and z": normal(2, L, 2 * E).to(dtype)}
    for way in ("forward", "backward")[: case.directions]:
        leaves |= {
            f"{way} conv weight": normal(E, TAPS), f"{way} conv bias": normal(E),
            f"{way} u": normal(2, L, E).to(dtype), f"{way} delta": normal(2, L, E).to(dtype), f"{way} A": -normal(E, N).exp(),
            f"{way} B and C": normal(2, L, ceil(E / 32) + 2 * N).to(dtype),
            f"{way} D": normal(E), f"{way} delta bias": normal(E) - 3,
        }  # fmt: skip
    return leaves


def _results(
    leaves: dict[str, Tensor], backend: str, device: torch.device, dtype: torch.dtype | None, case: Case
) -> dict[str, Tensor]:
    """The outputs, and the gradient of each leaf; `dtype` replaces the types of all leaves.

    The reference computes each of the two images once, and counts its gradients as often as the backend computes it.
    """
    image = torch.arange(case.images) % 2
    rows, weight = (image, torch.ones(case.images)) if backend != "reference" else (image[:2], image.bincount().float())
    leaf = {name: x.to(device, dtype or torch.float32).requires_grad_(case.gradients) for name, x in leaves.items()}
    inputs = {name: (x[rows] if x.ndim == 3 else x).to(dtype or leaves[name].dtype) for name, x in leaf.items()}
    with KeepingStates() if case.keeping else nullcontext():
        outputs = _outputs(inputs, backend)
    gradients: tuple[Tensor, ...] = ()
    if case.gradients:
        seeds = ("forward u", "forward delta", "x and z")
        dys = [(leaves[name][rows][..., : case.E] * weight[:, None, None]).to(outputs["scan"]) for name in seeds]
        gradients = torch.autograd.grad(list(outputs.values()), list(leaf.values()), dys[: len(outputs)])
    return {f"output of {name}": y.detach() for name, y in outputs.items()} | {
        f"gradient of {name}": g for name, g in zip(leaf, gradients, strict=case.gradients)
    }


def _outputs(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Outputs of the convolution and of the scan as in a mixer, of one direction if the inputs have no other."""
    x_BLE, z_BLE = inputs["x and z"].chunk(2, -1)
    conv, front = (inputs["forward conv weight"], inputs["forward conv bias"]), _direction(inputs, "forward")
    if "backward u" not in inputs:
        u_BLE = causal_conv_silu(x_BLE, *conv, backend=backend)
        return {"forward conv": u_BLE, "scan": selective_scan(*front, backend=backend)}
    convs = *conv, inputs["backward conv weight"], inputs["backward conv bias"]
    forward_BLE, backward_BLE = two_way_conv_silu(x_BLE, *convs, backend=backend)
    y_BLE = two_way_scan(front, _direction(inputs, "backward"), z_BLE, backend=backend)
    return {"forward conv": forward_BLE, "backward conv": backward_BLE, "scan": y_BLE}


def _direction(inputs: dict[str, Tensor], way: str) -> Direction:
    u, delta, A, product, D, bias = (inputs[f"{way} {name}"] for name in ("u", "delta", "A", "B and C", "D", "delta bias"))
    B_BLN, C_BLN = product[..., -2 * A.shape[1] :].chunk(2, -1)
    return Direction(u, delta, A, B_BLN, C_BLN, D, bias)
