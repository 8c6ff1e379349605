"""The first recipe for a folder of images: settings that fit the images and a machine, with their price in its first lines.

`propose` decides, by the constants here. `_header` and `_settings` write the text. Read next: data/survey.py.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from dis_scale.data.memory import free_memory_bytes
from dis_scale.data.survey import Survey
from dis_scale.models import families
from dis_scale.planning.fleet import ASSUMED_MFU
from dis_scale.planning.plan import Plan, price_sweep
from dis_scale.process.errors import UserError, counted
from dis_scale.recipe import LatentShape, reading
from dis_scale.recipe.evaluate import FEATURE_DIMENSIONS, JUDGE
from dis_scale.training.devices import smallest_gpu_bytes, usable_gpus
from dis_scale.training.memory import USABLE, lanes_at_once, worker_bytes
from dis_scale.training.throughput import datasheet_tflops
from dis_scale.vae import HUB

RESOLUTIONS = (32, 64, 128, 256, 512)
MOSTLY = 0.9
"""Share of the images whose shorter side must reach the resolution."""
MOST_AS_PIXELS = 64
"""Largest resolution at which GPUs train models without an autoencoder."""
CHOSEN_ON_A_CPU, MOST_ON_A_CPU = 32, 128
"""Largest resolution that is chosen without a GPU: shapes are visible after minutes. And the largest at which the sweep then trains
an autoencoder: for larger images, that takes seconds per image."""
MOST_TOKENS_ON_A_CPU = 256
SMALL_VAE = "widths: [8, 16, 32], norm_groups: 1, steps: 4000, batch_images: 8, learning_rate: 3e-3, kl_weight: 1e-3"
VAES_ON_A_CPU = {
    32: SMALL_VAE, 64: SMALL_VAE, 128: "widths: [8, 16, 32, 32], norm_groups: 1, batch_images: 8, kl_weight: 1e-3",
}  # fmt: skip
"""Autoencoder by resolution, for latents of 64 or 256 positions. Models of pixels would need four times as many tokens, and
noise remains in their samples if a patch has more values than the model is wide. With more than one group the colours are lost."""
COLOURS = "# More steps give truer colours. The autoencoder cannot change after the first start.\n"
HUB_VAE = "stabilityai/sd-vae-ft-ema"
VAE_CHANNELS, VAE_FACTOR = HUB[HUB_VAE]
SMALL_FACTOR = 4
"""Side in pixels of one latent position, for images up to `MOST_AS_PIXELS` on a CPU."""
LEAST_STEPS, MOST_EPOCHS = 1600, 1000
"""A small model samples the requested digit after 1,500 steps at a rate of 3e-3. DiS saw CIFAR-10 for 1,000 epochs."""
CORE_FLOPS = 8e9
"""Operations per second of a core that trains small models: four fifths of 4.787e12 in 484 s (benchmarks/results/digits.json)."""
UNKNOWN_TFLOPS = 100.0
"""Assumed peak of a GPU that is not in DATASHEET_TFLOPS."""
LEAST_IMAGES = 20
"""Least number of images for a recipe."""
HELD_OUT_SHARE = 10
"""One image in this many is held out if only the held-out loss compares models."""
INCEPTION, TRAINED = FEATURE_DIMENSIONS["inception"], FEATURE_DIMENSIONS["trained"]


@dataclass(frozen=True)
class Machine:
    """Cores, memory and GPUs that training can use."""

    cores: int
    memory_bytes: int
    """Free memory."""
    gpus: int = 0
    gpu_bytes: int = 0
    """Memory of the smallest GPU."""
    gpu_name: str = ""

    @classmethod
    def here(cls) -> "Machine":
        """Return what training can use on this machine."""
        cores, memory, (gpus, _) = len(os.sched_getaffinity(0)), free_memory_bytes(), usable_gpus()
        if not gpus:
            return cls(cores, memory)
        import torch  # takes seconds

        return cls(cores, memory, gpus, smallest_gpu_bytes(), torch.cuda.get_device_name(0))

    @property
    def words(self) -> str:
        if self.gpus:
            return f"{self.gpus} x {self.gpu_name} with {self.gpu_bytes / 2**30:.0f} GiB"
        return f"{self.cores} cores with {self.memory_bytes / 2**30:.0f} GiB of free memory, no GPU"

    @property
    def flops(self) -> float:
        """Operations per second of training."""
        peaks = datasheet_tflops(self.gpu_name) or (UNKNOWN_TFLOPS,)
        gpu = ASSUMED_MFU * 1e12 * peaks[0]
        return self.gpus * gpu if self.gpus else self.cores * CORE_FLOPS


@dataclass(frozen=True)
class Scale:
    """Choices that differ between CPUs and GPUs: candidates, lengths, and training settings in a recipe's words."""

    models: dict[str, str]
    """Models by name, the smallest first."""
    batch_images: int
    least_steps: int
    """A further model is chosen only if all models can then train for this many steps within `hours`."""
    hours: float
    first_steps: int | None
    """Steps of the first published weights; None for an eighth of all."""
    sampler_steps: int
    samples: int
    """Samples of an evaluation by a trained extractor."""
    inception_samples: int
    train: str
    unit: tuple[str, int]
    """Unit of a training's price, and its power of ten."""


