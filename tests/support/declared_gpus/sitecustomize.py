"""Workers that shall compute on "cuda" compute on the CPU: for clusters whose GPUs are declared, not present.

Python imports this file at each start of a process that has its folder on PYTHONPATH.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def _on_the_cpu(devices: Any) -> None:
    import torch

    devices.torch_device = lambda _: torch.device("cpu")


def _with_a_name(cuda: Any) -> None:
    cuda.get_device_name = lambda *_: "declared, not present"


CHANGED: dict[str, Callable[[Any], None]] = {"dis_scale.training.devices": _on_the_cpu, "torch.cuda": _with_a_name}


class Finder(MetaPathFinder):
    """Changes the modules after they were imported as usual."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in CHANGED or (spec := PathFinder.find_spec(fullname, path)) is None:
            return None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def run_and_change(module: ModuleType) -> None:
            run(module)
            CHANGED[fullname](module)

        spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
