"""Public files of weights to models and back, by the layout of the model's family. A round trip is bit-equal.

Read next: dis/public.py, dit/public.py.
"""

from typing import NamedTuple

from torch import Tensor

from dis_scale.models import check_finite, families
from dis_scale.models.family import PublicLayout
from dis_scale.models.public_names import StateDict
from dis_scale.models.tokens import Backbone
from dis_scale.process.errors import UserError


class PublicWeight(NamedTuple):
    """Name and shape of a weight in the public layout."""

    name: str
    shape: tuple[int, ...]


def layout_of(model: Backbone) -> PublicLayout:
    """Return the public layout of a model's family. UserError if none was released."""
    if (public := families.find(model.settings.kind).public) is None:
        raise UserError(f"{type(model).__name__} has no public layout: none was released")
    return public()


def layout(model: Backbone) -> dict[str, PublicWeight]:
    """Map the name of each of the model's weights to its public name and shape."""
    rename = layout_of(model).rename
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    return {ours: PublicWeight(rename(ours, model), _shape(ours, shape, model)) for ours, shape in shapes.items()}


def to_official(model: Backbone) -> dict[str, Tensor]:
    """Return the weights in the public code's names and shapes. UserError for options that the public code lacks."""
    weights = model.state_dict()
    out = {weight.name: weights[ours].detach().reshape(weight.shape).clone() for ours, weight in layout(model).items()}
    return {**out, **layout_of(model).added(model, out)}


def read_public(state_dict: StateDict, heads: int | None = None) -> Backbone:
    """Return the model of a public state dict, which its names tell. UserError names what does not fit."""
    layouts = [family.public() for family in families.known().values() if family.public]
    public = next((each for each in layouts if each.recognises(state_dict)), layouts[0])
    model = public.model(state_dict, heads)
    _load(model, state_dict)
    return model


def _shape(ours: str, shape: tuple[int, ...], model: Backbone) -> tuple[int, ...]:
    """Shape in the public layout: convolutions have one axis more."""
    if ours == "patches.weight":
        return (shape[0], model.shape.channels, model.patch, model.patch)
    return (shape[0], 1, shape[1]) if ours.endswith("conv_weight") else shape


def _load(model: Backbone, state_dict: StateDict) -> None:
    """Load public weights. UserError names missing, unknown, misshapen or non-finite ones."""
    public = layout(model)
    expected = {weight.name: weight.shape for weight in public.values()}
    beside = layout_of(model).added(model, state_dict)
    faults = [f"{name} is missing" for name in expected if name not in state_dict]
    faults += [f"{name} is not known" for name in state_dict if name not in expected and name not in beside]
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