FAMILY = families.default()
CPU = Scale(
    {
        name: ", ".join(f"{key}: {value}" for key, value in {"kind": FAMILY.kind, **sizes}.items())
        for name, sizes in FAMILY.small.items()
    },
    batch_images=64, least_steps=4 * LEAST_STEPS, hours=1.0, first_steps=1000, sampler_steps=10, samples=500,
    inception_samples=INCEPTION + 52,
    train="learning_rate: 2e-3\n  ema: 0.998", unit=("PFLOP", 15),
)  # fmt: skip
GPU = Scale(
    {preset.lower().partition("/")[0]: f"preset: {preset}" for preset in FAMILY.ladder},
    batch_images=256, least_steps=20_000, hours=24.0, first_steps=None, sampler_steps=25, samples=1000,
    inception_samples=5000,
    train="precision: bf16\n  learning_rate: 1e-4\n  ema: 0.9999", unit=("EFLOP", 18),
)  # fmt: skip


def resolution_of(survey: Survey, machine: Machine) -> int:
    """Return the largest resolution that most of the images reach, on a CPU at most `CHOSEN_ON_A_CPU`; otherwise the smallest."""
    most = RESOLUTIONS[-1] if machine.gpus else CHOSEN_ON_A_CPU
    return max((r for r in RESOLUTIONS if r <= most and survey.share_of(r) >= MOSTLY), default=RESOLUTIONS[0])


def require_resolution(resolution: int) -> None:
    """Raise UserError for a resolution that is not in `RESOLUTIONS`."""
    if resolution not in RESOLUTIONS:
        raise UserError(f"--resolution {resolution}: expected one of {', '.join(map(str, RESOLUTIONS))}")


def propose(survey: Survey, machine: Machine, file: str, resolution: int) -> str:
    """Return a recipe's text, which names its own `file`.

    UserError for too few images, and if no model fits the memory.
    """
    draft = _Draft(survey, machine, GPU if machine.gpus else CPU, file, resolution)
    scale, first, *larger = draft.scale, *draft.scale.models
    if not draft.fits(first):
        raise UserError(f"{survey.url}: {first} does not fit {machine.words}: set --resolution lower")
    chosen = [first]
    for name in larger:
        if not draft.fits(name) or draft.steps_of([*chosen, name]) < scale.least_steps:
            break
        chosen.append(name)
    epochs = MOST_EPOCHS * survey.count // scale.batch_images
    steps = max(min(draft.steps_of(chosen), epochs), LEAST_STEPS) // 200 * 200
    return _header(draft, draft.plan(chosen, steps)) + _settings(draft, chosen, steps)


