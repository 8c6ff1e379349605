"""DiffuSSM as specified here: gated bidirectional S4D with hourglass layers (arXiv 2311.18257). Read next: network.py, s4d.py."""

from typing import TYPE_CHECKING, Any

from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.family import Family, PaperNumbers
from dis_scale.process.settings import LatentShape

if TYPE_CHECKING:
    from dis_scale.models.tokens import Backbone

SIZES = {
    "DiffuSSM-S": {"width": 384, "depth": 12},
    "DiffuSSM-L": {"width": 768, "depth": 24},
    "DiffuSSM-XL": {"width": 1152, "depth": 29},
}
XL_GMACS = {32: 280.3, 64: 1066.2}
"""Published values of XL by latent size (as quoted by others): quotients of rounded totals. No count equals both."""


def _network(*arguments: Any) -> "Backbone":
    from dis_scale.models.diffussm.network import DiffuSSM

    return DiffuSSM(*arguments)


def _published(settings: DiffuSsm, shape: LatentShape, num_classes: int | None) -> PaperNumbers:  # noqa: ARG001
    xl = (settings.width, settings.depth, settings.hourglass, settings.patch) == (1152, 29, 2, 1)
    return PaperNumbers(gmacs=XL_GMACS.get(shape.size) if xl else None)


FAMILY = Family(
    DiffuSsm,
    _network,
    presets=SIZES,
    marker="^",
    line="-.",
    published=_published,
)
