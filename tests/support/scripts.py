"""TorchScript files that select pixels, as extractors of features."""

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


def script(path: Path, net: nn.Module | None = None) -> Path:
    torch.jit.script(net or Pixels()).save(path)
    return path


def with_scripts(**paths: Path) -> Recipe:
    """Return the digits with these TorchScript files as extractors, the main one first."""
    main, *others = (
        f"{{kind: torchscript, name: {name}, path: '{path}', sha256: '{hash_of(str(path), name)}'}}"
        for name, path in paths.items()
    )
    return reading.load(TINY, [f"evaluate.extractor={main}", f"evaluate.also=[{', '.join(others)}]"])


def pixels(source: Source) -> np.ndarray:
    return np.stack([source.pixels(i, 32) for i in range(len(source))])
