"""DiS: bidirectional Mamba blocks with long skips (Fei et al., arXiv 2402.05608). Read next: network.py."""

from typing import TYPE_CHECKING, Any

from dis_scale.models.dis.settings import Dis
from dis_scale.models.family import Family, PublicLayout
from dis_scale.process.settings import LatentShape

if TYPE_CHECKING:
    from dis_scale.models.tokens import Backbone

SIZES: dict[str, dict[str, Any]] = {
    "DiS-S": {"width": 384, "depth": 24},
    "DiS-S368": {"width": 368, "depth": 24},
    "DiS-B": {"width": 768, "depth": 24},
    "DiS-M": {"width": 768, "depth": 48},
    "DiS-L": {"width": 1024, "depth": 48},
    "DiS-H": {"width": 1536, "depth": 48},
}
"""Published sizes. DiS-S has the width that the paper states, DiS-S368 that of the paper's results, Gflops column and code."""
SSD_DEPTHS = {"S": 24, "B": 24, "M": 50, "L": 50, "H": 50}
"""Blocks that give the mixer `ssd` DiS's parameters within 0.6 %; S has 2.6 % and B 3.7 % fewer, where one block is 4 %."""
SIZES |= {
    f"DiS2-{size}": SIZES[f"DiS-{size}"] | {"depth": depth, "mixer": "ssd", "combine": "hydra", "state_size": 64}
    for size, depth in SSD_DEPTHS.items()
}


def _network(*arguments: Any) -> "Backbone":
    from dis_scale.models.dis.network import DiS

    return DiS(*arguments)


def _public() -> PublicLayout:
    from dis_scale.models.dis import public

    return public


def _thop_gflops(settings: Dis, shape: LatentShape, num_classes: int | None) -> float | None:
    """Return thop x 2 on the public code. thop counts only calls of modules (no mixer), and 2 per element for a layer norm."""
    if settings.unpublished:
        return None
    D, P, T = settings.width, shape.channels * settings.patch**2, (shape.size // settings.patch) ** 2
    L = T + settings.extra_tokens(num_classes)
    macs = T * P * D + 8 * D * D + (settings.depth // 2) * L * 2 * D * D + L * D * 2 * P + 2 * L * D
    return 2 * (macs + (0 if num_classes is None else 2 * D * D)) / 1e9


FAMILY = Family(
    Dis,
    _network,
    presets={f"{name}/{patch}": sizes | {"patch": patch} for name, sizes in SIZES.items() for patch in (2, 4, 8)},
    ladder=("DiS-S/2", "DiS-B/2", "DiS-M/2", "DiS-L/2", "DiS-H/2"),
    small={
        "dis-xs": {"width": 64, "depth": 4, "drop_path": 0.0},
        "dis-s": {"width": 128, "depth": 4, "drop_path": 0.0},
        "dis-m": {"width": 192, "depth": 8, "drop_path": 0.0},
    },
    marker="o",
    line="-",
    scans=frozenset({"auto", "reference", "native", "triton", "mamba", "chunked"}),
    thop_gflops=_thop_gflops,
    public=_public,
)
