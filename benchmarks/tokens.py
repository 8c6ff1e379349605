"""Where a state-space model wins: loss and time against the number of tokens: `python -m benchmarks.tokens FIGURE SWEEP [rounds]`.

The losses are those of `configs/digits-tokens.yaml`: four backbones at patches 4, 2 and 1, at equal multiply-adds. The times are
those of a training step of one image on this machine, by three blocks of width 384 (DiS-S/2's) in float32, at 64 to 4,096 tokens.
"""

import json
import statistics
import sys
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import backbones
from benchmarks.rows import Job, least_times
from dis_scale import models
from dis_scale.recipe import LatentShape
from dis_scale.recipe.models import from_sizes

DIS = {"kind": "dis", "width": 384, "depth": 2, "patch": 1, "drop_path": 0.0}
BACKBONES: dict[str, dict[str, Any]] = {
    "dis": DIS,
    "ssd": DIS | {"mixer": "ssd"},
    "hybrid": DIS | {"attention_every": 3},
    "dit": {"kind": "dit", "width": 384, "depth": 3, "heads": 6, "patch": 1},
}
"""Of three blocks each; the hybrid's last one is attention."""
COLORS = {"dis": "#0072b2", "ssd": "#009e73", "hybrid": "#d55e00", "dit": "#555555"}
SIDES = (8, 16, 32, 64)


def step_job(sizes: dict[str, Any], side: int) -> Job:
    """A job: forward and backward of one image of side x side tokens."""
    model = models.build(from_sizes(sizes), LatentShape(4, side), 10)
    x, t, y = torch.randn(1, 4, side, side), torch.rand(1), torch.zeros(1, dtype=torch.int64)
    return lambda: model(x, t, y).square().mean().backward()


def times(rounds: int) -> dict[str, list[float]]:
    """Microseconds a token of a step, by backbone, in the order of SIDES."""
    found: dict[str, list[float]] = {name: [] for name in BACKBONES}
    for side in SIDES:
        torch.manual_seed(0)
        least = least_times({name: step_job(sizes, side) for name, sizes in BACKBONES.items()}, rounds)
        for name, seconds in least.items():
            found[name].append(1e6 * seconds / side**2)
    return found


def losses_of(url: str) -> dict[str, list[tuple[int, float]]]:
    """(tokens, mean held-out loss of the seeds), by backbone."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in BACKBONES}
    for model, losses in backbones.losses_of(url).items():
        backbone, tokens = model.rsplit("-", 1)
        found[backbone].append((int(tokens), statistics.fmean(losses)))
    return {name: sorted(pairs) for name, pairs in found.items()}


def main(figure_path: str, sweep_url: str, rounds: int = 5) -> None:
    losses, microseconds = losses_of(sweep_url), times(rounds)
    print(json.dumps({"threads": torch.get_num_threads(), "held-out losses": losses, "us a token": microseconds}))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = [side**2 for side in SIDES]
    for name, color in COLORS.items():
        left.plot(*zip(*losses[name], strict=True), "o-", color=color, label=name)
        right.plot(tokens, microseconds[name], "o-", color=color)
        right.annotate(f" {name}", (tokens[-1], microseconds[name][-1]), color=color, va="center")
    left.set(title="digits' pixels, width 32, equal multiply-adds", ylabel="held-out loss (lower is better)", xlabel="tokens")
    on_gpus = "tokens\non GPUs fused attention is faster at 258, by public figures"
    right.set(title="a training step on a CPU, 3 blocks of width 384", ylabel="microseconds a token", xlabel=on_gpus)
    for axes in (left, right):
        axes.set_xscale("log", base=4)
        axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
        axes.set_xlim(48, 9000 if axes is right else 1400)
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(figure_path, dpi=160)


if __name__ == "__main__":
    figure_path, sweep_url, *rounds = sys.argv[1:]
    main(figure_path, sweep_url, *map(int, rounds))
