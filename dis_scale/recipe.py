"""The recipe: what a sweep is, as frozen typed data; YAML plus `--set a.b=value`, checked across parts before anything is spent.

Every setting of the system stands here, a class for each part, so that this page is the whole vocabulary of a recipe and reading
one costs no heavy import. A field is *identity* (two sweeps of one name may not differ in it) unless it is marked *extent* (may
grow) or *runtime* (may change freely). Read next: sweep.py for what is done with it, configs/digits.yaml for one.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dis_scale.errors import UserError, nearest

FILE = "recipe.yaml"
"""The recipe's name in a sweep's folder."""
MAIN = ""
"""The name of the main way to draw, beside the variants' own."""
FORMAT = 1
"""Version of the stored recipe; this code reads FORMAT and FORMAT - 1."""

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Width = Annotated[float, Field(ge=0.005, le=0.28)]
"""Relative width of a power-function average, see ema.py."""


def runtime(default: Any, **limits: Any) -> Any:
    """A field that may change freely between two starts of one sweep."""
    return Field(default, json_schema_extra={"role": "runtime"}, **limits)


def extent(**limits: Any) -> Any:
    """A field that may grow between two starts of one sweep."""
    return Field(json_schema_extra={"role": "extent"}, **limits)


class Settings(BaseModel):
    """Frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class LatentShape(NamedTuple):
    """What the backbone sees: `channels` maps of `size` x `size`."""

    channels: int
    size: int


# -- images and latents ------------------------------------------------------------------------------------------------


class DigitsSource(Settings):
    """scikit-learn's 1,797 handwritten digits, 8x8, in 10 classes; ships inside the package."""

    kind: Literal["digits"]


class Stored(Settings):
    """Images in storage, local or at any fsspec URL. A declared source is listed once; a new `version` lists it anew."""

    url: str
    version: str | None = None
    """Any word; give another one when images were added, removed or replaced under the same URL."""


class FolderSource(Stored):
    """A folder of class folders (ImageNet's layout); labels are the sorted folder names."""

    kind: Literal["folder"]


class TarSource(Stored):
    """Tar files of images, WebDataset's shards among them: a folder of them, or a single `.tar`."""

    kind: Literal["tar"]
    files: str = "*.tar"
    """Which files of the folder, as a shell pattern."""
    image: str | None = None
    """What an image's name ends in after its key, where a sample has several: `jpg` beside `seg.png`. By default any image."""
    label: Literal["cls", "json", "folder", "tar"] = "cls"
    """Where an image's class stands: `<key>.cls` or `<key>.json` beside it, its folder in the tar, or the tar's own name."""
    json_key: str = "label"
    """The key of the class in `<key>.json`."""


class ParquetSource(Stored):
    """Parquet files with image bytes (Hugging Face's layout): a folder of them, or a single `.parquet`."""

    kind: Literal["parquet"]
    files: str = "*.parquet"
    """Which files of the folder, as a shell pattern: `train-*.parquet` leaves other splits out."""
    image: str = "image"
    """The column of images: bytes, or a struct with a field `bytes`."""
    label: str = "label"
    """The column of classes, integers or names."""


class CsvSource(Stored):
    """A CSV file with a header, a line an image; relative paths count from the file's own folder."""

    kind: Literal["csv"]
    path: str = "path"
    """The column of paths or URLs."""
    label: str = "label"
    """The column of classes, integers or names."""


Source = DigitsSource | FolderSource | TarSource | ParquetSource | CsvSource


class Data(Settings):
    """Labelled images, brought to `resolution` x `resolution` by centre crop and resize."""

    source: Annotated[Source, Field(discriminator="kind")]
    resolution: Count
    num_classes: Count
    undecodable: Literal["refuse", "skip"] = runtime("refuse")
    """What becomes of an empty, damaged or bomb-sized image: an error that names it, or it is skipped, counted and listed."""
    mirror: bool = True
    """Whether training draws the mirror image half of the time."""
    held_out_images: int = Field(0, ge=0)
    """Images that training never sees, drawn by the seed; their loss is measured for each published count."""


