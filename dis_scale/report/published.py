"""Published results, plotted next to a sweep's own points: marked as published, never in a fit.

FID-50K on ImageNet 256x256 without guidance after 400K steps of 256 images, against multiply-adds of one forward pass.
"""

from typing import NamedTuple

from dis_scale.process.errors import UserError, counted
from dis_scale.report.points import Report


class Published(NamedTuple):
    """One published model; `gmacs` in 10^9 multiply-adds."""

    family: str
    model: str
    gmacs: float
    fid: float


BATCH = 256
IMAGES = 400_000 * BATCH
STEPS = 250
"""Sampling steps of all published results."""
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
"""ADM's statistics of ImageNet, the reference of all published results."""
MARKERS = {"DiT": "1", "SiT": "2", "DiG": "3"}
SAMPLERS = {"DiT": "ddpm", "SiT": "euler_maruyama", "DiG": "ddpm"}
"""Our name of each family's sampler."""
PUBLISHED = [
    # Peebles and Xie 2022 (arXiv 2212.09748), table 4; multiply-adds from its table 1
    Published("DiT", "DiT-S/2", 6.06, 68.4),
    Published("DiT", "DiT-B/2", 23.0, 43.5),
    Published("DiT", "DiT-L/2", 80.7, 23.3),
    Published("DiT", "DiT-XL/2", 118.6, 19.5),
    # Ma et al. 2024 (arXiv 2401.08740): DiT's backbones under flow matching
    Published("SiT", "SiT-B/2", 23.0, 33.0),  # as later tables quote it
    Published("SiT", "SiT-L/2", 80.7, 18.8),
    Published("SiT", "SiT-XL/2", 118.6, 17.2),
    # Zhu et al. 2024 (arXiv 2405.18428); the multiply-adds are the count of DiCo (arXiv 2505.11196), in its table
    Published("DiG", "DiG-S/2", 4.30, 62.06),
    Published("DiG", "DiG-B/2", 17.07, 39.50),
    Published("DiG", "DiG-L/2", 61.66, 22.90),
    Published("DiG", "DiG-XL/2", 89.4, 18.53),
]


def require_published_protocol(report: Report) -> None:
    """Raise UserError unless the sweep's images, reference, image counts and sampling match the published results."""
    data, evaluate, made = report.recipe.data, report.recipe.evaluate, [p.evaluation for p in report.main]
    unlike = [] if report.metric == "fid" else [report.metric]
    if (data.resolution, data.num_classes) != (256, 1000):
        unlike.append(f"{data.resolution} pixels and {counted(data.num_classes or 0, 'class')}")
    if not (evaluate.reference or "").endswith(REFERENCE):
        unlike.append(f"reference {evaluate.reference or 'of its own images'}")
    if IMAGES not in report.counts:
        unlike.append(f"no point at {IMAGES:,} images")
    unlike += sorted({f"guidance {m.sampling.guide or f'{m.sampling.scale:g}'}" for m in made if m.sampling.scale != 1})
    unlike += sorted({f"{m.sampling.steps} steps" for m in made if m.sampling.steps != STEPS})
    unlike += sorted({m.sampling.sampler for m in made} - set(SAMPLERS.values()))
    unlike += sorted({f"ema_width {m.ema_width:g}" for m in made if m.ema_width})
    unlike += sorted({f"{m.labels} labels" for m in made if m.labels != "uniform"})
    if unlike:
        raise UserError(
            f"--published: those points are FID of 50,000 samples on ImageNet 256 x 256 against {REFERENCE}, at {IMAGES:,} "
            f"images, without guidance, in {STEPS} steps of ddpm (DiT, DiG) or euler_maruyama (SiT), of uniform labels, from the "
            f"exponential average; {report.sweep} has {', '.join(unlike)}: use it with a sweep that measures the same"
        )


def families_alike(report: Report) -> list[str]:
    """Return the published families with the sampler of a point of the sweep."""
    samplers = {p.sampling.sampler for p in report.main}
    return [family for family in MARKERS if SAMPLERS[family] in samplers]


def published_differences(report: Report) -> str:
    """Return words on the published families that are not drawn, and on batches and precision that differ from theirs."""
    trained = [report.recipe.train_of(p.model) for p in report.main]
    batches, precisions = {train.batch_images for train in trained} - {BATCH}, {train.precision for train in trained}
    words = [f"{name} is not drawn (its sampler is {SAMPLERS[name]})" for name in MARKERS if name not in families_alike(report)]
    words.append("published points are of ImageNet 256, 102.4M images, no guidance, uniform labels, ADM's reference")
    words += [f"published points have batch {BATCH}, here it is {batch:,}" for batch in sorted(batches)]
    if "bf16" in precisions:
        words.append("DiT and SiT were trained in TF32, here it is bf16")
    return "".join(f"; {each}" for each in words)
