"""The layout of the public weights of DiT (facebookresearch/DiT) and SiT (willisma/SiT), which have the same names.

`SiT` samples from SiT's weights by our flow. Read next: ../public.py.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dis_scale.models.dit.network import DiT
from dis_scale.models.dit.settings import Dit, published_heads
from dis_scale.models.public_names import PublicWeight, StateDict, count, renamed, sized
from dis_scale.models.tokens import Backbone, position_table, time_features
from dis_scale.process.errors import UserError
from dis_scale.process.settings import LatentShape

NAMES = {
    "label.weight": "y_embedder.embedding_table.weight",
    "patches": "x_embedder.proj",
    "time.up": "t_embedder.mlp.0",
    "time.down": "t_embedder.mlp.2",
    "modulation": "final_layer.adaLN_modulation.1",
    "final": "final_layer.linear",
}
BLOCK = {"qkv": "attn.qkv", "out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2", "modulation": "adaLN_modulation.1"}


class SiT(DiT):
    """A public SiT as the velocity of our flow: from data at t = 0 to noise at t = 1, with the input 1000 t.

    SiT itself has the noise at t = 0 and the data at t = 1, the input t, and the velocity towards the data (arXiv 2401.08740).
    """

    process: ClassVar[Literal["gaussian", "flow"]] = "flow"

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        return -super().forward(x_BCHW, 1 - t_B / 1000, y_B, drop)

    def as_ours(self) -> DiT:
        return as_flow(self)


def recognises(state_dict: StateDict) -> bool:
    """Whether a public file is of this family."""
    return "x_embedder.proj.weight" in state_dict


def model(state_dict: StateDict, heads: int | None = None) -> DiT:
    """Return a DiT, or a SiT, with the sizes of a public state dict, without weights.

    The weights do not determine `heads`; the default is the published number for the width.
    """
    patch_weight = sized(state_dict, "x_embedder.proj.weight", 4)
    position, label = sized(state_dict, "pos_embed", 3), sized(state_dict, "y_embedder.embedding_table.weight", 2)
    width, patch = patch_weight.shape[0], patch_weight.shape[-1]
    if heads is None and (heads := published_heads(width)) is None:
        raise UserError(
            f"a DiT of width {width} is not a published one: give its heads; to guide another model, export it with them first"
        )
    settings = Dit(kind="dit", width=width, depth=max(count(state_dict, "blocks"), 1), heads=heads, patch=patch)
    side = math.isqrt(position.shape[1])
    kind = SiT if _is_sit(state_dict, patch_weight.shape[1]) else DiT
    with torch.device("meta"):
        empty = kind(settings, LatentShape(patch_weight.shape[1], side * patch), len(label) - 1)
    empty.position = position_table(side, width)
    rounding = max(1e-5, torch.finfo(position.dtype).eps)
    if position.shape != empty.position.shape or not torch.allclose(position.float(), empty.position, atol=rounding):
        raise UserError("pos_embed is not DiT's fixed sine-cosine table: these weights belong to another model")
    return empty


def weights(ours: str, model: Backbone) -> list[PublicWeight]:
    """Return the public weight that equals our weight `ours`. UserError for a model with parts that the public code lacks."""
    assert isinstance(model, DiT)
    if model.settings.modern:
        raise UserError(f"the public layout of DiT has no modern: [{', '.join(model.settings.modern)}]: export another way")
    if not ours.startswith("blocks."):
        return [PublicWeight(renamed(ours, NAMES))]
    _, index, rest = ours.split(".", 2)
    return [PublicWeight(f"blocks.{index}.{renamed(rest, BLOCK)}")]


def added(model: Backbone, public: StateDict) -> dict[str, Tensor]:
    """Return the table of positions. UserError for a DiT trained as a flow.

    Readers recognise a SiT by a variance that is still zero, and a SiT's time runs the other way.
    """
    if not isinstance(model, SiT) and _is_sit(public, model.shape.channels):
        raise UserError(
            "a DiT that was trained as a flow has no public layout: it would be taken for a SiT; export it as .safetensors"
        )
    return {"pos_embed": model.get_buffer("position").clone()}


def as_flow(model: SiT) -> DiT:
    """Return a DiT that computes what the SiT computes as our flow, to the rounding of float32.

    The last product absorbs the sign. SiT's frequencies are 1,000 times ours: its features of 1 - t / 1000 are linear combinations
    of our features of t, to 1e-13, and the time's first product absorbs them.
    """
    t_T = torch.arange(0, 1000.5, 0.5, dtype=torch.float64)
    ours_TF, theirs_TF = (time_features(times, model.time.features) for times in (t_T, 1 - t_T / 1000))
    ours_to_theirs_FF = torch.linalg.lstsq(ours_TF, theirs_TF, driver="gelsd").solution
    weights = dict(model.state_dict())
    weights["time.up.weight"] = (weights["time.up.weight"].double() @ ours_to_theirs_FF.T).float()
    weights |= {name: -weights[name] for name in ("final.weight", "final.bias")}
    with torch.device("meta"):
        flow = DiT(model.settings, model.shape, model.num_classes)
    flow.position = model.position
    flow.load_state_dict(weights, assign=True)
    return flow


def _is_sit(state_dict: StateDict, channels: int) -> bool:
    """Return whether the weights are a trained SiT's: the variance is still zero, since SiT's loss does not use it."""
    rows_OI = sized(state_dict, "final_layer.linear.weight", 2)
    if len(rows_OI) % (2 * channels):
        return False
    velocity, variance = rows_OI.unflatten(0, (-1, 2, channels)).unbind(1)
    return bool(velocity.any()) and not bool(variance.any())
