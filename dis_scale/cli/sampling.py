"""The command that samples from one checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dis_scale.cli.checkpoints import Heads
from dis_scale.cli.shared import CHECKPOINT, AsJson, VaeOption, console, require_file, require_png, say, say_aside, show, working
from dis_scale.process.errors import UserError
from dis_scale.recipe.evaluate import Sampler

if TYPE_CHECKING:
    from dis_scale.weights.checkpoints import Located
    from dis_scale.weights.opening import OpenCheckpoint

ADM_SAMPLES = 50_000
"""Samples that FID is defined by."""
MOST_IN_A_GRID, WITHOUT_CLASSES = 100, 20
"""Images in a grid unless more are asked for."""
GRID = Path("grid.png")
"""The file of a grid, unless another is named."""
COLUMNS = 10
"""Most columns of a grid."""


def sample(
    checkpoint: Annotated[str | None, typer.Argument(help=CHECKPOINT, show_default=False)] = None,
    named: Annotated[str | None, typer.Option("--checkpoint", help="The checkpoint by name, instead of as an argument.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Labels or classes to sample in turn, such as 1,7 or cat,dog; default: all.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            help=f"Number of images; default: one per label, of all classes at most {MOST_IN_A_GRID}, "
            f"without classes {WITHOUT_CLASSES}; 50000 with --npz.",
            min=1,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help=f"The PNG to write; default: {GRID}.")] = None,
    npz: Annotated[
        Path | None, typer.Option(help="Write all images to this file instead, for ADM's evaluator; default: of all classes.")
    ] = None,
    labels: Annotated[
        Literal["balanced", "uniform"],
        typer.Option(help="With --npz: each class equally often, or independent labels, all equally likely."),
    ] = "balanced",
    guidance: Annotated[float | None, typer.Option(min=0, help="Default: as for the sampler, or 1: none.")] = None,
    guide: Annotated[
        str | None, typer.Option(help="A worse checkpoint that guides; default: the sweep's own, or no labels.")
    ] = None,
    guidance_channels: Annotated[
        int | None, typer.Option(min=1, help="Guide so many channels, the first; default: as for the sampler, or all.")
    ] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="Default: the sweep's own, or that in the checkpoint.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: as for the sampler.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Images sampled at a time; does not change them.", min=1)] = 64,
    vae: VaeOption = None,
    heads: Heads = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Sample a grid of images from one checkpoint, or a file of many for ADM's evaluator; on a GPU if there is one."""
    from dis_scale.weights.checkpoints import find_checkpoint, labels_in_words

    if not (given := checkpoint or named) or (checkpoint and named):
        raise UserError("sample: expected one checkpoint, such as examples/digits or SWEEP/runs/MODEL")
    aside = say_aside if as_json else say
    _require_outputs(out, npz, labels, classes)
    with working("sample: reading"):
        located = find_checkpoint(given)  # misspelt paths and classes are refused before PyTorch is loaded: it takes seconds
    chosen = None if classes is None else labels_in_words(located.class_names, classes)
    aside("loading  the model; its kernels are compiled at their first use on a machine")
    import numpy as np
    import torch

    from dis_scale.evaluation import adm
    from dis_scale.evaluation.sampling import grid
    from dis_scale.process.progress import Board
    from dis_scale.training.throughput import machine_name
    from dis_scale.weights import opening as pictures

    opened = _opened(located, vae, heads, guide)
    for line in opened.notes:
        aside(line)
    if chosen and opened.model.num_classes in chosen:
        aside(f"label    {opened.model.num_classes} is that of no class: classes are 0 to {opened.model.num_classes - 1}")
    each = len(chosen or range(opened.model.num_classes or WITHOUT_CLASSES))
    images = count or (ADM_SAMPLES if npz else each if chosen else min(each, MOST_IN_A_GRID))
    if npz and chosen is None:
        each_label = pictures.labels_of_all(opened, labels, images, seed)
    else:
        each_label = pictures.labels_in_turn(opened, chosen, images)
    sampling = opened.sampling_with(sampler=sampler, steps=steps, guidance=guidance, guidance_channels=guidance_channels)
    if guide and sampling.scale == 1:
        raise UserError(pictures.NOTHING_GUIDES)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    by = opened.guide_at if sampling.scale != 1 else None
    aside(f"sampling {opened.located}: {sampling}{f' by {by}' if by else ''}, fp32 on {machine_name(device)}")
    written = npz or out or GRID
    with Board(console(stderr=as_json)) as board, board.working("sample"):
        parts = pictures.sample_pictures(
            opened, each_label, sampling=sampling, seed=seed, batch=batch, device=device,
            progress=lambda done, steps: board.update("sample", done, steps, "steps"),
        )  # fmt: skip
        if npz:
            adm.write_samples(npz, images, parts)
        else:
            names = pictures.image_names(opened, each_label)
            written.write_bytes(grid(np.concatenate(list(parts)), grid_columns(each, images), names))
    found = {
        "file": str(written), "images": images, "sampler": sampling.sampler, "steps": sampling.steps, "guidance": sampling.scale,
        "seed": seed, "device": machine_name(device), "notes": opened.notes,
    }  # fmt: skip
    found |= {"guide": str(by)} if by else {}
    show(found, f"{images:,} {'images' if images > 1 else 'image'} in {written}", as_json=as_json)


def _opened(located: "Located", vae: str | None, heads: int | None, guide: str | None) -> "OpenCheckpoint":
    """Open a checkpoint; loads PyTorch."""
    from dis_scale.vae import import_without_others
    from dis_scale.weights.opening import has_sweeps_vae, open_for_sampling

    if vae is None and has_sweeps_vae(located):
        import_without_others()
    with working("sample: loading"):
        return open_for_sampling(located, vae, heads, guide)


def _require_outputs(out: Path | None, npz: Path | None, labels: str, classes: str | None) -> None:
    """UserError for a file that cannot be written or used, or labels that would not be drawn: before hours of sampling."""
    if labels == "uniform" and (npz is None or classes is not None):
        raise UserError("--labels uniform needs --npz, and draws from all classes: leave it out, or --classes")
    if npz is None:
        return require_png(out or GRID)
    if out is not None:
        raise UserError("--out is a grid's PNG, and --npz a file of all images: expected one of them")
    if npz.suffix.lower() != ".npz":
        raise UserError(f"--npz {npz}: ADM's evaluator takes an .npz: give a name that ends with .npz")
    return require_file(npz, "--npz")


def grid_columns(classes: int, images: int) -> int:
    """Return the columns of a grid. Few classes fill complete columns, each with one class."""
    return min(images, COLUMNS // classes * classes or COLUMNS)
