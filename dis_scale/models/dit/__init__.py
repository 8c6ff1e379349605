"""DiT, the baseline: attention with adaLN-Zero (Peebles and Xie, arXiv 2212.09748). Read next: network.py, public.py."""

from typing import TYPE_CHECKING, Any

from dis_scale.models.dit.settings import MODERN, SIZES, Dit
from dis_scale.models.family import Family, PublicLayout

if TYPE_CHECKING:
    from dis_scale.models.tokens import Backbone


def _network(*arguments: Any) -> "Backbone":
    from dis_scale.models.dit.network import DiT

    return DiT(*arguments)


def _public() -> PublicLayout:
    from dis_scale.models.dit import public

    return public


FAMILY = Family(
    Dit,
    _network,
    presets={
        f"{name.replace('DiT', kind)}/{patch}": sizes | parts | {"patch": patch}
        for kind, parts in {"DiT": {}, "DiT+": {"modern": MODERN}}.items()
        for name, sizes in SIZES.items()
        for patch in (2, 4, 8)
    },
    marker="s",
    line="--",
    public=_public,
)
