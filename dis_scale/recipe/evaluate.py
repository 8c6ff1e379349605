"""Settings of evaluation: how a checkpoint is sampled, and what its samples are compared with."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, ValidationInfo, model_validator

from dis_scale.process.settings import Changes, Count, InferencePrecision, Settings, Width, pin, runtime

MAIN = ""
"""Name of the main sampling settings, next to the variants' names."""
JUDGE = "judge"
"""Name of the classifier that judges samples; independent of every extractor."""
KID_SUBSET_IMAGES = 1000
"""Images in a subset of the kernel distance (torch-fidelity's number)."""
FEATURE_DIMENSIONS = {"inception": 2048, "trained": 64}
"""Features of the extractors whose number is known before they are loaded."""
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Hash of weights-inception-2015-12-05-6726825d.pth, the only Inception weights that are accepted."""
INFINITY_SAMPLES_PER_FEATURE = 5
"""Samples per feature that the extrapolation to endless samples needs."""
GaussianSampler = Literal["ddpm", "ddim", "dpm_solver"]
FlowSampler = Literal["euler", "heun", "euler_maruyama"]
Sampler = Literal[GaussianSampler, FlowSampler]
GAUSSIAN_SAMPLERS, FLOW_SAMPLERS = get_args(GaussianSampler), get_args(FlowSampler)
STOCHASTIC_SAMPLERS = ("ddpm", "euler_maruyama")
"""Samplers that draw noise in each step."""
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,39}$")]
TAKEN, FILES = ("main", "vary"), ("json", "png", "npz")
"""What no variant may be called: the main settings, the folder of ablations, and the ends of names of files beside it."""
Interval = tuple[float, float]
"""From and to, in the model's times: 0 is without noise, 1000 is noise alone."""


class TrainedExtractor(Settings):
    """A small classifier trained on the sweep's own images; its features give `fd_<name>`."""

    kind: Literal["trained"]
    name: str = Field(pattern=r"^[a-z0-9]+$")
    """Word in the metric's name: `fd_<name>`."""
    steps: Count = 600
    """Training steps."""


class InceptionExtractor(Settings):
    """Inception-v3 with the 2015 TensorFlow weights, as in torch-fidelity; gives FID, sFID and Inception Score."""

    kind: Literal["inception"]
    weights: str | None = runtime(None)
    """Path or URL of weights-inception-2015-12-05-6726825d.pth; default: torch-fidelity's download."""

    @property
    def name(self) -> str:
        return "inception"


class ExportedExtractor(Settings):
    """A program of `torch.export`: takes uint8 images (B, 3, H, W); its first output, features (B, d), gives `fd_<name>`."""

    kind: Literal["exported"]
    name: str = Field(pattern=r"^[a-z0-9]+$")
    """Word in the metric's name: `fd_<name>`."""
    path: str = runtime(...)
    """Path or URL of the file, `.pt2`."""
    size: Count | None = None
    """Pixels per side of its input; other images are resized, antialiased. Default: images are not resized."""
    sha256: str | None = pin(pattern=r"^[0-9a-f]{64}$")
    """Hash of the file, checked whenever it is loaded, and required then: the file is a program."""


class NoExtractor(Settings):
    """No distance, as for a few hundred images: checkpoints have samples to look at and their held-out loss, the curve's."""

    kind: Literal["none"]

    @property
    def name(self) -> str:
        return "none"


ExtractorSettings = Annotated[TrainedExtractor | InceptionExtractor | ExportedExtractor, Field(discriminator="kind")]
Metric = Literal[
    "distance", "distance_infinity", "sfid", "inception_score", "inception_score_adm", "kid", "precision_recall", "copy_rate"
]
HELD_OUT = "held_out_loss"
"""Name of the loss on images that training never sees."""
INCEPTION_METRICS = {"sfid", "inception_score", "inception_score_adm"}


class Autoguidance(Settings):
    """Guidance by a worse model of the sweep: a smaller one, or one at an earlier count (Karras et al. 2024, arXiv 2406.02507)."""

    by: str
    """Name of the model that guides."""
    images: Annotated[int, Field(ge=0)]
    """A count at which it is published."""
    scale: float = Field(ge=0)
    """1 is without."""

    def __str__(self) -> str:
        return f"{self.scale:g} by {self.by} at {self.images:,} images"


Guidance = Annotated[
    Annotated[float, Field(ge=0), Tag("number")] | Annotated[Autoguidance, Tag("model")],
    Discriminator(lambda value: "model" if isinstance(value, dict | Autoguidance) else "number"),
]


class Variant(Changes):
    """Other sampling settings for the same checkpoints; what is left out is as in the main ones."""

    sampler: Sampler | None = None
    steps: Count | None = None
    guidance: Guidance | None = None
    guidance_interval: Interval | None = None
    guidance_channels: Literal[3] | None = None
    ema_width: Width | None = None
    precision: InferencePrecision | None = None


