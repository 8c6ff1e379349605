"""Comparison of a block's kernels with PyTorch's operations, on the device where it will run. Read next: ../../scan/selftest.py.

Axes: B samples, L tokens, D width.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dis_scale.scan.backend import KeepingStates
from dis_scale.scan.selftest import TOLERANCE, Case, largest_error, require_small

ROUNDINGS = 2
"""Tolerance of a block as a multiple of a scan's: a block also rounds its products. Wrong kernels are off by ten times as much."""
CANCELLING = 4
"""Factor by which an error beyond the tolerance may exceed the error of PyTorch's operations in the same types.

Sums over all tokens have such large errors if their terms mostly cancel. With a single head of state-space duality they cancel
nearly completely, since the norm behind the gate cancels the head's scale.
"""


def verify_block(
    make: Callable[[str], nn.Module], width: int, scan: str, device: torch.device, dtype: torch.dtype, case: Case
) -> None:
    """Compare `make(scan)`, a block of a residual stream, with its definition in float64; WrongKernel if they differ.

    `dtype` is that of the products. Once all cases of a model are verified, training and sampling compile nothing.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        exact, made, plain = as_trained(make("chunked")).double(), make(scan), make("chunked")
        for each in (made, plain):
            each.load_state_dict(exact.state_dict())
        inputs = torch.randn(4, 2, case.L, width).unbind()  # branch, stream, and the gradients of both outputs
    images = torch.arange(case.images, device=device) % 2
    run = functools.partial(_results, inputs=[x.to(device) for x in inputs], images=images, case=case)
    expected = run(exact.to(device), dtype=torch.float64)

    def errors_of(block: nn.Module) -> dict[str, float]:
        found = run(block.to(device), dtype=dtype)
        return {what: largest_error(x, expected[what]) for what, x in found.items()}

    errors = errors_of(made)
    tolerance = ROUNDINGS * TOLERANCE[dtype]
    if large := [what for what, error in errors.items() if not error <= tolerance]:
        plain_errors = errors_of(plain)
        for what in large:
            errors[what] /= max(1.0, CANCELLING * plain_errors[what] / tolerance)
    require_small(errors, scan, device, dtype, case, ROUNDINGS)


@torch.no_grad()
def as_trained(block: nn.Module) -> nn.Module:
    """Change a block's initial weights so that its output depends on all of them: some decays near 1, some near 0.

    With the initial weights D u hides the other terms: in bfloat16 a scan without any recurrence would pass.
    """
    weights = {name.rpartition(".")[2]: weight for name, weight in block.named_parameters()}
    for name in {"dynamics", "A_log", "dt_bias", "D"} & weights.keys():
        weights[name].normal_()
    if "dynamics" in weights:
        weights["dynamics"][:, -1] -= 3
        rank = weights["dt_proj"].shape[2]
        weights["x_proj"][:, rank:] *= 12
    return block


def _results(block: nn.Module, inputs: list[Tensor], images: Tensor, dtype: torch.dtype, case: Case) -> dict[str, Tensor]:
    """Return the outputs, and the gradients of both inputs and of each parameter. float64 computes each of the two images once.

    A gradient counts an image as often as it occurs in `images`.
    """
    stream = torch.float64 if dtype == torch.float64 else torch.float32
    counts, rows = torch.ones_like(images), images
    if dtype == torch.float64:
        counts, rows = images.bincount(minlength=2), torch.arange(2, device=images.device)
    branch_BLD, stream_BLD = (x.to(stream).requires_grad_(case.gradients) for x in inputs[:2])
    named = {"branch": branch_BLD, "stream": stream_BLD} | dict(block.named_parameters())
    with torch.set_grad_enabled(case.gradients), KeepingStates() if case.keeping else nullcontext():
        outputs = block(branch_BLD[rows].to(dtype), stream_BLD[rows], None, None, None)
    results = {name: x.detach() for name, x in zip(("output", "stream behind it"), outputs, strict=True)}
    if case.gradients:
        given = [x[rows].to(out) * counts[:, None, None].to(out) for x, out in zip(inputs[2:], outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, list(named.values()), given)
        results |= {f"gradient of {name}": g for name, g in zip(named, gradients, strict=True)}
    return results
