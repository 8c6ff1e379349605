"""What resume points cost: `python -m benchmarks.resume_points [folder]`; the folder is where they are written, a scratch one else.

First the pause, as training itself says it, at three sizes on two ranks that save every tenth step. Then the rates of what a rank
does for one resume point, on as many bytes as one of 64 ranks holds of DiS-H (907 M parameters, four float32 states:
14.5 GB), and from them the times at 8 and at 64 ranks: training stands still for the clone, the rest is a thread's.
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
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder, open_folder
from tests.conftest import TINY
from tests.support import ranks

WIDTHS = {48: 2, 192: 4, 384: 6}
"""Width and depth of the models that are trained."""
T = TypeVar("T")
STATES, FLOAT32 = 4, 4
H_PARAMETERS = 907_000_000
RANKS = (8, 64)


def pauses(at: Path) -> None:
    """Trains each size; the job's last line says how long it stood still, and how long a step takes."""
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
    """Bytes a second of the clone, of bytes with their hash, and of the write."""
    flat = torch.randn(H_PARAMETERS // RANKS[-1])
    clone, clone_s = timed(lambda: flat.detach().to("cpu", copy=True))

    def serialise() -> bytes:
        data = safetensors.torch.save({"flat": clone})
        manifest.digest(data)
        return data

    data, serialise_s = timed(serialise)
    _, write_s = timed(lambda: at.write("flat.safetensors", data))
    seconds = {"clone": clone_s, "bytes and hash": serialise_s, "write": write_s}
    return {part: len(data) / s for part, s in seconds.items()}


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The work's result, and the shortest of three times."""
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
        found = rates(open_folder(at))
        for part, rate in found.items():
            print(f"{part:14} {rate / 1e9:6.2f} GB/s")
        for ranks in RANKS:
            share = H_PARAMETERS * STATES * FLOAT32 / ranks
            after = sum(share / rate for part, rate in found.items() if part != "clone")
            print(
                f"DiS-H, {ranks} ranks: {share / 1e9:.2f} GB a rank: training stands still {share / found['clone']:.2f} s, "
                f"then {after:.1f} s beside it"
            )


if __name__ == "__main__":
    main()