class Sampling(Settings):
    """How a sample is made of noise."""

    sampler: Sampler
    """`ddpm`, `ddim`, `dpm_solver` for a Gaussian process; `euler`, `heun`, `euler_maruyama` for a flow."""
    steps: Count
    """Steps of the sampler."""
    guidance: Guidance = 1.0
    """Scale of classifier-free guidance; 1 is without. Other values need classes and `train.label_dropout`. Or the model that
    guides, which needs neither: `{by: dis-s, images: 16000, scale: 2}`."""
    guidance_interval: Interval | None = None
    """Guide only between these times (Kynkaanniemi et al. 2024); default: at all times."""
    guidance_channels: Literal[3] | None = None
    """Guide only the first three channels, as the public code of DiT and DiS does of four; default: all."""

    @property
    def scale(self) -> float:
        """Scale of the guidance, of either kind; 1 is without."""
        return self.guidance.scale if isinstance(self.guidance, Autoguidance) else self.guidance

    @property
    def guide(self) -> Autoguidance | None:
        """The model that guides; None for classifier-free guidance, and at scale 1."""
        return self.guidance if isinstance(self.guidance, Autoguidance) and self.scale != 1 else None

    def __str__(self) -> str:
        text = f"{self.sampler}, {self.steps} steps, guidance {self.guide or f'{self.scale:g}'}"
        if self.scale == 1:
            return text
        text += f" on {self.guidance_channels} channels" if self.guidance_channels else ""
        times = self.guidance_interval
        return text + (f" between times {times[0]:g} and {times[1]:g}" if times else "")