class TrainedVae(Settings):
    """A small diffusers AutoencoderKL, trained on the sweep's own images by the prepare stage."""

    kind: Literal["trained"]
    widths: tuple[Count, ...] = (16, 32, 32)
    latent_channels: Count = 4
    steps: Count = 600
    batch_images: Count = 64
    learning_rate: float = 2e-3
    kl_weight: float = Field(1e-2, ge=0)
    """Weight of the KL divergence in nats a pixel value, beside the mean squared error."""


class PretrainedVae(Settings):
    """A ready AutoencoderKL in diffusers' layout: a local folder or a hub id."""

    kind: Literal["pretrained"]
    path: str
    subfolder: str | None = None


class NoVae(Settings):
    """Pixel space: a latent is the image itself, 3 channels in [-1, 1], and decoding changes nothing."""

    kind: Literal["none"]


VaeSettings = TrainedVae | PretrainedVae | NoVae


class Precompute(Settings):
    """Latent shards: how images are grouped (identity) and who encodes them (runtime)."""

    shard_images: Count = 1024
    encode_images: Count = 64
    workers: Count = runtime(1)
    decoders: Count = runtime(4)
    """Threads a worker that read and decode images ahead of the VAE."""


# -- models ------------------------------------------------------------------------------------------------------------


class Dis(Settings):
    """DiS: bidirectional Mamba blocks with long skips (arXiv 2402.05608)."""

    kind: Literal["dis"]
    width: Count
    depth: Annotated[int, Field(ge=2, multiple_of=2)]
    """Blocks beside the middle one: depth / 2 in-blocks, 1 middle block, depth / 2 out-blocks."""
    patch: Count
    state_size: Count = 16
    drop_path: Fraction = 0.1
    init: Literal["ours", "official"] = "ours"
    """`official` keeps the published code's zero bias in the backward direction's dt projection."""
    halve_sum: bool = False
    """Average the two directions instead of summing them (Vim, pull request 90)."""
    conditioning: Literal["tokens", "adaln_zero"] = "tokens"
    zero_final: bool = False


class DiffuSsm(Settings):
    """DiffuSSM: gated bidirectional S4D with hourglass layers (arXiv 2311.18257), as specified in docs/models.md."""

    kind: Literal["diffussm"]
    width: Count
    depth: Count
    state_size: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    hourglass: Count = 2
    bidirectional: bool = True
    tied: bool = False
    init: Literal["lin", "inv", "legs"] = "lin"
    dt_min: float = Field(1e-3, gt=0)
    dt_max: float = Field(1e-1, gt=0)


class Dit(Settings):
    """DiT, the yardstick: attention with adaLN-Zero (arXiv 2212.09748)."""

    kind: Literal["dit"]
    width: Count
    depth: Count
    heads: Count
    patch: Count

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: choose heads that divide it")
        return self


Model = Annotated[Dis | DiffuSsm | Dit, Field(discriminator="kind")]

_PRESETS: dict[str, dict[str, Any]] = {
    "DiS-S": {"kind": "dis", "width": 384, "depth": 24},
    "DiS-S368": {"kind": "dis", "width": 368, "depth": 24},
    "DiS-B": {"kind": "dis", "width": 768, "depth": 24},
    "DiS-M": {"kind": "dis", "width": 768, "depth": 48},
    "DiS-L": {"kind": "dis", "width": 1024, "depth": 48},
    "DiS-H": {"kind": "dis", "width": 1536, "depth": 48},
    "DiT-S": {"kind": "dit", "width": 384, "depth": 12, "heads": 6},
    "DiT-B": {"kind": "dit", "width": 768, "depth": 12, "heads": 12},
    "DiT-L": {"kind": "dit", "width": 1024, "depth": 24, "heads": 16},
    "DiT-XL": {"kind": "dit", "width": 1152, "depth": 28, "heads": 16},
}
PRESETS: dict[str, dict[str, Any]] = {
    f"{name}/{patch}": sizes | {"patch": patch} for name, sizes in _PRESETS.items() for patch in (2, 4, 8)
} | {
    "DiffuSSM-S": {"kind": "diffussm", "width": 384, "depth": 12},
    "DiffuSSM-L": {"kind": "diffussm", "width": 768, "depth": 24},
    "DiffuSSM-XL": {"kind": "diffussm", "width": 1152, "depth": 29},
}
"""Published sizes by name, for example `DiS-S/2`; DiS-S in the paper's width (384) and as S368 in the public code's."""


