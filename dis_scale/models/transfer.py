"""Learning-rate transfer over width: maximal-update parametrisation for Adam (Yang et al., arXiv 2203.03466, table 3).

A learning rate that is best at `train.base_width` stays nearly the best at other widths. Only rates, decays, Adam's eps and initial
weights change. The network computes the same function of its weights, so a checkpoint needs no further setting. Depth, batch size
and length of training are not covered.

DiT follows Zheng et al. (arXiv 2505.15270): the size of a head is fixed, and modulations are products within the width. Their DiT
has no `modern` parts; with these parts the transfer is experimental.

DiS (S6) and DiffuSSM (S4D) are experimental. Each channel of a scan depends on that channel's input, step and rates. In S6 it also
depends on B and C, which are 2 N averages over the width; their number does not grow with the width. So B and C start and learn
like outputs. The step's two products are products within the width; rates, D and biases are vectors. We know of no theorem for
this: in the limit B and C start at zero, and neither has a gradient before the other has moved. Vankadara et al. (NeurIPS 2024,
openreview aQv5AbN1wF) state that maximal-update parametrisation fails for Mamba as its width grows, and derive another one. We had
only their abstract, so it is neither implemented nor compared. `mixer: ssd` is refused. Results: benchmarks/results/training.md.
"""

import torch
from torch import Tensor

from dis_scale.models import construct
from dis_scale.models.settings import FamilySettings
from dis_scale.models.tokens import Backbone

EPS = 1e-8
"""Adam's eps at the base width: PyTorch's default."""


def fan_in_growth(model: Backbone, base_width: int) -> dict[str, float]:
    """Return each parameter's fan-in (inputs of one output) relative to the model of the base width; 1 for tables and vectors.

    Adam moves all weights of an output in step, so the learning rate is divided by this. UserError if no such base model exists.
    """
    with torch.device("meta"):
        base = construct(model.settings.at_width(base_width), model.shape, model.num_classes)
    inputs = {name: _inputs(base, name, p) for name, p in base.named_parameters()}
    return {name: _inputs(model, name, p) / inputs[name] for name, p in model.named_parameters()}


@torch.no_grad()
def scale_initial(model: Backbone, base_width: int) -> None:
    """Scale in place the initial weights whose usual deviation breaks the rules below. At the base width nothing changes.

    Weights of inputs from outside the network keep the deviation of the base width. The deviation falls with 1 / fan-in for
    sums over the width, and with the square root of 1 / fan-in for products within the width.
    """
    growth, weights = fan_in_growth(model, base_width), dict(model.named_parameters())
    for name, weight in weights.items():
        if model.rate_group(name, weight) == "output":
            weight.mul_(growth[name] ** -0.5)
    model.scale_initial(weights, growth, base_width)


def adam_eps(settings: FamilySettings, base_width: int | None) -> float:
    """Return Adam's eps, which is smaller above the base width.

    There gradients fall with the width. Those of a scan's steps fall with its square until B and C have moved.
    """
    return EPS * min(1.0, base_width / settings.width) ** 2 if base_width else EPS


def words(settings: FamilySettings, base_width: int) -> str:
    """Return a line with the factor of the learning rates, and a note if the transfer is experimental."""
    experimental = "" if settings.transfers else f", experimental for {settings.curve}"
    factor = base_width / settings.width
    return f"learning rate of sums over the width x {factor:.4g} (width {settings.width}, base_width {base_width}{experimental})"


def _inputs(model: Backbone, name: str, parameter: Tensor) -> int:
    """Return the inputs of one output of a product or a convolution; 1 for other parameters."""
    return 1 if model.rate_group(name, parameter) == "own" else parameter.shape[-1]
