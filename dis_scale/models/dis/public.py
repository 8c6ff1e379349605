"""The layout of DiS's public weights (feizc/DiS). Read next: ../public.py."""

import math

import torch
from torch import Tensor

from dis_scale.models.dis.network import DiS
from dis_scale.models.dis.settings import Dis
from dis_scale.models.public_names import StateDict, count, renamed, sized
from dis_scale.models.tokens import Backbone
from dis_scale.process.errors import UserError
from dis_scale.process.settings import LatentShape

DIRECTIONS = {"rightward": ("conv", "", "A_log", "D"), "leftward": ("back_conv", "_b", "A_b_log", "D_b")}
"""Forward and backward direction (see network.Mixer): our names, then the public code's suffix and names."""
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


def recognises(state_dict: StateDict) -> bool:
    """Whether a public file is of this family."""
    return "patch_embed.proj.weight" in state_dict


def model(state_dict: StateDict, heads: int | None = None) -> DiS:
    """Return a DiS of the sizes of the public code's state dict, without weights. UserError names what is missing or misshapen."""
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


def rename(ours: str, model: Backbone) -> str:
    """Return the public name of a weight. UserError for options that the public code lacks."""
    assert isinstance(model, DiS)
    if unlike := model.settings.unpublished:
        raise UserError(
            f"the public layout of DiS has no {unlike}: {getattr(model.settings, unlike)}: export another way"
        )
    if not ours.startswith("blocks."):
        return renamed(ours, NAMES)
    _, index, rest = ours.split(".", 2)
    offset = int(index) - model.settings.depth // 2  # before, at or after the middle block
    block = f"in_blocks.{index}" if offset < 0 else "mid_block" if offset == 0 else f"out_blocks.{offset - 1}"
    return f"{block}.{_block_name(rest)}"


def added(model: Backbone, weights: StateDict) -> dict[str, Tensor]:  # noqa: ARG001
    """Nothing: each public weight is one of ours."""
    return {}


def _block_name(rest: str) -> str:
    names = {"norm": "norm.weight", "mixer.in_proj": "mixer.in_proj.weight", "mixer.out_proj": "mixer.out_proj.weight"}
    for direction, (conv, suffix, A_log, D) in DIRECTIONS.items():
        ours = f"mixer.{direction}."
        names |= {ours + "A_log": f"mixer.{A_log}", ours + "D": f"mixer.{D}"}
        names |= {ours + "x_proj": f"mixer.x_proj{suffix}.weight", ours + "dt_proj": f"mixer.dt_proj{suffix}.weight"}
        names |= {ours + "dt_bias": f"mixer.dt_proj{suffix}.bias"}
        names |= {f"mixer.{conv}_{kind}": f"mixer.conv1d{suffix}.{kind}" for kind in ("weight", "bias")}
    return names[rest] if rest in names else renamed(rest, {"skip": "skip_linear"})
