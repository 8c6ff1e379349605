"""Held-out losses of two sweeps' models side by side, every seed: `python -m benchmarks.backbones FIGURE SWEEP SWEEP`.

The sweeps are `configs/digits-hybrids.yaml` at equal multiply-adds, and some of its models at equal seconds. Prints the losses.
"""

import statistics
import sys

from matplotlib.figure import Figure

from dis_scale import Sweep


def losses_of(url: str) -> dict[str, list[float]]:
    """Held-out loss of each seed, by model."""
    points = Sweep.open(url).results()
    groups = points.groupby(points["model"].str.replace(r"-seed-\d+$", "", regex=True))["held_out_loss"]
    return {str(model): list(losses) for model, losses in groups}


def main(figure_path: str, compute_url: str, seconds_url: str) -> None:
    compute, seconds = losses_of(compute_url), losses_of(seconds_url)
    order = sorted(compute, key=lambda model: -statistics.fmean(compute[model]))
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, losses, title in zip(
        figure.subplots(1, 2, sharey=True, sharex=True), (compute, seconds), ("multiply-adds", "seconds"), strict=True
    ):
        for row, model in [(row, model) for row, model in enumerate(order) if model in losses]:
            axes.plot(losses[model], [row] * len(losses[model]), "o", color="#0072b2", alpha=0.5)
            axes.plot(statistics.fmean(losses[model]), row, "|", color="black", markersize=16, markeredgewidth=2)
            print(title, model, *[f"{loss:.4f}" for loss in losses[model]], f"mean {statistics.fmean(losses[model]):.4f}")
        axes.set(yticks=range(len(order)), yticklabels=order, xlabel="held-out loss (lower is better)", title=f"equal {title}")
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(figure_path, dpi=160)


if __name__ == "__main__":
    main(*sys.argv[1:])