def preset(name: str) -> dict[str, Any]:
    """The settings of a published size; UserError with the nearest name for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    return dict(PRESETS[name])


# -- diffusion, training, evaluation -----------------------------------------------------------------------------------


class Gaussian(Settings):
    """DDPM: noise prediction with a learned range variance (Nichol and Dhariwal 2021)."""

    kind: Literal["gaussian"]
    betas: Literal["linear", "cosine"] = "linear"
    steps: Count = 1000
    min_snr_gamma: float | None = None
    """Weight the MSE by min(SNR, gamma) / SNR (Hang et al. 2023)."""


class Flow(Settings):
    """Linear path, velocity prediction (SiT, arXiv 2401.08740)."""

    kind: Literal["flow"]
    times: Literal["uniform", "logit_normal"] = "uniform"
    shift: float = Field(1.0, gt=0)
    """Time shift for resolution: t <- shift t / (1 + (shift - 1) t) (Esser et al. 2024)."""


def _count_or_range(value: Any) -> Any:
    if (isinstance(value, int) and value > 0) or re.fullmatch(r"[1-9]\d*\.\.[1-9]\d*", str(value)):
        return value
    raise ValueError(f"got {value!r}, expected: a number of workers, or a range of them such as 2..8")


CHECKPOINTING = re.compile(r"none|block|selective|every_([2-9]|[1-9]\d+)")


def _known_checkpointing(value: Any) -> Any:
    if isinstance(value, str) and CHECKPOINTING.fullmatch(value):
        return value
    raise ValueError(f"got {value!r}, expected: none, block, selective, or every_2, every_3, ...")


Checkpointing = Annotated[str, BeforeValidator(_known_checkpointing)]
Workers = Annotated[int | str, BeforeValidator(_count_or_range)]


class Train(Settings):
    """One training run a model; images seen are the clock."""

    publish_images: tuple[Annotated[int, Field(ge=0)], ...] = extent(min_length=1)
    """Image counts at which EMA weights are published; training ends at the last."""
    batch_images: Count
    lanes: Count
    """Micro-batches that the global batch always splits into; a world size must divide it."""
    workers: Workers = runtime(1)
    """Their number, or a range, `2..8`: each attempt then takes as many as are to be had and divide the lanes."""
    grow_after_s: Annotated[float, Field(gt=0)] = runtime(600.0)
    """An attempt on fewer workers than the range allows goes on for so long before it stops at a resume point to grow."""
    zero_stage: Literal[1, 2, 3] = runtime(1)
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpointing: Checkpointing = runtime("none")
    """Activation checkpointing: `none`, `block`, each second or third (`every_2`, ...), `selective`: models/checkpointing.py."""
    compile: bool = runtime(False)
    """Blocks through torch.compile; scans and convolutions stay as they are and break a block's graph at their borders."""
    scan: str = runtime("auto")
    """Backend of the selective scan by name; `auto` takes the fastest that the device has."""
    learning_rate: float = Field(1e-4, gt=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    warmup_images: int = Field(0, ge=0)
    decay: Literal["none", "linear", "cosine"] = "none"
    decay_from: Fraction = 0.0
    """Share of the training after which the learning rate falls to zero."""
    clip: float = Field(1.0, gt=0)
    ema: Fraction = 0.9999
    """Decay of the exponential moving average of the weights, per step."""
    power_ema: tuple[Width, Width] | None = None
    """Relative widths of two power-function averages to track, too (0.05 and 0.1 are usual); any other is rebuilt from them."""
    label_dropout: Fraction = 0.1
    resume_every_images: Count = runtime(100_000)
    """Distance of resume points, rounded up to whole steps."""
    keep_resume: Count = runtime(2)
    restarts: int = runtime(3, ge=0)
    """Attempts in a row that may be lost without a new resume point, within one job."""
    hang_after_s: Annotated[float, Field(gt=0)] = runtime(900.0)
    """An attempt in which no step ends for so long hangs: its stacks are shown and it is started again."""
    skips_in_a_row: Count = runtime(20)
    """Steps skipped in a row, their gradients not being finite, after which a run stops."""

    @property
    def images(self) -> int:
        """Images seen at the end."""
        return self.publish_images[-1]

    @property
    def micro_images(self) -> int:
        """Images of a micro-batch."""
        return self.batch_images // self.lanes

    @property
    def world_sizes(self) -> list[int]:
        """The numbers of workers that an attempt may have, falling: those that divide the lanes."""
        least, _, most = str(self.workers).partition("..")
        return [n for n in range(int(most or least), int(least) - 1, -1) if self.lanes % n == 0]

    @property
    def most_workers(self) -> int:
        return self.world_sizes[0]

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        if self.batch_images % self.lanes:
            raise ValueError(f"batch_images {self.batch_images} is not a multiple of lanes {self.lanes}")
        if self.compile and self.checkpointing == "selective":
            raise ValueError("compile: selective checkpointing cannot be compiled: choose one of them")
        if not self.world_sizes:
            raise ValueError(
                f"lanes {self.lanes} is not a multiple of workers {self.workers}: the world size must divide the lanes"
            )
        if list(self.publish_images) != sorted(set(self.publish_images)):
            raise ValueError(f"publish_images must rise: got {list(self.publish_images)}")
        for images in self.publish_images:
            if images % self.batch_images:
                raise ValueError(f"publish_images: {images} is not a multiple of batch_images {self.batch_images}")
        return self


class Reader(Settings):
    """How a training worker reads latents: what it keeps in memory, and its node's cache on disk."""

    memory_gib: float | None = runtime(None, ge=0)
    """What the whole set may take of one worker's memory; nothing means half of what is free, shared by the workers.
    A larger set is read by blocks."""
    cache_gib: float = runtime(20.0, ge=0)
    """Disk that each node gives to shards, shared by its workers; 0 for none. Latents on a local path are not cached."""
    cache_folder: str | None = runtime(None)
    """Where; nothing means a folder of the user's own in the system's temporary one."""


class TrainedExtractor(Settings):
    """A small classifier trained on the sweep's own images; its features give `fd_<name>`."""

    kind: Literal["trained"]
    name: str = Field(pattern=r"^[a-z0-9]+$")
    steps: Count = 600


class InceptionExtractor(Settings):
    """Inception-v3 with the 2015 TensorFlow weights, as torch-fidelity ships them; gives FID, sFID and Inception Score."""

    kind: Literal["inception"]
    weights: str | None = runtime(None)
    """Path or URL of weights-inception-2015-12-05-6726825d.pth, or nothing for torch-fidelity's download."""

    @property
    def name(self) -> str:
        return "inception"


class TorchScriptExtractor(Settings):
    """Any TorchScript file: takes uint8 images (B, 3, H, W), and its first output, the features (B, d), gives `fd_<name>`."""

    kind: Literal["torchscript"]
    name: str = Field(pattern=r"^[a-z0-9]+$")
    path: str = runtime(...)
    """Path or URL of the file."""
    size: Count | None = None
    """Pixels a side that it wants; images of another size are resized, antialiased. Nothing: it takes them as they are."""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")


ExtractorSettings = Annotated[TrainedExtractor | InceptionExtractor | TorchScriptExtractor, Field(discriminator="kind")]
Metric = Literal[
    "distance", "sfid", "inception_score", "inception_score_adm", "kid", "precision_recall", "distance_infinity"
]


KID_SUBSET_IMAGES = 1000
"""In a subset of the kernel distance, as torch-fidelity has it."""
FEATURE_DIMENSIONS = {"inception": 2048, "trained": 64}
"""Features of an extractor whose number is known before it is opened."""


Sampler = Literal["ddpm", "ddim", "dpm_solver", "euler", "heun", "euler_maruyama"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,39}$")]
Interval = tuple[float, float]
"""From and to, in the model's times: 0 without noise, 1000 noise alone."""


class Variant(Settings):
    """Another way to draw from the same checkpoints; what is left out is as in the main one."""

    sampler: Sampler | None = None
    steps: Count | None = None
    guidance: float | None = Field(None, ge=0)
    guidance_interval: Interval | None = None
    ema_width: Width | None = None
    precision: Literal["fp32", "bf16"] | None = None


class Evaluate(Settings):
    """What is drawn from each published checkpoint and what it is compared with."""

    samples: Count
    sampler: Sampler
    steps: Count
    guidance: float = Field(1.5, ge=0)
    guidance_interval: Interval | None = None
    """Guide only between these times (Kynkaanniemi et al. 2024); everywhere where nothing is said."""
    ema_width: Width | None = None
    """Draw from the power-function average of this relative width, rebuilt; from the exponential one where nothing is said."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the model while it draws; decoding and features are float32."""
    variants: dict[Name, Variant] = Field(default_factory=dict, json_schema_extra={"role": "extent"})
    """Further ways to draw from each checkpoint, each a metric of its own, `<metric>/<name>`."""
    order: Literal["oldest_first", "newest_first"] = runtime("oldest_first")
    """Which published checkpoint comes first where several wait."""
    extractor: ExtractorSettings
    """Its distance is the main metric."""
    also: tuple[ExtractorSettings, ...] = ()
    """Other extractors, in the same pass over the same images."""
    metrics: tuple[Metric, ...] = Field(("distance",), json_schema_extra={"role": "extent"})
    """What is measured under each extractor; sFID and the Inception Scores under Inception alone."""
    reference: str | None = None
    """An ADM reference `.npz` (path or URL) instead of the source images' statistics."""
    block_images: Count = 250
    """Samples drawn as one unit by one worker, and kept."""
    batch_images: Count = 50
    """Samples drawn, decoded and looked at together, within a block."""
    workers: Count = runtime(1)
    give_up_after_s: Annotated[float, Field(gt=0)] = runtime(86_400.0)
    """Ends with an error when training publishes nothing new for so long."""

    @property
    def extractors(self) -> tuple[ExtractorSettings, ...]:
        """The main one first."""
        return (self.extractor, *self.also)

    @property
    def trained(self) -> TrainedExtractor | None:
        """The extractor that the sweep trains itself, if it has one."""
        return next((extractor for extractor in self.extractors if isinstance(extractor, TrainedExtractor)), None)

    @property
    def metric(self) -> str:
        """The main distance's name."""
        return self.metric_name("fid", self.extractor.name)

    def metric_name(self, stem: str, extractor: str) -> str:
        """The field's term under Inception, with the extractor's name under any other; the number of samples but for 50,000.

        `fid` is Inception and 50,000 samples, `fid_5k` fewer, `fd_digits_1k` and `kid_digits_1k` other features.
        """
        if extractor != "inception":
            ours = {"fid": f"fd_{extractor}", "fid_infinity": f"fd_{extractor}_infinity"}
            stem = ours.get(stem, f"{stem}_{extractor}")
        count = f"{self.samples // 1000}k" if self.samples % 1000 == 0 else str(self.samples)
        return stem if self.samples == 50_000 else f"{stem}_{count}"

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        names = [extractor.name for extractor in self.extractors]
        if len(set(names)) < len(names) or any(
            e.name == "inception" and e.kind != "inception" for e in self.extractors
        ):
            raise ValueError(f"also: extractors need names of their own, other than inception: got {names}")
        if any(e.kind == "trained" and e.name == "judge" for e in self.extractors):
            raise ValueError("extractor: judge is the name of the classifier that judges samples: choose another")
        if sum(extractor.kind == "trained" for extractor in self.extractors) > 1:
            raise ValueError(f"also: one trained extractor at most: got {names}")
        if "distance" not in self.metrics:
            raise ValueError("metrics: distance is always measured: add it to the list")
        if "kid" in self.metrics and self.samples < KID_SUBSET_IMAGES:
            raise ValueError(
                f"metrics: kid draws subsets of {KID_SUBSET_IMAGES:,} images, and samples is {self.samples}"
            )
        only = {"sfid", "inception_score", "inception_score_adm"} & set(self.metrics)
        if only and "inception" not in names:
            raise ValueError(f"metrics: {sorted(only)[0]} needs Inception: add {{kind: inception}} to also")
        if self.reference and set(names) != {"inception"}:
            raise ValueError(f"reference: an ADM file has Inception's statistics alone, and the extractors are {names}")
        for extractor in self.extractors:
            if self.samples <= (d := FEATURE_DIMENSIONS.get(extractor.kind, 0)):
                raise ValueError(
                    f"samples: {self.samples} are too few for the covariance of {d:,} features ({extractor.name}): "
                    f"expected at least {d + 1:,}"
                )
            if "distance_infinity" in self.metrics and self.samples < 5 * d:
                raise ValueError(
                    f"metrics: distance_infinity of {d:,} features ({extractor.name}) needs at least {5 * d:,} samples, "
                    f"got {self.samples:,}"
                )
        return self

    @property
    def drawings(self) -> dict[str, Self]:
        """Each way to draw by its name: the main one, whose name is empty, then the variants."""
        changes = {name: variant.model_dump(exclude_none=True) for name, variant in self.variants.items()}
        return {MAIN: self} | {name: self.model_copy(update=change) for name, change in changes.items()}


class Storage(Settings):
    """Where state lives: a folder or any fsspec URL; latents are shared by the sweeps below one root."""

    root: str = runtime("outputs")


class Tracking(Settings):
    """MLflow's tracking URI; nothing means an SQLite file beside the sweep."""

    uri: str | None = runtime(None)


class Recipe(Settings):
    """A sweep."""

    format: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = runtime("auto")
    grace_s: float = runtime(30.0, gt=0)
    """How long a job has between the wish to stop and its end."""
    storage: Storage = Storage()
    tracking: Tracking = Tracking()
    data: Data
    vae: Annotated[VaeSettings, Field(discriminator="kind")]
    precompute: Precompute = Precompute()
    diffusion: Annotated[Gaussian | Flow, Field(discriminator="kind")]
    models: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")], Model] = extent(min_length=1)
    train: Train
    reader: Reader = Reader()
    evaluate: Evaluate

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        for name, drawing in self.evaluate.drawings.items():
            self._drawing_fits(f"evaluate.variants.{name}" if name else "evaluate", drawing)
        if self.data.source.kind == "digits" and self.data.num_classes != 10:
            raise ValueError(f"data.num_classes: the digits have 10 classes, got {self.data.num_classes}")
        return self

    def _drawing_fits(self, where: str, drawing: Evaluate) -> None:
        flow_sampler = drawing.sampler in ("euler", "heun", "euler_maruyama")
        if flow_sampler != (self.diffusion.kind == "flow"):
            raise ValueError(f"{where}: sampler {drawing.sampler} does not fit the process {self.diffusion.kind}")
        if self.diffusion.kind == "gaussian" and drawing.steps > self.diffusion.steps:
            raise ValueError(f"{where}.steps {drawing.steps} exceeds diffusion.steps {self.diffusion.steps}")
        if (times := drawing.guidance_interval) is not None and not 0 <= times[0] < times[1] <= 1000:
            raise ValueError(f"{where}.guidance_interval: got {list(times)}, expected two rising times from 0 to 1000")
        if drawing.ema_width is not None and self.train.power_ema is None:
            raise ValueError(f"{where}.ema_width needs the averages that train.power_ema tracks, and it names none")


def choose_device(recipe: Recipe, gpus: int) -> tuple[str, str]:
    """(device, reason) on a cluster with so many GPUs: `auto` takes them where there is one for each training worker."""
    workers = recipe.train.world_sizes[-1]
    if recipe.device != "auto":
        return recipe.device, "the recipe names it"
    reason = f"auto: {gpus} GPUs for {workers} workers"
    return ("cuda" if gpus >= workers else "cpu"), reason


# -- reading -----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML reads `1e-4` as a string (YAML 1.1); this one reads it as a number (YAML 1.2)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe at `path` with `a.b=value` overrides; UserError names file, key, what was got and what is expected."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from error
    return parse(text, str(path), overrides)


def parse(text: str, where: str, overrides: list[str] | None = None) -> Recipe:
    """As `load`, from YAML text that came from `where`."""
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a mapping of settings, got {type(data).__name__}")
    for override in overrides or []:
        _set(data, override)
    if data.get("format", FORMAT) not in (FORMAT, FORMAT - 1):
        raise UserError(f"{where}: format {data['format']} of a recipe is not read by this version (it reads {FORMAT})")
    models = data.get("models")
    for name, model in models.items() if isinstance(models, dict) else ():
        if isinstance(model, dict) and "preset" in model:
            data["models"][name] = preset(str(model["preset"])) | {k: v for k, v in model.items() if k != "preset"}
    try:
        return Recipe.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {line}" for line in _lines(error))) from None


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that `parse` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def with_model(recipe: Recipe, name: str, model: Model) -> Recipe:
    """The recipe with one more model; UserError where it cannot have that name."""
    data = recipe.model_dump(mode="json")
    data["models"][name] = model.model_dump(mode="json")
    return parse(yaml.safe_dump(data, sort_keys=False), f"a model named {name}")


def _set(data: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not all(key.split(".")):
        raise UserError(f"--set {override!r}: expected a.b=value, for example --set train.workers=4")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {override!r}: {parent!r} is not a group of settings")
    try:
        data[last] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: not YAML: {' '.join(str(error).split())}") from error


def _lines(error: ValidationError) -> Iterator[str]:
    """One line for each fault: where, what was got, what was expected."""
    for fault in error.errors():
        place = [str(part) for part in fault["loc"]]
        key, got = ".".join(place), repr(fault["input"])[:60]
        if fault["type"] == "extra_forbidden":
            yield f"{key}: unknown key{nearest(place[-1], _keys_beside(place))}"
        elif fault["type"] == "missing":
            yield f"{key}: missing, and there is no default"
        elif fault["type"] == "value_error":
            yield f"{key}: {fault['ctx']['error']}" if key else str(fault["ctx"]["error"])
        else:
            yield f"{key}: got {got}, expected: {fault['msg'].removeprefix('Input should be ')}"


def _keys_beside(place: list[str]) -> set[str]:
    """The known keys where an unknown one stood: follows field names, and union tags, from the recipe down."""
    known: set[type[BaseModel]] = {Recipe}
    for part in place[:-1]:
        inner = {c for cls in known if part in cls.model_fields for c in _classes(cls.model_fields[part].annotation)}
        tagged = {c for c in known if "kind" in c.model_fields and part in repr(c.model_fields["kind"].annotation)}
        known = inner or tagged or known
    return {name for cls in known for name in cls.model_fields}


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _classes(inner)


# -- two recipes under one name ------------------------------------------------------------------------------------------


def identity_differences(stored: Recipe, given: Recipe) -> list[str]:
    """What `given` may not change of the sweep that `stored` began, a line each; empty when it may go on."""
    lines = [f"{key}: stored {old}, given {new}" for key, old, new in _differences(stored, given)]
    lines += _named_differences("models", stored.models, given.models)
    lines += _named_differences("evaluate.variants", stored.evaluate.variants, given.evaluate.variants)
    grown, begun = set(given.train.publish_images), set(stored.train.publish_images)
    if stored.train.decay != "none" and given.train.images != stored.train.images:
        lines.append(
            f"train.publish_images: the {stored.train.decay} decay ends at {stored.train.images}, given {given.train.images}"
        )
    elif max(grown) < max(begun):
        lines.append(f"train.publish_images: stored up to {max(begun)}, given only up to {max(grown)}")
    elif passed := sorted(n for n in grown - begun if n < max(begun)):
        lines.append(
            f"train.publish_images: {passed[0]} lies before {max(begun)}, where training may have been already"
        )
    return sorted(lines)


def _named_differences(where: str, stored: Mapping[str, Settings], given: Mapping[str, Settings]) -> list[str]:
    """Parts that have names may come and go, but not change under a name."""
    return [
        f"{where}.{name}.{key}: stored {old}, given {new}"
        for name in stored.keys() & given.keys()
        for key, old, new in _differences(stored[name], given[name])
    ]


def _differences(stored: Settings, given: Settings, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if type(stored) is not type(given):
        yield prefix.rstrip("."), stored, given
        return
    for name, field in type(stored).model_fields.items():
        old, new = getattr(stored, name), getattr(given, name)
        role = (field.json_schema_extra or {}).get("role") if isinstance(field.json_schema_extra, Mapping) else None
        if isinstance(old, Settings) and isinstance(new, Settings):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif role is None and old != new:
            yield f"{prefix}{name}", old, new
