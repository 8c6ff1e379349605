"""Cost of resume points: `python -m benchmarks.resume_points [folder]`. They are written to the folder, by default a scratch one.

First the pause that training itself logs, at three sizes on two ranks that save every tenth step. Then the rates of a rank's work
for one resume point, on the bytes that one of 64 ranks holds of DiS-H (907 M parameters, four float32 states: 14.5 GB), and from
them the times at 8 and 64 ranks. Training pauses only for the clone; a thread does the rest.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch

from dis_scale.recipe import reading
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.storage.manifest import Digest
from tests.conftest import TINY
from tests.support import ranks

WIDTHS = {48: 2, 192: 4, 384: 6}
"""Width and depth of the trained models."""
T = TypeVar("T")
STATES, FLOAT32 = 4, 4
H_PARAMETERS = 907_000_000
RANKS = (8, 64)


def pauses(at: Path) -> None:
    """Train each size. The job's last line reports its pauses and the time of a step."""
    for width, depth in WIDTHS.items():
        model = f"models={{dit: {{kind: dit, width: {width}, depth: {depth}, heads: 6, patch: 2}}}}"
        how = [
            "train.publish_images=[0, 640]",
            "train.resume_every_images=160",
            "train.power_ema=null",
            "evaluate.variants={}",
        ]
        recipe = reading.load(TINY, [model, *how])
        print(f"width {width}:", flush=True)
        ranks.run(recipe, "dit", at / str(width), attempt=1)


def rates(at: Folder) -> dict[str, float]:
    """Bytes per second of the clone, of serialisation with hashing, and of the write."""
    flat = torch.randn(H_PARAMETERS // RANKS[-1])
    clone, clone_s = timed(lambda: flat.detach().to("cpu", copy=True))

    def serialise() -> bytes:
        data = safetensors.torch.save({"flat": clone})
        Digest.of(data)
        return data

    data, serialise_s = timed(serialise)
    _, write_s = timed(lambda: at.write("flat.safetensors", data))
    seconds = {"clone": clone_s, "bytes and hash": serialise_s, "write": write_s}
    return {part: len(data) / s for part, s in seconds.items()}


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Run `work` three times; return its result and the least time in seconds."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return result, min(seconds)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        pauses(at)
        speeds = rates(open_folder(at))
        for part, rate in speeds.items():
            print(f"{part:14} {rate / 1e9:6.2f} GB/s")
        for world in RANKS:
            share = H_PARAMETERS * STATES * FLOAT32 / world
            after = sum(share / rate for part, rate in speeds.items() if part != "clone")
            print(
                f"DiS-H, {world} ranks: {share / 1e9:.2f} GB per rank: training pauses {share / speeds['clone']:.2f} s, "
                f"then {after:.1f} s next to training"
            )


if __name__ == "__main__":
    main()