@dataclass(frozen=True)
class _Draft:
    """Decisions before the models are chosen."""

    survey: Survey
    machine: Machine
    scale: Scale
    file: str
    resolution: int

    @property
    def name(self) -> str:
        """Name of the sweep: the folder's, reduced to the characters that a sweep's name allows."""
        folder = self.survey.url.rstrip("/").rpartition("/")[2].lower()
        return re.sub(r"[^a-z0-9]+", "-", folder).strip("-")[:40].strip("-") or "images"

    @property
    def vae(self) -> tuple[str, LatentShape]:
        """The autoencoder in a recipe's words, and the shape of its latents: by rule, so that no hub is asked."""
        as_pixels = self.resolution <= MOST_AS_PIXELS
        if self.machine.gpus and as_pixels:
            return "vae: {kind: none}  # the models see pixels", LatentShape(3, self.resolution)
        shape = LatentShape(VAE_CHANNELS, self.resolution // (SMALL_FACTOR if as_pixels else VAE_FACTOR))
        if self.machine.gpus or self.resolution > MOST_ON_A_CPU:
            return f"vae: {{kind: pretrained, path: {HUB_VAE}}}  # hub id or a local folder", shape
        return f"{COLOURS}vae: {{kind: trained, {VAES_ON_A_CPU[self.resolution]}}}", shape

    @property
    def shape(self) -> LatentShape:
        return self.vae[1]

    @property
    def workers(self) -> int:
        """Number of workers: one per GPU; otherwise the largest power of two up to the cores, at most eight."""
        return self.machine.gpus or max(n for n in (1, 2, 4, 8) if n <= max(1, self.machine.cores))

    @property
    def lanes(self) -> int:
        """Least number of lanes that divides a batch and gives each worker one; at least 32 on GPUs."""
        least = max(32, self.workers) if self.machine.gpus else self.workers
        return next((n for n in range(least, self.scale.batch_images + 1) if self.scale.batch_images % n == 0), least)

    def model(self, name: str) -> str:
        """Return a model in a recipe's words. On a CPU the patch bounds the tokens."""
        patch = max(2, self.shape.size // int(MOST_TOKENS_ON_A_CPU**0.5))
        return f"{{{self.scale.models[name]}{'' if self.machine.gpus else f', patch: {patch}'}}}"

    def plan(self, models: list[str], steps: int) -> Plan:
        return price_sweep(reading.parse(_settings(self, models, steps), self.file), self.shape)

    def fits(self, model: str) -> bool:
        """Return whether the memory holds a model's training."""
        plan = self.plan([model], 8)
        train, cost = plan.recipe.train, plan.costs[model]
        if not self.machine.gpus:
            need = train.most_workers * worker_bytes(cost, train, train.most_workers, train.lane_images)
            return need <= USABLE * self.machine.memory_bytes
        try:
            return lanes_at_once(model, cost, train, train.most_workers, self.machine.gpu_bytes) > 0
        except UserError:
            return False

    def steps_of(self, models: list[str]) -> int:
        """Return the steps that each of these models can take within the scale's hours."""
        plan = self.plan(models, 8)
        images = self.scale.hours * 3600 * self.machine.flops / sum(map(plan.training_flops, models))
        return int(images) // self.scale.batch_images


def _header(draft: _Draft, plan: Plan) -> str:
    """Return the first lines: the recipe's images and machine, its command, and its price."""
    survey, (unit, exponent) = draft.survey, draft.scale.unit
    classes = f"in {counted(len(survey.classes), 'class')}" if survey.classes else "without labels"
    lines = [
        f"{counted(survey.count, 'image')} {classes}, for {draft.machine.words}.",
        "Written by `dis-scale init`; any line may be changed. `dis-scale recipe show` prints all other settings.",
        "",
        f"  dis-scale sweep {draft.file}",
        "",
        "Price, computed, not measured (`dis-scale plan` prints all but sampling). Gflops are multiply-adds, "
        f"one {unit} is 10^{exponent} operations:",
        f"  model          parameters   Gflops  train {unit}  sample {unit}",
        *_prices(plan, 10.0**exponent),
        *_totals(draft, plan, 10.0**exponent),
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _prices(plan: Plan, unit: float) -> Iterator[str]:
    """Yield the price of each model, and of its samples in one evaluation."""
    for name, cost in plan.costs.items():
        trained, sampled = plan.own_flops(name) / unit, plan.sampling_flops(name) / unit
        yield f"  {name:<11}{cost.parameters:>14,} {cost.gmacs_forward:>8.4g} {trained:>12.3g} {sampled:>13.3g}"


def _totals(draft: _Draft, plan: Plan, unit: float) -> Iterator[str]:
    """Yield the price of all models, and the time that it takes here."""
    train, machine, name = plan.recipe.train, draft.machine, draft.scale.unit[0]
    own = draft.survey.count - plan.recipe.data.held_out_images
    counts, epochs = len(train.publish_images), train.images / own
    trained, sampled = sum(map(plan.own_flops, plan.costs)), counts * sum(map(plan.sampling_flops, plan.costs))
    speed = f"{ASSUMED_MFU:.0%} of the peak, assumed" if machine.gpus else "as measured on small models"
    yield (
        f"Together {trained / unit:.3g} {name} to train {train.images:,} images ({counted(round(epochs), 'epoch')}) each, "
        f"{sampled / unit:.3g} to sample for {counted(counts, 'evaluation')} per model."
    )
    yield (
        f"At {machine.flops / 1e12:.3g} TFLOP/s ({speed}) that takes {(trained + sampled) / machine.flops / 3600:.1f} hours, "
        "without the autoencoder and the metrics."
    )


def _settings(draft: _Draft, models: list[str], steps: int) -> str:
    """Return the settings; `steps` is divisible by 8."""
    survey, scale, gpus, workers = draft.survey, draft.scale, draft.machine.gpus, draft.workers
    batch, reach = scale.batch_images, survey.share_of(draft.resolution)
    extractor, samples = _extractor(draft)
    held_out = survey.count // HELD_OUT_SHARE if extractor.startswith("{kind: none}") else 0
    broken = f"  undecodable: skip  # {counted(len(survey.broken), 'image')} cannot be decoded\n" if survey.broken else ""
    return f"""\
name: {_word(draft.name)}
data:
  source: {{kind: folder, url: {json.dumps(survey.url, ensure_ascii=False)}}}
  resolution: {draft.resolution}  # the shorter side of {reach:.0%} of the images has as many pixels{_other_resolutions(draft)}
  num_classes: {len(survey.classes) or "none"}
  mirror: true  # false if left and right matter, as in text
{broken}{f"  held_out_images: {held_out}{chr(10)}" if held_out else ""}{draft.vae[0]}
precompute: {{workers: {workers}{", precision: bf16" if gpus else ""}{f", shard_images: {held_out}" if held_out else ""}}}
diffusion: {{kind: flow}}
models:
{"".join(f"  {name}: {draft.model(name)}" + chr(10) for name in models)}train:
  publish_images: {[count * batch for count in _published(scale, steps)]}  # evaluated; larger counts may be added later
  batch_images: {batch}
  lanes: {draft.lanes}
  workers: {workers}
  {scale.train}
  warmup_images: {steps // 20 * batch}
  resume_every_images: {max(1, steps // 10) * batch}
evaluate:
  samples: {samples}
  sampler: heun
  steps: {scale.sampler_steps}
  guidance: {1.5 if survey.classes else 1.0}
  extractor: {extractor}
  workers: {max(1, gpus)}
"""


MIDDLE = 1.5
"""Least ratio of a count to the one before at which its evaluation is worth the price."""


def _published(scale: Scale, steps: int) -> list[int]:
    """Return the steps after which weights are published, the first as soon as they may be worth a picture."""
    first = min(scale.first_steps or steps // 8, steps)
    return sorted({first, steps, *([steps // 2] if steps // 2 >= MIDDLE * first else [])})


def _word(name: str) -> str:
    """Return a name as YAML reads it back: quoted if it looks like a number or another value."""
    return json.dumps(name) if name[0].isdigit() else yaml.safe_dump(name).splitlines()[0]


def _other_resolutions(draft: _Draft) -> str:
    if draft.machine.gpus or draft.resolution == MOST_ON_A_CPU:
        return ""
    if draft.resolution > MOST_ON_A_CPU:
        return "; without a GPU its autoencoder takes seconds for each"
    larger = [r for r in RESOLUTIONS if draft.resolution < r <= MOST_ON_A_CPU and draft.survey.share_of(r) >= MOSTLY]
    return f"; up to {larger[-1]} with more time: init --resolution" if larger else ""


def _extractor(draft: _Draft) -> tuple[str, int]:
    """Return the extractor in a recipe's words, and the number of samples.

    A small classifier learns from labels, and from images that fit the memory; Inception needs more images than it has features.
    """
    survey, count = draft.survey, draft.survey.count
    for_a_cpu = not draft.machine.gpus and draft.resolution <= MOST_ON_A_CPU
    if survey.classes and count > TRAINED and (for_a_cpu or count <= INCEPTION):
        name = re.sub(r"[^a-z0-9]", "", draft.name)
        name = "images" if name in ("inception", JUDGE) else name
        return (
            f"{{kind: trained, name: {_word(name)}}}  # for FID: {{kind: inception}}, from {INCEPTION + 1:,} images on",
            draft.scale.samples,
        )
    if count > INCEPTION:
        return "{kind: inception}  # downloads its weights, 96 MB, or reads `weights`", draft.scale.inception_samples
    if count < LEAST_IMAGES:
        raise UserError(f"{survey.url}: {counted(count, 'image')}, too few: expected at least {LEAST_IMAGES}: add images")
    return f"{{kind: none}}  # {why_no_distance(survey)}", 40


def why_no_distance(survey: Survey) -> str:
    """Return why a recipe for so few images measures no distance."""
    least = f"{TRAINED + 1} images" if survey.classes else f"{INCEPTION + 1:,} images, or {TRAINED + 1} in class folders"
    return f"a distance needs {least}; so here are samples and a held-out loss"
