"""Coordinate check of learning-rate transfer: `python -m benchmarks.coordinates [figure.png]`.

A few Adam steps with the optimizer's groups on one seeded batch, at four widths, with and without `base_width`. Prints the mean
absolute change of each layer's output by width, and its slope on logarithmic axes. Where a rate transfers, layers change alike
at each width: slopes near zero. Draws the last block and the output. Read next: dis_scale/models/transfer.py.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from dis_scale import diffusion, models
from dis_scale.models import transfer
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dit.settings import Dit
from dis_scale.models.tokens import Backbone
from dis_scale.recipe import Flow, LatentShape, Train
from dis_scale.training.engine import parameter_groups

BASE_WIDTH, WIDTHS, KINDS = 64, (64, 128, 256, 512), ("dit", "dis", "diffussm")
HEAD_SIZE, DEPTH, STEPS, LEARNING_RATE = 32, 2, 5, 3e-3
SHAPE, CLASSES, BATCH = LatentShape(4, 8), 10, 64
FIGURE = Path("docs/images/coordinates.png")


class Coordinates(NamedTuple):
    """Mean absolute outputs by layer: initial ones, and their changes over the steps."""

    initial: dict[str, float]
    change: dict[str, float]


def settings_of(kind: str, width: int) -> Dis | DiffuSsm | Dit:
    match kind:
        case "dit":
            return Dit(kind="dit", width=width, depth=DEPTH, heads=width // HEAD_SIZE, patch=2)
        case "dis":
            return Dis(kind="dis", width=width, depth=DEPTH, patch=2, drop_path=0.0)
        case _:
            return DiffuSsm(kind="diffussm", width=width, depth=DEPTH, state_size=16)


def measure(kind: str, width: int, base_width: int | None, steps: int = STEPS) -> Coordinates:
    """Return the coordinates of one model. All widths see the same latents, times and noise.

    Modulations start at random, as after some training: at zero they would close every block in the first steps.
    """
    model = models.build(settings_of(kind, width), SHAPE, CLASSES)
    open_blocks(model)
    if base_width:
        transfer.scale_initial(model, base_width)
    settings = Train(publish_images=(BATCH,), batch_images=BATCH, lanes=1, base_width=base_width)
    groups = [group | {"lr": LEARNING_RATE * group["rate"]} for group in parameter_groups(model, settings)]
    optimizer, outputs = torch.optim.AdamW(groups), dict[str, torch.Tensor]()
    for name, layer in layers(model).items():
        layer.register_forward_hook(partial(_keep, outputs, name))
    batch_loss = loss_on_one_batch(model)
    batch_loss()
    first = dict(outputs)
    for _ in range(steps):
        optimizer.zero_grad()
        batch_loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    batch_loss()
    sizes = {name: float(out.abs().mean()) for name, out in first.items()}
    return Coordinates(sizes, {name: float((out - first[name]).abs().mean()) for name, out in outputs.items()})


@torch.no_grad()
def open_blocks(model: Backbone) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("modulation.weight") and not weight.any():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)


def layers(model: Backbone) -> dict[str, nn.Module]:
    """The layers whose outputs are measured, by name."""
    blocks = {f"block {i}": block for i, block in enumerate(model.get_submodule("blocks").children())}
    embedding = model.get_submodule("embed" if model.settings.kind == "diffussm" else "patches")
    return {"embedding": embedding, "time": model.time} | blocks | {"output": model}


def _keep(outputs: dict[str, torch.Tensor], name: str, _layer: object, _inputs: object, output: object) -> None:
    branch = output[0] if isinstance(output, tuple) else output  # DiS's blocks return the stream, too
    assert isinstance(branch, torch.Tensor)
    outputs[name] = branch.detach().float()


def loss_on_one_batch(model: Backbone) -> "partial[torch.Tensor]":
    """The flow's loss on seeded latents around one mean for each class."""
    rng = np.random.default_rng(0)
    labels = np.arange(BATCH) % CLASSES
    means, noise = rng.standard_normal((CLASSES, *_axes())), rng.standard_normal((2, BATCH, *_axes()))
    latents, noise_BCHW = (torch.from_numpy(x).float() for x in (0.8 * means[labels] + 0.6 * noise[0], noise[1]))
    process = diffusion.build(Flow(kind="flow"))
    return partial(
        _loss, model, process, latents, torch.from_numpy(labels), process.sample_times(rng, BATCH), noise_BCHW
    )


