"""The layout of DiS's public weights (feizc/DiS). Read next: ../public.py."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dis_scale.models.dis.network import DiS
from dis_scale.models.dis.settings import Dis
from dis_scale.models.public_names import PublicWeight, StateDict, count, renamed, sized, whole
from dis_scale.models.tokens import Backbone
from dis_scale.process.errors import UserError
from dis_scale.process.settings import LatentShape

NAMES = {
    "position": "pos_embed",
    "norm": "norm_f.weight",
    "label.weight": "label_emb.embedding_table.weight",
    "patches": "patch_embed.proj",
    "time.up": "time_embed.0",
    "time.down": "time_embed.2",
    "modulation": "final_layer.adaLN_modulation.1",
    "final": "final_layer.linear",
}
BLOCK = {
    "norm": "norm.weight",
    "mixer.in_proj": "mixer.in_proj.weight",
    "mixer.out_proj": "mixer.out_proj.weight",
    "skip": "skip_linear",
}
DIRECTIONS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "mixer.conv": {"conv1d{}.weight": lambda rows: rows[:-1].T.unsqueeze(1), "conv1d{}.bias": lambda rows: rows[-1]},
    "mixer.x_proj": {"x_proj{}.weight": whole},
    "mixer.dt_proj": {"dt_proj{}.weight": whole},
    "mixer.dynamics": {"A{}_log": lambda rows: rows[:-2].T, "D{}": lambda rows: rows[-2], "dt_proj{}.bias": lambda rows: rows[-1]},
}
"""Public weights of each direction, as views of the direction's part of our weight."""


def recognises(state_dict: StateDict) -> bool:
    """Return whether a public file is of this family."""
    return "patch_embed.proj.weight" in state_dict


def model(state_dict: StateDict, heads: int | None = None) -> DiS:
    """Return a DiS with the sizes of a public state dict, without weights. UserError names a missing or misshapen weight."""
    del heads
    patch_weight, norm = sized(state_dict, "patch_embed.proj.weight", 4), sized(state_dict, "norm_f.weight", 1)
    position = sized(state_dict, "pos_embed", 3)
    label = state_dict.get("label_emb.embedding_table.weight")
    side = math.isqrt(max(position.shape[1] - (1 if label is None else 2), 0))
    settings = Dis(
        kind="dis",
        width=len(norm),
        depth=2 * max(count(state_dict, "out_blocks"), 1),
        patch=patch_weight.shape[-1],
        state_size=sized(state_dict, "mid_block.mixer.A_log", 2).shape[1],
    )
    shape = LatentShape(patch_weight.shape[1], side * settings.patch)
    with torch.device("meta"):
        return DiS(settings, shape, None if label is None else len(label) - 1)


def weights(ours: str, model: Backbone) -> list[PublicWeight]:
    """Return the public weights in our weight `ours`. UserError for options that the public code lacks."""
    assert isinstance(model, DiS)
    if unlike := model.settings.unpublished:
        raise UserError(f"the public layout of DiS has no {unlike}: {getattr(model.settings, unlike)}: export another way")
    if not ours.startswith("blocks."):
        return [PublicWeight(renamed(ours, NAMES))]
    _, index, rest = ours.split(".", 2)
    offset = int(index) - model.settings.depth // 2  # before, at or after the middle block
    block = f"in_blocks.{index}" if offset < 0 else "mid_block" if offset == 0 else f"out_blocks.{offset - 1}"
    return [PublicWeight(f"{block}.{name}", view) for name, view in _of_block(rest)]


def added(model: Backbone, public: StateDict) -> dict[str, Tensor]:  # noqa: ARG001
    """Return nothing: each public weight belongs to one of our weights."""
    return {}


def _of_block(rest: str) -> list[PublicWeight]:
    """Return the public weights in a block's weight. Ours holds both directions (see s6.Mixer), a public weight holds one."""
    if rest not in DIRECTIONS:
        return [PublicWeight(renamed(rest, BLOCK))]
    return [
        PublicWeight(f"mixer.{name.format(suffix)}", functools.partial(_of_direction, way, view))
        for way, suffix in enumerate(("", "_b"))
        for name, view in DIRECTIONS[rest].items()
    ]


def _of_direction(way: int, view: Callable[[Tensor], Tensor], ours: Tensor) -> Tensor:
    return view(ours[way])
