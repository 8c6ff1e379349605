"""Import and export of the public weights of DiS (feizc/DiS) and DiT (facebookresearch/DiT). Sizes are read from them.

Files of SiT (willisma/SiT) have DiT's names; `SiT` samples from them by our flow. A round trip is bit-equal. Only tensors are
unpickled. Read next: dis.py, dit.py, export.py.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dis_scale.models import Backbone, DiS, DiT, check_finite, construct
from dis_scale.models.dit import position_table
from dis_scale.models.tokens import time_features
from dis_scale.process.errors import UserError
from dis_scale.recipe import Dis, Dit, LatentShape
from dis_scale.recipe.presets import PRESETS

StateDict = Mapping[str, Tensor]

DIRECTIONS = {"rightward": ("conv", "", "A_log", "D"), "leftward": ("back_conv", "_b", "A_b_log", "D_b")}
"""Forward and backward direction (see dis.Mixer): our names, then the public code's suffix and names."""
DIS = {
    "position": "pos_embed",
    "norm": "norm_f.weight",
    "label.weight": "label_emb.embedding_table.weight",
    "patches": "patch_embed.proj",
    "time.up": "time_embed.0",
    "time.down": "time_embed.2",
    "modulation": "final_layer.adaLN_modulation.1",
    "final": "final_layer.linear",
}
DIT = {
    "label.weight": "y_embedder.embedding_table.weight",
    "patches": "x_embedder.proj",
    "time.up": "t_embedder.mlp.0",
    "time.down": "t_embedder.mlp.2",
    "modulation": "final_layer.adaLN_modulation.1",
    "final": "final_layer.linear",
}
DIT_BLOCK = {
    "qkv": "attn.qkv",
    "out": "attn.proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}


class SiT(DiT):
    """A public SiT as the velocity of our flow: from data at t = 0 to noise at t = 1, with the input 1000 t.

    SiT itself has the noise at t = 0 and the data at t = 1, the input t, and the velocity towards the data (arXiv 2401.08740).
    """

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        return -super().forward(x_BCHW, 1 - t_B / 1000, y_B, drop)


class PublicWeight(NamedTuple):
    """Name and shape of a weight in the public layout."""

    name: str
    shape: tuple[int, ...]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a public `.pt` file: its EMA if it is a training state, else itself. UserError otherwise."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"cannot read weights from {path}: {' '.join(str(error).split())[:200]}") from None
    weights = data.get("ema", data) if isinstance(data, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds no state dict: expected tensors by name, or a training state with 'ema'")
    return weights


def from_official(state_dict: StateDict) -> DiS:
    """Return a DiS from the public code's state dict. UserError names missing, unknown, misshapen or non-finite weights."""
    patch_weight, norm = _sized(state_dict, "patch_embed.proj.weight", 4), _sized(state_dict, "norm_f.weight", 1)
    position = _sized(state_dict, "pos_embed", 3)
    label = state_dict.get("label_emb.embedding_table.weight")
    side = math.isqrt(max(position.shape[1] - (1 if label is None else 2), 0))
    settings = Dis(
        kind="dis",
        width=len(norm),
        depth=2 * max(_count(state_dict, "out_blocks"), 1),
        patch=patch_weight.shape[-1],
        state_size=_sized(state_dict, "mid_block.mixer.A_log", 2).shape[1],
    )
    shape = LatentShape(patch_weight.shape[1], side * settings.patch)
    with torch.device("meta"):
        model = construct(settings, shape, None if label is None else len(label) - 1)
    assert isinstance(model, DiS)
    _load(model, state_dict)
    return model


def from_official_dit(state_dict: StateDict, heads: int | None = None) -> DiT:
    """Return a DiT, or a SiT, from the published state dict.

    The weights do not determine `heads`: by default the published number.
    """
    patch_weight = _sized(state_dict, "x_embedder.proj.weight", 4)
    position, label = _sized(state_dict, "pos_embed", 3), _sized(state_dict, "y_embedder.embedding_table.weight", 2)
    width, patch = patch_weight.shape[0], patch_weight.shape[-1]
    if heads is None and (heads := published_heads(width)) is None:
        raise UserError(f"a DiT of width {width} is not a published one: give its number of heads")
    settings = Dit(kind="dit", width=width, depth=max(_count(state_dict, "blocks"), 1), heads=heads, patch=patch)
    side = math.isqrt(position.shape[1])
    kind = SiT if _is_sit(state_dict, patch_weight.shape[1]) else DiT
    with torch.device("meta"):
        model = kind(settings, LatentShape(patch_weight.shape[1], side * patch), len(label) - 1, "none")
    model.position = position_table(side, width)
    if position.shape != model.position.shape or not torch.allclose(position.float(), model.position, atol=1e-5):
        raise UserError("pos_embed is not DiT's fixed sine-cosine table: these weights belong to another model")
    _load(model, {name: weight for name, weight in state_dict.items() if name != "pos_embed"})
    return model


def published_heads(width: int) -> int | None:
    """Return the heads of the published DiT of this width; None if no such model was published."""
    return next((p["heads"] for p in PRESETS.values() if p["kind"] == "dit" and p["width"] == width), None)


def as_flow(model: SiT) -> DiT:
    """Return a DiT that computes what the SiT computes as our flow, to the rounding of float32.

    The sign moves into the last product. SiT's frequencies are 1,000 times ours: its features of 1 - t / 1000 are sums of ours of
    t, to 1e-13, and the time's first product takes them up.
    """
    t_T = torch.arange(0, 1000.5, 0.5, dtype=torch.float64)
    ours_TF, theirs_TF = (time_features(times, model.time.features) for times in (t_T, 1 - t_T / 1000))
    ours_to_theirs_FF = torch.linalg.lstsq(ours_TF, theirs_TF, driver="gelsd").solution
    weights = dict(model.state_dict())
    weights["time.up.weight"] = (weights["time.up.weight"].double() @ ours_to_theirs_FF.T).float()
    weights |= {name: -weights[name] for name in ("final.weight", "final.bias")}
    with torch.device("meta"):
        flow = DiT(model.settings, model.shape, model.num_classes, "none")
    flow.position = model.position
    flow.load_state_dict(weights, assign=True)
    return flow


def _is_sit(state_dict: StateDict, channels: int) -> bool:
    """Whether these are weights of a SiT: trained, with a variance that is still zero, since SiT's loss does not use it."""
    rows_OI = _sized(state_dict, "final_layer.linear.weight", 2)
    if len(rows_OI) % (2 * channels):
        return False
    velocity, variance = rows_OI.unflatten(0, (-1, 2, channels)).unbind(1)
    return bool(velocity.any()) and not bool(variance.any())


def to_official(model: Backbone) -> dict[str, Tensor]:
    """Return the weights in the public code's names and shapes. UserError for options that the public code lacks.

    Also for a DiT trained as a flow: readers know a SiT, whose time runs the other way, by a variance that is still zero.
    """
    weights = model.state_dict()
    out = {weight.name: weights[ours].detach().reshape(weight.shape).clone() for ours, weight in layout(model).items()}
    if not isinstance(model, DiT):
        return out
    if not isinstance(model, SiT) and _is_sit(out, model.shape.channels):
        raise UserError(
            "a DiT that was trained as a flow has no public layout: it would be taken for a SiT; export it as .safetensors"
        )
    return out | {"pos_embed": model.get_buffer("position").clone()}


def layout(model: Backbone) -> dict[str, PublicWeight]:
    """Map the name of each of the model's weights to its public name and shape."""
    if isinstance(model, DiS):
        settings = model.settings
        lacking = {
            "conditioning": "tokens",
            "skip": "concat",
            "directions": 2,
            "position": "learned",
            "halve_sum": False,
        }
        if unlike := [name for name, public in lacking.items() if getattr(settings, name) != public]:
            raise UserError(
                f"the public layout of DiS has no {unlike[0]}: {getattr(settings, unlike[0])}: export another way"
            )
        rename = _dis_name
    elif isinstance(model, DiT):
        rename = _dit_name
    else:
        raise UserError(f"{type(model).__name__} has no public layout: none was released")
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    return {ours: PublicWeight(rename(ours, model), _shape(ours, shape, model)) for ours, shape in shapes.items()}


def _shape(ours: str, shape: tuple[int, ...], model: Backbone) -> tuple[int, ...]:
    """Shape in the public layout: convolutions have one axis more."""
    if ours == "patches.weight":
        return (shape[0], model.shape.channels, model.patch, model.patch)
    return (shape[0], 1, shape[1]) if ours.endswith("conv_weight") else shape


def _dis_name(ours: str, model: Backbone) -> str:
    if not ours.startswith("blocks."):
        return _renamed(ours, DIS)
    _, index, rest = ours.split(".", 2)
    assert isinstance(model, DiS)
    offset = int(index) - model.settings.depth // 2  # before, at or after the middle block
    block = f"in_blocks.{index}" if offset < 0 else "mid_block" if offset == 0 else f"out_blocks.{offset - 1}"
    return f"{block}.{_dis_block_name(rest)}"


def _dis_block_name(rest: str) -> str:
    names = {"norm": "norm.weight", "mixer.in_proj": "mixer.in_proj.weight", "mixer.out_proj": "mixer.out_proj.weight"}
    for direction, (conv, suffix, A_log, D) in DIRECTIONS.items():
        ours = f"mixer.{direction}."
        names |= {ours + "A_log": f"mixer.{A_log}", ours + "D": f"mixer.{D}"}
        names |= {ours + "x_proj": f"mixer.x_proj{suffix}.weight", ours + "dt_proj": f"mixer.dt_proj{suffix}.weight"}
        names |= {ours + "dt_bias": f"mixer.dt_proj{suffix}.bias"}
        names |= {f"mixer.{conv}_{kind}": f"mixer.conv1d{suffix}.{kind}" for kind in ("weight", "bias")}
    return names[rest] if rest in names else _renamed(rest, {"skip": "skip_linear"})


def _dit_name(ours: str, model: Backbone) -> str:  # noqa: ARG001
    if not ours.startswith("blocks."):
        return _renamed(ours, DIT)
    _, index, rest = ours.split(".", 2)
    return f"blocks.{index}.{_renamed(rest, DIT_BLOCK)}"


def _renamed(ours: str, names: Mapping[str, str]) -> str:
    """The public name of a weight, by its own name or by its layer's name."""
    if ours in names:
        return names[ours]
    layer, _, kind = ours.rpartition(".")
    return f"{names[layer]}.{kind}"


def _load(model: Backbone, state_dict: StateDict) -> None:
    public = layout(model)
    expected = {weight.name: weight.shape for weight in public.values()}
    faults = [f"{name} is missing" for name in expected if name not in state_dict]
    faults += [f"{name} is not known" for name in state_dict if name not in expected]
    for name, shape in expected.items():
        if name in state_dict and tuple(state_dict[name].shape) != shape:
            faults.append(f"{name} has shape {tuple(state_dict[name].shape)}, expected {shape}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"not a {type(model).__name__} in the public layout: {'; '.join(faults[:3])}{more}")
    shapes = {ours: tuple(weight.shape) for ours, weight in model.state_dict().items()}
    weights = {ours: state_dict[weight.name].reshape(shapes[ours]).clone() for ours, weight in public.items()}
    model.load_state_dict(weights, assign=True)
    check_finite(model)


def _sized(state_dict: StateDict, name: str, axes: int) -> Tensor:
    """Return the weight `name`, from whose shape a size is read. UserError if it is missing or has other axes."""
    if name not in state_dict:
        raise UserError(f"not a state dict in the public layout: {name} is missing")
    if state_dict[name].ndim != axes:
        raise UserError(f"{name} has shape {tuple(state_dict[name].shape)}, expected {axes} axes")
    return state_dict[name]


def _count(state_dict: StateDict, prefix: str) -> int:
    """Number of blocks with this prefix."""
    numbers = [int(name.split(".")[1]) for name in state_dict if name.startswith(prefix + ".")]
    return max(numbers, default=-1) + 1