class Evaluate(Sampling):
    """How each published checkpoint is sampled, and what the samples are compared with."""

    samples: Count
    """Images that are sampled from each checkpoint; part of the metric's name unless 50,000."""
    ema_width: Width | None = None
    """Sample from the rebuilt power-function average of this relative width; default: from the exponential average."""
    precision: InferencePrecision = "fp32"
    """Precision of the model's products while it samples; decoding and features are float32."""
    labels: Literal["balanced", "random", "uniform"] = "balanced"
    """Labels of the samples: as frequent as in the training set, in nearly these shares in any range of samples, or independent
    of each other; or independent and all equally likely, as in published results. Independent labels add noise to a distance."""
    variants: dict[Name, Variant] = Field(default_factory=dict, json_schema_extra={"role": "extent"})
    """Further sampling settings for each checkpoint; each gives a metric of its own, `<metric>/<name>`."""
    order: Literal["oldest_first", "newest_first"] = runtime("oldest_first")
    """Which published checkpoint is evaluated first if several wait."""
    extractor: Annotated[TrainedExtractor | InceptionExtractor | ExportedExtractor | NoExtractor, Field(discriminator="kind")]
    """Its distance is the main metric."""
    also: tuple[ExtractorSettings, ...] = ()
    """Other extractors, in the same pass over the same images."""
    metrics: tuple[Metric, ...] = Field(("distance",), json_schema_extra={"role": "extent"})
    """Metrics under each extractor; sFID and the Inception Scores under Inception only."""
    curve: Literal["distance", "distance_infinity"] = runtime("distance")
    """The one of `metrics` under the main extractor that is the curve's."""
    reference: str | None = None
    """An ADM reference `.npz` (path or URL) instead of the source images' statistics under Inception."""
    block_images: Count = 250
    """Samples of a block: the unit of work of one worker, which is kept."""
    batch_images: Count = runtime(50)
    """Samples generated, decoded and measured together, within a block."""
    floor: bool = runtime(True)
    """Measure also as many real images, which the reference then lacks, and the autoencoder's reconstructions of them: the least
    that a model can reach."""
    workers: Count = runtime(1)
    """Most evaluators that work at the same time."""
    gpu_share: Annotated[float, Field(gt=0, lt=1)] | None = runtime(None)
    """Fraction of a GPU's memory for an evaluator beside training, one a GPU, if training leaves it none; default: it waits."""

    @property
    def sampling(self) -> Sampling:
        """The settings of one sample."""
        return Sampling.model_construct(**{name: getattr(self, name) for name in Sampling.model_fields})

    def shared(self, own: int) -> float:
        """Return the fraction of a GPU's memory that an evaluator may take beside training, if `own` have a GPU each."""
        return self.gpu_share if self.gpu_share is not None and self.workers > own else 0.0

    @property
    def extractors(self) -> tuple[ExtractorSettings, ...]:
        """The main extractor, then the others; none without a distance."""
        return () if isinstance(self.extractor, NoExtractor) else (self.extractor, *self.also)

    def reference_of(self, extractor: str) -> str | None:
        """Return the file of the statistics under an extractor; None if they are computed from the source images."""
        return self.reference if extractor == "inception" else None

    @property
    def of_images(self) -> set[str]:
        """Names of the extractors whose statistics are computed from the source images."""
        return {extractor.name for extractor in self.extractors if self.reference_of(extractor.name) is None}

    @property
    def measures_floor(self) -> bool:
        return self.floor and bool(self.extractors)

    @property
    def trained(self) -> TrainedExtractor | None:
        """The extractor that the sweep trains itself, if any."""
        return next((extractor for extractor in self.extractors if isinstance(extractor, TrainedExtractor)), None)

    @property
    def metric(self) -> str:
        """Name of the curve's metric, a distance under the main extractor; without one the held-out loss."""
        if not self.extractors:
            return HELD_OUT
        stem = {"distance": "fid", "distance_infinity": "fid_infinity"}[self.curve]
        return self.metric_name(stem, self.extractor.name)

    def metric_name(self, stem: str, extractor: str) -> str:
        """Return the field's term under Inception, otherwise one with the extractor's name; with the samples unless 50,000.

        `fid` is Inception and 50,000 samples, `fid_5k` fewer, `fd_digits_1k` and `kid_digits_1k` other features.
        """
        if extractor != "inception":
            ours = {"fid": f"fd_{extractor}", "fid_infinity": f"fd_{extractor}_infinity"}
            stem = ours.get(stem, f"{stem}_{extractor}")
        count = f"{self.samples // 1000}k" if self.samples % 1000 == 0 else str(self.samples)
        return stem if self.samples == 50_000 else f"{stem}_{count}"

    @property
    def samplings(self) -> dict[str, Self]:
        """Sampling settings by name: the main ones, whose name is empty, then the variants."""
        return {MAIN: self} | {name: self.model_copy(update=variant.changes) for name, variant in self.variants.items()}

    @model_validator(mode="after")
    def _variants_differ(self, info: ValidationInfo) -> Self:
        if info.context:  # a stored recipe
            return self
        if taken := [name for name in self.variants if name in TAKEN or ("." in name and name.rpartition(".")[2] in FILES)]:
            raise ValueError(f"variants.{taken[0]}: the name is taken by something else of an evaluation: choose another")
        first = dict[tuple[Any, ...], str]()
        unguided = {"guidance": 1.0, "guidance_interval": None, "guidance_channels": None}
        for name, settings in self.samplings.items():
            facts = {field: getattr(settings, field) for field in Variant.model_fields} | (unguided if settings.scale == 1 else {})
            how = tuple(facts.values())
            if (other := first.setdefault(how, name)) != name:
                raise ValueError(f"variants.{name}: it samples as {other or 'the main settings'}, and would cost the same again")
        return self

    @model_validator(mode="after")
    def _extractors_fit(self, info: ValidationInfo) -> Self:
        names = [extractor.name for extractor in self.extractors]
        if len(set(names)) < len(names) or any(e.name == "inception" and e.kind != "inception" for e in self.extractors):
            raise ValueError(f"also: extractors need names of their own, other than inception: got {names}")
        if any(e.kind == "trained" and e.name == JUDGE for e in self.extractors):
            raise ValueError(f"extractor: {JUDGE} is the name of the classifier that judges samples: choose another")
        if not self.extractors and (self.also or self.metrics != ("distance",)):
            raise ValueError("extractor: none measures no distance: leave out also and metrics, or choose an extractor")
        if not self.extractors and self.variants and not info.context:
            raise ValueError("variants: extractor none measures no distance, by which they could differ: leave them out")
        if sum(extractor.kind == "trained" for extractor in self.extractors) > 1:
            raise ValueError(f"also: one trained extractor at most: got {names}")
        return self

    @model_validator(mode="after")
    def _metrics_fit(self) -> Self:
        names = [extractor.name for extractor in self.extractors]
        if "distance" not in self.metrics:
            raise ValueError("metrics: distance is always measured: add it to the list")
        if self.curve not in self.metrics:
            raise ValueError(f"curve: {self.curve} is not measured: add it to metrics")
        only = INCEPTION_METRICS & set(self.metrics)
        if only and "inception" not in names:
            raise ValueError(f"metrics: {sorted(only)[0]} needs Inception: add {{kind: inception}} to also")
        if self.reference and "inception" not in names:
            raise ValueError(f"reference: an ADM file has Inception's statistics only, and the extractors are {names}")
        if "copy_rate" in self.metrics and not self.of_images:
            raise ValueError(
                "metrics: copy_rate compares with the images that are trained on, and reference has others: remove it, or add an "
                "extractor to also"
            )
        return self

    @model_validator(mode="after")
    def _samples_are_enough(self) -> Self:
        if "kid" in self.metrics and self.samples < KID_SUBSET_IMAGES:
            raise ValueError(f"metrics: kid uses subsets of {KID_SUBSET_IMAGES:,} images, and samples is {self.samples}")
        for extractor in self.extractors:
            d = FEATURE_DIMENSIONS.get(extractor.kind, 0)
            if self.samples <= d:
                raise ValueError(
                    f"samples: {self.samples} are too few for the covariance of {d:,} features ({extractor.name}): "
                    f"expected at least {d + 1:,}"
                )
            least = INFINITY_SAMPLES_PER_FEATURE * d
            if "distance_infinity" in self.metrics and self.samples < least:
                raise ValueError(
                    f"metrics: distance_infinity of {d:,} features ({extractor.name}) needs at least {least:,} samples, "
                    f"got {self.samples:,}"
                )
        return self
