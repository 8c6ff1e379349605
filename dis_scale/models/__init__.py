"""The backbones: `build` creates one from its settings.

Heavy imports are deferred, since recipes consist of the families' settings. Read next: family.py (what a family is), dis/, dit/ and
diffussm/ (the built-in ones), checkpointing.py (activation memory), cost.py (parameters, operations and bytes).
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

from dis_scale.models import families
from dis_scale.models.settings import FamilySettings
from dis_scale.process.errors import UserError
from dis_scale.process.settings import LatentShape, Precision

if TYPE_CHECKING:
    import torch

    from dis_scale.models.tokens import Backbone


def build(
    settings: FamilySettings,
    shape: LatentShape,
    num_classes: int | None,
    *,
    scan: str = "auto",
    checkpointing: str = "none",
    precision: Precision = "fp32",
    seed: int = 0,
) -> "Backbone":
    """Return a model with initial weights on the CPU. It depends only on the arguments; the caller's generators do not advance.

    `scan` is the backend of the selective scan, `checkpointing` a mode of checkpointing.py, `precision` the
    type of the products: the weights are float32 in both. UserError for invalid settings.
    """
    import torch

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: it would also seed every GPU
        model = construct(settings, shape, num_classes, scan=scan, checkpointing=checkpointing)
    model.precision = precision
    return model


def construct(
    settings: FamilySettings, shape: LatentShape, num_classes: int | None, *, scan: str = "auto", checkpointing: str = "none"
) -> "Backbone":
    """Return a model on the current device, with weights from its current generator. Needs no memory on the meta device."""
    from dis_scale.models.checkpointing import require_known

    require_known(checkpointing)
    return families.find(settings.kind, settings.needed_code).network(settings, shape, num_classes, scan, checkpointing)


def verify_kernels(model: "Backbone", device: "torch.device", images: Collection[int], *, training: bool) -> None:
    """Compare a model's GPU kernels with the reference, at the model's sizes. A DisScaleError names another backend to set.

    `images` are the image counts of the model's forward passes; they select the kernels. `training` includes the backward pass.
    On a CPU the function does nothing: the tests cover those kernels.
    """
    if device.type == "cuda":
        model.verify_kernels(device, images, training=training)


def check_finite(model: "torch.nn.Module") -> None:
    """Raise a UserError that names the first weight with a NaN or an infinity."""
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise UserError(f"weight {name} is not finite (NaN or infinity): the checkpoint is damaged or training diverged")
