"""Export of one checkpoint as a folder for diffusers, with a model card: data, metrics, price, and what its author fills in."""

import json
from dataclasses import replace
from pathlib import Path

from dis_scale import __version__
from dis_scale.models.cost import Cost, price_model
from dis_scale.process.errors import UserError
from dis_scale.recipe import Recipe
from dis_scale.sweep import Sampled, Sweep
from dis_scale.sweep.documents import ImportedFrom, Metrics, PublishedManifest, RunCost
from dis_scale.weights.export import save_pipeline
from dis_scale.weights.opening import OpenCheckpoint, open_for_sampling

CARD = "README.md"
FILL_IN = "*To fill in.*"


def export_checkpoint(at: str, folder: Path, vae_path: str | None = None, heads: int | None = None) -> OpenCheckpoint:
    """Write a checkpoint as a new folder that `DiffusionPipeline.from_pretrained` opens, and a model card; return what was opened.

    UserError if the folder has files, or if the checkpoint cannot be sampled from.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export: {folder} exists: delete it, or name another folder")
    opened = open_for_sampling(at, vae_path, heads)
    opened = replace(opened, model=opened.model.as_ours())
    guidance = opened.sampling.model_dump(mode="json", include={"guidance_channels", "guidance_interval"})
    save_pipeline(folder, opened.model, opened.process, opened.decoder, guidance, opened.facts)
    (folder / CARD).write_text(model_card(opened))
    return opened


def model_card(opened: OpenCheckpoint) -> str:
    """Return the card in Markdown; facts of a checkpoint outside of a sweep are to fill in."""
    model, sweep, published = opened.model, opened.located.sweep, opened.located.published
    cost = price_model(model.settings, model.shape, model.num_classes)
    channels, size = model.shape
    manifest = None
    if sweep and published:
        manifest = PublishedManifest.find(sweep.run(published.model).published_at(published.images_seen))
    origin = manifest.imported if manifest else None
    name = f"{sweep.recipe.name}-{published.model}" if sweep and published else model.settings.kind
    parts = {
        "Model": f"{model.settings.kind}, {cost.parameters:,} parameters, {cost.tokens:,} tokens, {cost.gmacs_forward:.4g} Gflops "
        f"(multiply-adds of a forward pass), latents {channels}x{size}x{size}, {model.num_classes or 'no'} classes; "
        f"{opened.process.kind} process.",
        "Use": _use(opened),
        "Data": _data(sweep.recipe, origin) if sweep else FILL_IN,
        "Metrics": _metrics(sweep, published) if sweep and published else FILL_IN,
        "Price of training": _price(sweep, published, cost, manifest.cost)
        if sweep and published and manifest and not origin
        else FILL_IN,
        "Licence": f"{FILL_IN} It depends on the images and on the autoencoder.",
    }
    head = f"---\nlibrary_name: diffusers\nlicense: other  # to fill in\ntags: [diffusion, {model.settings.kind}]\n---\n"
    return head + f"# {name}\n" + "".join(f"\n## {title}\n\n{text}\n" for title, text in parts.items())


def _use(opened: OpenCheckpoint) -> str:
    labels, sampling = "class_labels=[0]" if opened.model.num_classes else "num_images=1", opened.sampling
    guided = " The samples of the metrics are guided by another model of the sweep, the pipeline's are not."
    return (
        f"It runs the code of dis-scale {__version__}, which no package index has: `pip install -c constraints.txt .` in its "
        "repository, or install its wheel.\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        'pipeline = DiffusionPipeline.from_pretrained("FOLDER", custom_pipeline="FOLDER", trust_remote_code=True)\n'
        f'pipeline({labels}, sampler="{sampling.sampler}", num_inference_steps={sampling.steps}, '
        f"guidance_scale={1 if opened.guide_at else sampling.scale:g})"
        f".images[0]\n```{guided if opened.guide_at and sampling.scale != 1 else ''}"
    )


def _data(recipe: Recipe, origin: ImportedFrom | None) -> str:
    if origin:
        return f"The weights are those of `{origin.name}` (sha256 {origin.sha256}). Their images: {FILL_IN}"
    source = json.dumps(recipe.data.source.model_dump(mode="json", exclude_none=True))
    return f"Images of {recipe.data.resolution}x{recipe.data.resolution} pixels from `{source}`. Origin and consent: {FILL_IN}"


def _metrics(sweep: Sweep, published: Sampled) -> str:
    """Return a table of the main evaluation and its variants."""
    lines = []
    for variant, settings in sweep.recipe.evaluate.samplings.items():
        metrics = Metrics.find_intact(sweep.evaluation(published._replace(variant=variant)))
        how = f"{settings.samples:,} samples, {settings}"
        how += f", of the average of width {settings.ema_width:g}, not of these weights" if settings.ema_width is not None else ""
        lines += [f"| {name} | {value:.4g} | {how} |" for name, value in (metrics.values if metrics else {}).items()]
    return "\n".join(["| metric | value | sampling |", "|---|--:|---|", *lines]) if lines else f"Not evaluated. {FILL_IN}"


def _price(sweep: Sweep, published: Sampled, cost: Cost, run: RunCost) -> str:
    flops_per_image = cost.training_flops(sweep.recipe.train_of(published.model).lane_images)
    words = [f"{published.images_seen:,} images seen, {published.images_seen * flops_per_image / 1e18:.3g} EFLOP"]
    if hours := run.worker_hours:
        words.append(f"{hours:,.4g} worker hours on {', '.join(run.trained_on) or 'unknown machines'}")
    return f"{'; '.join(words)}."
