"""Conversion of public weight files to models and back, by the layout of the model's family.

A round trip is bit-equal if the public parts of each of our weights share one dtype, and this dtype is float32 or better.

Read next: dis/public.py, dit/public.py.
"""

import torch
from pydantic import ValidationError
from torch import Tensor

from dis_scale.models import check_finite, families
from dis_scale.models.family import PublicLayout
from dis_scale.models.public_names import PublicWeight, StateDict
from dis_scale.models.tokens import Backbone
from dis_scale.process.errors import UserError


def layout_of(model: Backbone) -> PublicLayout:
    """Return the public layout of a model's family. UserError if none was released."""
    if (public := families.find(model.settings.kind).public) is None:
        raise UserError(f"{type(model).__name__} has no public layout: none was released")
    return public()


def layout(model: Backbone) -> dict[str, list[PublicWeight]]:
    """Map the name of each of the model's weights to the public weights that it holds."""
    return {ours: _public(ours, model) for ours in model.state_dict()}


def to_official(model: Backbone) -> dict[str, Tensor]:
    """Return the weights in the public code's names and shapes. UserError for options that the public code lacks."""
    weights = model.state_dict()
    views = {each.name: each.view(weights[ours]) for ours, parts in layout(model).items() for each in parts}
    out = {name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()}
    return {**out, **layout_of(model).added(model, out)}


def read_public(state_dict: StateDict, heads: int | None = None) -> Backbone:
    """Return the model of a public state dict, in float32 or better. Its names select the family. UserError names a mismatch."""
    layouts = [family.public() for family in families.known().values() if family.public]
    public = next((each for each in layouts if each.recognises(state_dict)), layouts[0])
    try:
        model = public.model(state_dict, heads)
    except ValidationError as error:
        why = error.errors()[0]
        raise UserError(f"no model of these sizes: {'.'.join(map(str, why['loc'])) or 'settings'}: {why['msg']}") from error
    _load(model, state_dict)
    return model


def _public(ours: str, model: Backbone) -> list[PublicWeight]:
    """Return the public weights in `ours`. In all layouts the patches' product is a strided convolution."""
    parts = layout_of(model).weights(ours, model)
    if ours != "patches.weight":
        return parts
    kernel = model.shape.channels, model.patch, model.patch
    return [each._replace(view=lambda weight: weight.unflatten(1, kernel)) for each in parts]


def _load(model: Backbone, state_dict: StateDict) -> None:
    """Load public weights. UserError names missing, unknown, misshapen or non-finite ones."""
    empty, public = model.state_dict(), layout(model)
    expected = {each.name: tuple(each.view(empty[ours]).shape) for ours, parts in public.items() for each in parts}
    beside = layout_of(model).added(model, state_dict)
    faults = [f"{name} is missing" for name in expected if name not in state_dict]
    faults += [f"{name} is not known" for name in state_dict if name not in expected and name not in beside]
    for name, shape in expected.items():
        if name in state_dict and tuple(state_dict[name].shape) != shape:
            faults.append(f"{name} has shape {tuple(state_dict[name].shape)}, expected {shape}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"not a {type(model).__name__} in the public layout: {'; '.join(faults[:3])}{more}")
    weights = {}
    for ours, parts in public.items():
        # Not in half precision, which would change a decay. The caller of the sampler may choose fewer bits for computing.
        dtype = torch.float64 if torch.float64 in {state_dict[each.name].dtype for each in parts} else torch.float32
        weights[ours] = torch.empty(empty[ours].shape, dtype=dtype)
        for name, view in parts:
            view(weights[ours]).copy_(state_dict[name])
    model.load_state_dict(weights, assign=True)
    check_finite(model)