def _axes() -> tuple[int, int, int]:
    return (SHAPE.channels, SHAPE.size, SHAPE.size)


def _loss(
    model: Backbone,
    process: diffusion.Process,
    x_BCHW: torch.Tensor,
    y_B: torch.Tensor,
    t_B: torch.Tensor,
    noise_BCHW: torch.Tensor,
) -> torch.Tensor:
    return process.losses(lambda x, t: model(x, t, y_B), x_BCHW, t_B, noise_BCHW).total.mean()


def slopes(by_width: dict[int, dict[str, float]]) -> dict[str, float]:
    """Return each layer's slope on logarithmic axes: 0 for equal sizes at all widths, 1 for sizes that grow with the width.

    Layers that start at zero have none.
    """
    widths = np.log(list(by_width))
    values = {name: [sizes[name] for sizes in by_width.values()] for name in next(iter(by_width.values()))}
    return {name: float(np.polyfit(widths, np.log(each), 1)[0]) for name, each in values.items() if min(each) > 0}


def draw(changes: dict[tuple[str, int | None], dict[int, dict[str, float]]]) -> Figure:
    """Plot the changes of the last block and the output by width, a panel for each kind of model."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(KINDS), squeeze=False)[0]
    for axes, kind in zip(panels, KINDS, strict=True):
        for base_width, line in ((None, "--"), (BASE_WIDTH, "-")):
            by_width = changes[kind, base_width]
            last = [name for name in next(iter(by_width.values())) if name.startswith("block")][-1]
            for name, marker, colour in ((last, "o", "0.0"), ("output", "s", "0.5")):
                label = f"{'output' if name == 'output' else 'last block'}, base_width {base_width or 'none'}"
                sizes = [by_width[width][name] for width in by_width]
                axes.plot(list(by_width), sizes, line, marker=marker, color=colour, label=label)
        axes.set(xscale="log", yscale="log", title=kind, xlabel="width")
        axes.set_xticks(WIDTHS, [str(width) for width in WIDTHS], minor=False)
        axes.set_xticks([], minor=True)
    panels[0].set_ylabel(f"mean absolute change after {STEPS} steps")
    panels[0].legend(fontsize=7)
    return figure


def rows(kind: str, base_width: int | None, measured: dict[int, Coordinates]) -> Iterator[dict[str, object]]:
    for name in ("initial", "change"):
        by_width = {width: getattr(coordinates, name) for width, coordinates in measured.items()}
        rounded = {layer: round(slope, 3) for layer, slope in slopes(by_width).items()}
        sizes = {layer: [float(f"{sizes[layer]:.4g}") for sizes in by_width.values()] for layer in by_width[BASE_WIDTH]}
        yield {"kind": kind, "base_width": base_width, "of": name, "widths": WIDTHS, "slopes": rounded, "sizes": sizes}


def main(figure: str = str(FIGURE)) -> None:
    torch.set_num_threads(1)
    changes = {}
    for kind in KINDS:
        for base_width in (None, BASE_WIDTH):
            measured = {width: measure(kind, width, base_width) for width in WIDTHS}
            changes[kind, base_width] = {width: coordinates.change for width, coordinates in measured.items()}
            for row in rows(kind, base_width, measured):
                print(json.dumps(row), flush=True)
    draw(changes).savefig(figure, dpi=160)


if __name__ == "__main__":
    main(*sys.argv[1:])
