"""Comparison of a backend with the reference on the device where it will run: `verify`, `errors`.

For kernels that the tests have not run on this device. Read next: reference.py.

Axes: B batch, L time, E channels, N states.
"""

import functools

import torch
from torch import Tensor

from dis_scale.errors import DisScaleError
from dis_scale.scan import Direction, two_way_conv_silu, two_way_scan

TAPS = 4
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2**-5}
"""Largest error by the type of the products, relative to a tensor's largest number.

Ten times what the tests allow in float32, and in bfloat16 twice the four roundings of mamba-ssm (2^-8 each): a wrong kernel
is off by much more, and an approximate exponential multiplies its error over a long sequence.
"""


@functools.cache
def verify(
    name: str, device: torch.device, dtype: torch.dtype, L: int = 35, E: int = 40, N: int = 16, images: int = 2
) -> None:
    """Compare a backend with the reference as `errors` does; DisScaleError names the backend to set instead.

    Kernels are compiled for L, E and N, and selected by the number of images: with a model's sizes, training compiles none of
    them again. Once per process.
    """
    for what, error in errors(name, device, dtype, L, E, N, images).items():
        if not error <= TOLERANCE[dtype]:  # it may be NaN
            instead = "reference" if name == "chunked" else "chunked"
            where = torch.cuda.get_device_name(device) if device.type == "cuda" else device
            raise DisScaleError(
                f"the {name} scan is wrong on {where}: {what} is off by {error:.1e} of its largest number, allowed are "
                f"{TOLERANCE[dtype]:.1e} ({dtype}, L{L} E{E} N{N}): set the backend to {instead}"
            )


def errors(
    name: str, device: torch.device, dtype: torch.dtype, L: int, E: int, N: int, images: int = 2
) -> dict[str, float]:
    """Largest error of each output and gradient of both two-way functions, relative to the tensor's largest number.

    `dtype` is the type of the products, float32 or bfloat16; every tensor has the type and the strides that a mixer passes.
    The backend computes `images` images, two different ones in turn. No random state changes.
    """
    leaves = _random_leaves(L, E, N, dtype)
    expected = _outputs_and_gradients(leaves, "reference", device, torch.float64, images)
    got = _outputs_and_gradients(leaves, name, device, None, images)
    return {what: ((x - expected[what]).abs().max() / expected[what].abs().max()).item() for what, x in got.items()}


def _random_leaves(L: int, E: int, N: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of both functions for two images. delta and A as in a trained mixer: some decays are near 1, some near 0."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    leaves = {"x and z": normal(2, L, 2 * E).to(dtype)}
    for way in ("forward", "backward"):
        leaves |= {
            f"{way} conv weight": normal(E, TAPS), f"{way} conv bias": normal(E),
            f"{way} u": normal(2, L, E).to(dtype), f"{way} delta": normal(2, L, E).to(dtype), f"{way} A": -normal(E, N).exp(),
            f"{way} B and C": normal(2, L, 2 * N).to(dtype), f"{way} D": normal(E), f"{way} delta bias": normal(E) - 3,
        }  # fmt: skip
    return leaves


def _outputs_and_gradients(
    leaves: dict[str, Tensor], backend: str, device: torch.device, dtype: torch.dtype | None, images: int
) -> dict[str, Tensor]:
    """The outputs of two images, and the gradient of each leaf, as float64; `dtype` replaces the types of all leaves.

    The reference computes each image once, and counts its gradients as often as the backend computes it.
    """
    image = torch.arange(images) % 2
    rows, weight = (image, torch.ones(images)) if backend != "reference" else (image[:2], image.bincount().float())
    leaf = {name: x.to(device, dtype or torch.float32).requires_grad_() for name, x in leaves.items()}
    inputs = {name: (x[rows] if x.ndim == 3 else x).to(dtype or leaves[name].dtype) for name, x in leaf.items()}
    x_BLE, z_BLE = inputs["x and z"].chunk(2, -1)
    front, back = _direction(inputs, "forward"), _direction(inputs, "backward")
    convs = (
        inputs["forward conv weight"], inputs["forward conv bias"], inputs["backward conv weight"], inputs["backward conv bias"],
    )  # fmt: skip
    forward_BLE, backward_BLE = two_way_conv_silu(x_BLE, *convs, backend=backend)
    y_BLE = two_way_scan(front, back, z_BLE, backend=backend)
    outputs = {"forward conv": forward_BLE, "backward conv": backward_BLE, "scan": y_BLE}
    dys = [
        (leaves[name][rows] * weight[:, None, None]).to(y_BLE) for name in ("forward u", "backward u", "backward delta")
    ]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaf.values()), dys)
    shown = image if backend == "reference" else torch.arange(images)
    return {f"output of {name}": y.detach().double()[shown] for name, y in outputs.items()} | {
        f"gradient of {name}": g.double() for name, g in zip(leaf, gradients, strict=True)
    }


def _direction(inputs: dict[str, Tensor], way: str) -> Direction:
    B_BLN, C_BLN = inputs[f"{way} B and C"].chunk(2, -1)
    u, delta, A, D, bias = (inputs[f"{way} {name}"] for name in ("u", "delta", "A", "D", "delta bias"))
    return Direction(u, delta, A, B_BLN, C_BLN, D, bias)
