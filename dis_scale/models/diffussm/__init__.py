"""DiffuSSM as specified here: gated bidirectional S4D with hourglass layers (arXiv 2311.18257). Read next: network.py, s4d.py."""

from typing import TYPE_CHECKING, Any

from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.family import Family

if TYPE_CHECKING:
    from dis_scale.models.tokens import Backbone

SIZES = {
    "DiffuSSM-S": {"width": 384, "depth": 12},
    "DiffuSSM-L": {"width": 768, "depth": 24},
    "DiffuSSM-XL": {"width": 1152, "depth": 29},
}


def _network(*arguments: Any) -> "Backbone":
    from dis_scale.models.diffussm.network import DiffuSSM

    return DiffuSSM(*arguments)


FAMILY = Family(DiffuSsm, _network, presets=SIZES, marker="^", line="-.")
