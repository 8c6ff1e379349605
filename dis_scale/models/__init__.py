"""The backbones: `build` creates one from its settings.

Read next: dis.py, dit.py and diffussm.py (models), checkpointing.py (activation memory), cost.py (parameters, operations and
bytes), official.py and export.py (import and export of weights).
"""

from collections.abc import Collection

import torch

from dis_scale.models import s4d
from dis_scale.models.checkpointing import recompute_every, require_known
from dis_scale.models.diffussm import DiffuSSM
from dis_scale.models.dis import DiS
from dis_scale.models.dit import DiT
from dis_scale.models.tokens import Backbone
from dis_scale.process.errors import UserError
from dis_scale.recipe import DiffuSsm, Dis, Dit, LatentShape, Precision
from dis_scale.scan import choose
from dis_scale.scan.selftest import Case, distinct, verify

__all__ = [
    "Backbone",
    "DiS",
    "DiT",
    "DiffuSSM",
    "build",
    "check_finite",
    "construct",
    "decays",
    "rate_group",
    "verify_kernels",
]
UNDECAYED = {"A_log", "D", "dt_bias", "log_dt", "log_neg_re", "im", "B", "bias", "position"}
"""Last part of the names of parameters that weight decay would spoil, whatever their number of axes; with one axis: all."""

DYNAMICS = {"A_log", "dt_bias", "log_dt", "log_neg_re", "im", "B"}
"""Last part of the names of a scan's dynamics: what S4's code trains at a rate of its own."""
INPUT = ("patches.", "embed.", "time.up.", "label.", "position")
"""Beginnings of the names of weights whose inputs do not grow with the width, and of the tables."""


def build(
    settings: Dis | DiffuSsm | Dit,
    shape: LatentShape,
    num_classes: int | None,
    *,
    scan: str = "auto",
    checkpointing: str = "none",
    precision: Precision = "fp32",
    seed: int = 0,
) -> Backbone:
    """Return a model with initial weights on the CPU. It depends only on the arguments; the caller's generators do not advance.

    `scan` is the backend of the selective scan and of S4D's kernel, `checkpointing` a mode of checkpointing.py, `precision` the
    type of the products: the weights are float32 in both. UserError for invalid settings.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: it would also seed every GPU
        model = construct(settings, shape, num_classes, scan=scan, checkpointing=checkpointing)
    model.precision = precision
    return model


def construct(
    settings: Dis | DiffuSsm | Dit,
    shape: LatentShape,
    num_classes: int | None,
    *,
    scan: str = "auto",
    checkpointing: str = "none",
) -> Backbone:
    """Like `build`, on the current device and from the current generator. Needs no memory on the meta device."""
    require_known(checkpointing)
    match settings:
        case Dis():
            return DiS(settings, shape, num_classes, scan, checkpointing)
        case Dit():
            return DiT(settings, shape, num_classes, checkpointing)
        case DiffuSsm():
            return DiffuSSM(settings, shape, num_classes, scan, checkpointing)


def verify_kernels(model: Backbone, device: torch.device, images: Collection[int], training: bool) -> None:
    """Compare the GPU kernels that a model runs with the reference, at its sizes; DisScaleError names another backend to set.

    `images` are the image counts of its forward passes, which select kernels: the scan runs once for each set of compiled
    kernels. Sampling needs no backward pass. Nothing to do on a CPU, whose kernels the tests have run.
    """
    if isinstance(model, DiS) and device.type == "cuda":
        name = choose(model.scan, device).name
        for case in distinct(name, device, _cases(model, images, training)):
            verify(name, device, model.compute_dtype, case)
    if isinstance(model, DiffuSSM) and device.type == "cuda":
        s4d.verify(model.settings, model.scan, (model.shape.size // model.patch) ** 2, device)


def _cases(model: DiS, images: Collection[int], training: bool) -> list[Case]:
    """All passes of these numbers of images. A recomputed block's second forward pass keeps states; the first has no backward."""
    mode, sizes = model.checkpointing if training else "none", model.scan_sizes
    passes = [(training and recompute_every(mode) != 1, False), (True, True)][: 1 if mode == "none" else 2]
    return [Case(*sizes, count, model.settings.directions, *each) for count in images for each in passes]


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: not to the scans' dynamics, norms, biases and positions (as in Mamba and S4)."""
    return parameter.ndim > 1 and name.rpartition(".")[2] not in UNDECAYED


def rate_group(name: str, parameter: torch.Tensor) -> str:
    """Return the field of `Rates` for a parameter."""
    last = name.rpartition(".")[2]
    if last in DYNAMICS:
        return "dynamics"
    if parameter.ndim < 2 or last in ("bias", "C"):
        return "vectors"
    return "input" if name.startswith(INPUT) else "output" if name.startswith("final.") else "hidden"


def check_finite(model: torch.nn.Module) -> None:
    """Raise a UserError that names the first weight with a NaN or an infinity."""
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise UserError(
                f"weight {name} is not finite (NaN or infinity): the checkpoint is damaged or training diverged"
            )
