"""The driver of a sweep on a cluster without Ray."""

import io
from pathlib import Path

from rich.console import Console

from dis_scale.process.progress import Board
from dis_scale.recipe import Recipe
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from pipelines.cluster import Cluster
from pipelines.driver import Driver


def driver_of(recipe: Recipe, root: Path) -> Driver:
    console = Console(file=io.StringIO(), width=200, record=True)
    return Driver(Sweep.below(open_folder(root), recipe), Board(console))


def logged(driver: Driver) -> str:
    """Return what the driver has shown."""
    return driver.board.console.export_text(clear=False)


def cluster(name: str) -> Cluster:
    return Cluster(None, {}, name, ours=False, at_once=lambda: 1, gpus=lambda: 0, gpu_fault="", id=name)
