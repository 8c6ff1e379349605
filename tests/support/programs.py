"""Programs of torch.export that select pixels, as extractors of features."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from dis_scale.data.sources import Source
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.programs import hash_of
from tests.conftest import TINY


class Pixels(nn.Module):
    """Returns some pixels of each image (rows from `first`, every `step`-th), and a second output, which is unused."""

    def __init__(self, first: int = 0, step: int = 16) -> None:
        super().__init__()
        self.first, self.step = first, step

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.float()[:, 0, self.first :: self.step, ::16].flatten(1), x


def export(path: Path, net: nn.Module | None = None, size: int = 32) -> Path:
    """Export a network of uint8 images (B, 3, size, size), any number of them."""
    return save_program(path, net or Pixels(), torch.zeros(2, 3, size, size, dtype=torch.uint8))


def save_program(path: Path, net: nn.Module, example: torch.Tensor) -> Path:
    batches = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(net.eval(), (example,), dynamic_shapes=batches), path)
    return path


def with_exported(**paths: Path) -> Recipe:
    """Return the digits with these programs as extractors, the main one first."""
    main, *others = (
        f"{{kind: exported, name: {name}, path: '{path}', sha256: '{hash_of([str(path)], name)}'}}" for name, path in paths.items()
    )
    return reading.load(TINY, [f"evaluate.extractor={main}", f"evaluate.also=[{', '.join(others)}]"])


def pixels(source: Source) -> np.ndarray:
    return np.stack([source.pixels(i, 32) for i in range(len(source))])
