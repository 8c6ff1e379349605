"""Common parts of the families' public layouts: names of weights, their positions in our weights, sizes read from shapes."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from dis_scale.process.errors import UserError

StateDict = Mapping[str, Tensor]


def whole(ours: Tensor) -> Tensor:
    """Return our weight unchanged: the view of a public weight that is all of it."""
    return ours


class PublicWeight(NamedTuple):
    """Public name of a weight, and the view of our weight that equals it. The views of one of our weights cover all of it."""

    name: str
    view: Callable[[Tensor], Tensor] = whole


def renamed(ours: str, names: Mapping[str, str]) -> str:
    """Return the public name of a weight, by its own name or by its layer's name."""
    if ours in names:
        return names[ours]
    layer, _, kind = ours.rpartition(".")
    return f"{names[layer]}.{kind}"


def sized(state_dict: StateDict, name: str, axes: int) -> Tensor:
    """Return the weight `name`, from whose shape a size is read. UserError if it is missing or has another number of axes."""
    if name not in state_dict:
        raise UserError(f"not a state dict in the public layout: {name} is missing")
    if state_dict[name].ndim != axes:
        raise UserError(f"{name} has shape {tuple(state_dict[name].shape)}, expected {axes} axes")
    return state_dict[name]


def count(state_dict: StateDict, prefix: str) -> int:
    """Return the number of blocks with this prefix."""
    numbers = [int(name.split(".")[1]) for name in state_dict if name.startswith(prefix + ".")]
    return max(numbers, default=-1) + 1
