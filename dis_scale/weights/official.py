"""Public files of weights: read without unpickling anything but tensors. Their layouts are the families' own.

Read next: models/public.py, export.py.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from dis_scale.models.public import layout, read_public, to_official
from dis_scale.process.errors import UserError

__all__ = ["layout", "read_public", "read_weights", "to_official"]


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
