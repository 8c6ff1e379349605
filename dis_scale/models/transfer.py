"""Learning-rate transfer over width: maximal-update parametrisation for Adam (Yang et al., arXiv 2203.03466, table 3).

A rate that is best at `train.base_width` stays near the best at other widths. Only rates, decays and initial weights change:
the network computes what it computes without it, so its weights need no further setting. Depth, batch and length of training
are not covered.

DiT: as in Zheng et al. (arXiv 2505.15270): fixed size of a head, modulations as products within the width. DiS and DiffuSSM:
experimental. Mamba's scan is no tensor program (Vankadara et al., arXiv 2411.19043), so no theorem covers its dynamics. They
keep their rate here, as vectors do; benchmarks/results/training.md has the outcome.
"""

import torch
from torch import Tensor

from dis_scale.models import Backbone, construct, rate_group
from dis_scale.recipe import DiffuSsm, Dis, Dit

TABLES = ("label.", "position")
"""Beginnings of the names of weights that are looked up, not multiplied."""


def fan_in_growth(model: Backbone, base_width: int) -> dict[str, float]:
    """Return, for each parameter, the inputs of one output relative to the model of the base width; 1 for tables and vectors.

    Adam moves all weights of an output in step, so its rate is divided by this. UserError if no such base model exists.
    """
    with torch.device("meta"):
        base = construct(_base(model.settings, base_width), model.shape, model.num_classes)
    inputs = {name: _inputs(name, p) for name, p in base.named_parameters()}
    return {name: _inputs(name, p) / inputs[name] for name, p in model.named_parameters()}


@torch.no_grad()
def scale_initial(model: Backbone, base_width: int) -> None:
    """Scale initial weights in place where their usual deviation does not follow the rules; none changes at the base width.

    Weights from outside start as at the base width, sums over the width with 1 / fan-in, products within it with its root.
    """
    growth, settings = fan_in_growth(model, base_width), model.settings
    weights = dict(model.named_parameters())
    weights["final.weight"].mul_(growth["final.weight"] ** -0.5)
    match settings:
        case Dit():  # Xavier's deviation of the patches falls with the width; that of the time's second product does not
            inputs = weights["patches.weight"].shape[1]
            weights["patches.weight"].mul_(((inputs + settings.width) / (inputs + base_width)) ** 0.5)
            weights["time.down.weight"].mul_(growth["time.down.weight"] ** -0.5)
        case Dis():  # B and C have as many values at each width
            for name, weight in weights.items():
                if name.endswith("x_proj"):
                    weight[-2 * settings.state_size :].mul_(growth[name] ** -0.5)


def words(settings: Dis | DiffuSsm | Dit, base_width: int) -> str:
    """Return the factor of the rates in a line, and whether it is experimental."""
    experimental = "" if settings.kind == "dit" else f", experimental for {settings.kind}"
    factor = base_width / settings.width
    return f"learning rate of sums over the width x {factor:.4g} (width {settings.width}, base_width {base_width}{experimental})"


def _base(settings: Dis | DiffuSsm | Dit, width: int) -> Dis | DiffuSsm | Dit:
    """The settings at the base width, with heads of the same size."""
    heads = {"heads": settings.heads * width // settings.width} if isinstance(settings, Dit) else {}
    return settings.model_copy(update={"width": width} | heads)


def _inputs(name: str, parameter: Tensor) -> int:
    """Inputs of one output of a product or a convolution; 1 for other parameters."""
    if name.startswith(TABLES) or rate_group(name, parameter) in ("dynamics", "vectors"):
        return 1
    return parameter.shape[1]
