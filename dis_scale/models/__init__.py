"""The backbones: `build` makes one from its settings.

Read next: dis.py, dit.py, diffussm.py; checkpointing.py for what their blocks keep, cost.py for what they cost, official.py and
export.py for the ways in and out.
"""

import torch

from dis_scale.errors import UserError
from dis_scale.models.checkpointing import require_known
from dis_scale.models.diffussm import DiffuSSM
from dis_scale.models.dis import DiS
from dis_scale.models.dit import DiT
from dis_scale.models.tokens import Backbone
from dis_scale.recipe import DiffuSsm, Dis, Dit, LatentShape

__all__ = ["Backbone", "DiS", "DiT", "DiffuSSM", "build", "check_finite", "construct"]


def build(
    settings: Dis | DiffuSsm | Dit,
    shape: LatentShape,
    num_classes: int | None,
    *,
    scan: str = "auto",
    checkpointing: str = "none",
    seed: int = 0,
) -> Backbone:
    """A model with initial weights on the CPU: a function of the arguments alone; no generator of the caller's moves.

    `scan` names the backend of the selective scan, `checkpointing` what is kept for the backward pass
    (checkpointing.py). UserError for what does not fit.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would seed every GPU too
        return construct(settings, shape, num_classes, scan=scan, checkpointing=checkpointing)


def construct(
    settings: Dis | DiffuSsm | Dit,
    shape: LatentShape,
    num_classes: int | None,
    *,
    scan: str = "auto",
    checkpointing: str = "none",
) -> Backbone:
    """As `build`, on the current device and from the current generator; on the meta device it costs no memory."""
    require_known(checkpointing)
    match settings:
        case Dis():
            return DiS(settings, shape, num_classes, scan, checkpointing)
        case Dit():
            return DiT(settings, shape, num_classes, checkpointing)
        case DiffuSsm():
            return DiffuSSM(settings, shape, num_classes, checkpointing)


def check_finite(model: torch.nn.Module) -> None:
    """UserError that names the first weight with a NaN or an infinity in it."""
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise UserError(
                f"weight {name} is not finite (NaN or infinity): the checkpoint is damaged or training diverged"
            )
