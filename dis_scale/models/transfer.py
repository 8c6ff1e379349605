"""Learning-rate transfer over width: maximal-update parametrisation for Adam (Yang et al., arXiv 2203.03466, table 3).

A rate that is best at `train.base_width` stays near the best at other widths. Only rates, decays, Adam's eps and initial weights
change: the network computes what it computes without it, so its weights need no further setting. Depth, batch and length of
training are not covered.

DiT: as in Zheng et al. (arXiv 2505.15270): fixed size of a head, modulations as products within the width. Theirs has no modern
parts, with which it is experimental.

DiS (S6) and DiffuSSM (S4D) are experimental. Each channel of a scan is a function of that channel's input, step and rates. In S6 it
is also a function of B and C: 2 N averages over the width, whose number does not grow with the width. So B and C start and learn as
outputs, the step's two products are within the width, and rates, D and biases are vectors. We know of no theorem for this: in the
limit B and C start at zero, where neither has a gradient before the other has moved. Vankadara et al. (NeurIPS 2024, openreview
aQv5AbN1wF) state that maximal-update parametrisation fails for Mamba as its width grows, and derive another. We had only their
abstract, so theirs is neither built nor compared. `mixer: ssd` is refused. benchmarks/results/training.md has the outcome.
"""

import torch
from torch import Tensor

from dis_scale.models import construct
from dis_scale.models.settings import FamilySettings
from dis_scale.models.tokens import Backbone

EPS = 1e-8
"""PyTorch's, at the base width."""


def fan_in_growth(model: Backbone, base_width: int) -> dict[str, float]:
    """Return, for each parameter, the inputs of one output relative to the model of the base width; 1 for tables and vectors.

    Adam moves all weights of an output in step, so its rate is divided by this. UserError if no such base model exists.
    """
    with torch.device("meta"):
        base = construct(model.settings.at_width(base_width), model.shape, model.num_classes)
    inputs = {name: _inputs(base, name, p) for name, p in base.named_parameters()}
    return {name: _inputs(model, name, p) / inputs[name] for name, p in model.named_parameters()}


@torch.no_grad()
def scale_initial(model: Backbone, base_width: int) -> None:
    """Scale initial weights in place where their usual deviation does not follow the rules; none changes at the base width.

    Weights from outside start as at the base width, sums over the width with 1 / fan-in, products within it with its root.
    """
    growth, weights = fan_in_growth(model, base_width), dict(model.named_parameters())
    for name, weight in weights.items():
        if model.rate_group(name, weight) == "output":
            weight.mul_(growth[name] ** -0.5)
    model.scale_initial(weights, growth, base_width)


def adam_eps(settings: FamilySettings, base_width: int | None) -> float:
    """Return what Adam adds to a gradient's size: less above the base width.

    There gradients fall with the width, and those of a scan's steps, until B and C have moved, with its square.
    """
    return EPS * min(1.0, base_width / settings.width) ** 2 if base_width else EPS


def words(settings: FamilySettings, base_width: int) -> str:
    """Return the factor of the rates in a line, and whether it is experimental."""
    experimental = "" if settings.transfers else f", experimental for {settings.curve}"
    factor = base_width / settings.width
    return f"learning rate of sums over the width x {factor:.4g} (width {settings.width}, base_width {base_width}{experimental})"


def _inputs(model: Backbone, name: str, parameter: Tensor) -> int:
    """Inputs of one output of a product or a convolution; 1 for other parameters."""
    return 1 if model.rate_group(name, parameter) == "own" else parameter.shape[-1]
