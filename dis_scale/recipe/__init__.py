"""The recipe: a sweep as frozen, typed data, checked across its parts before anything is spent.

One class per part, in the file of its subject: data, models, train, evaluate. A field belongs to the sweep's *identity* (may not
change under one name) unless it is marked *extent* (may grow) or *runtime* (may change freely). No heavy import: reading a recipe
is cheap. Read next: reading.py (YAML and `--set`), identity.py, configs/digits.yaml.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from dis_scale.process.errors import nearest
from dis_scale.process.settings import FORMAT, LatentShape, Precision, Settings, extent, runtime
from dis_scale.recipe.data import (
    CsvSource,
    Data,
    DigitsSource,
    ExportedVae,
    Files,
    FolderSource,
    LatentsSource,
    Normalise,
    NoVae,
    ParquetSource,
    Precompute,
    PretrainedVae,
    SourceSettings,
    TarSource,
    TrainedVae,
    VaeSettings,
)
from dis_scale.recipe.evaluate import (
    FLOW_SAMPLERS,
    MAIN,
    Autoguidance,
    Evaluate,
    ExportedExtractor,
    ExtractorSettings,
    Guidance,
    InceptionExtractor,
    Sampling,
    TrainedExtractor,
    Variant,
)
from dis_scale.recipe.isoflop import Isoflop
from dis_scale.recipe.models import AnyModel, Branch, FileStart, Model, ModelTrain, SweepStart
from dis_scale.recipe.train import SCAN_DEVICES, Flow, Gaussian, Reader, Train

__all__ = [
    "MAIN", "MODEL_NAME_CHARACTERS", "Branch", "CsvSource", "Data", "DigitsSource", "Evaluate", "ExportedExtractor",
    "ExportedVae", "ExtractorSettings", "FileStart", "Files", "Flow", "FolderSource", "Gaussian", "InceptionExtractor", "Isoflop",
    "LatentShape", "LatentsSource", "Model", "ModelTrain", "NoVae", "Normalise", "ParquetSource", "Precision", "Precompute",
    "PretrainedVae", "Reader", "Recipe", "Sampling", "SourceSettings", "SweepStart", "TarSource", "Train",
    "TrainedExtractor", "TrainedVae", "VaeSettings", "Variant",
]  # fmt: skip

MODEL_NAME_CHARACTERS = 40
"""Most characters of a model's name, which is part of job ids and of folders."""


class Storage(Settings):
    """Location of all state: a folder or any fsspec URL; sweeps below one root share latents."""

    root: str = runtime("outputs")
    """Local folder, or URL of a folder that all nodes reach."""


class Tracking(Settings):
    """MLflow's tracking URI; default: an SQLite file next to the sweeps. And copies of the rows for other programs."""

    uri: str | None = runtime(None)
    """`sqlite:///...` or `http://...`, without a password."""
    also: tuple[Literal["tensorboard", "wandb"], ...] = runtime(())
    """Copies of all rows, written by the sweep's command on its machine; each needs the extra of its name."""

    @field_validator("uri")
    @classmethod
    def _is_a_uri(cls, uri: str | None, info: ValidationInfo) -> str | None:
        if uri is not None and "://" not in uri and uri != "databricks" and not info.context:
            raise ValueError(f"got {uri!r}, expected sqlite:///FILE or http://HOST:PORT, or null for a file beside the sweeps")
        return uri


class Recipe(Settings):
    """A sweep."""

    format: Literal[1] = FORMAT
    """Version of the recipe."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    """Name of the sweep and of its folder: small letters, digits and hyphens, at most 40."""
    seed: int = Field(0, ge=0)
    """Seed of all random numbers; a model may have its own."""
    device: Literal["auto", "cpu", "cuda"] = runtime("auto")
    """`auto` takes GPUs if there is one for each worker of the smallest world size."""
    grace_s: float = runtime(30.0, gt=0)
    """Seconds between a stop request and the end of a job."""
    storage: Storage = Storage()
    tracking: Tracking = Tracking()
    data: Data
    vae: Annotated[VaeSettings, Field(discriminator="kind")]
    """Autoencoder between images and latents."""
    precompute: Precompute = Precompute()
    diffusion: Annotated[Gaussian | Flow, Field(discriminator="kind")]
    """Process that the models learn to reverse."""
    models: dict[Annotated[str, Field(pattern=rf"^[a-z0-9][a-z0-9-]{{0,{MODEL_NAME_CHARACTERS - 1}}}$")], AnyModel] = extent(
        min_length=1
    )
    """Models by name, of one kind or several, trained and evaluated alike."""
    isoflop: Isoflop | None = Field(None, json_schema_extra={"role": "extent"})
    train: Train
    reader: Reader = Reader()
    evaluate: Evaluate

    def train_of(self, model: str) -> Train:
        """Return the training settings of a model: the recipe's, with those of its own."""
        return self.train.model_copy(update=self.models[model].train.changes)

    def seed_of(self, model: str) -> int:
        """Return the seed of a model's training: the recipe's, or one of its own."""
        own = self.models[model].seed
        return self.seed if own is None else own

    @property
    def uncounted(self) -> list[str]:
        """Names of the models without image counts, which are the sizes of a study that is not yet written out."""
        return [name for name in self.models if not self.train_of(name).publish_images]

    @property
    def budgets(self) -> dict[str, float]:
        """Budget of each branch that a study has written out."""
        branches = {name: model.branch for name, model in self.models.items() if model.branch}
        return {name: branch.budget for name, branch in branches.items() if branch.budget is not None}

    def for_model(self, model: str) -> Self:
        """Return the recipe with the training settings of this model."""
        return self.model_copy(update={"train": self.train_of(model)})

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        for name in self.models:
            self._training_fits(name)
        if self.data.source.kind == "digits" and self.data.num_classes not in (10, None):
            raise ValueError(f"data.num_classes: the digits have 10 classes, got {self.data.num_classes}")
        if self.data.num_classes is None and self.evaluate.trained:
            raise ValueError(
                f"evaluate: extractor {self.evaluate.trained.name} is a classifier that the sweep trains, and data.num_classes is "
                "none: expected kind inception or exported"
            )
        if not (self.evaluate.extractors or self.data.held_out_images):
            raise ValueError(
                "evaluate.extractor: none, so the curve is of the held-out loss: set data.held_out_images, and "
                "precompute.shard_images to at most as many"
            )
        for name, settings in self.evaluate.samplings.items():
            self._sampling_fits(f"evaluate.variants.{name}" if name else "evaluate", settings)
        if self.device != "auto":
            self.require_scan_on(self.device)
        return self

    @model_validator(mode="after")
    def _latents_have_no_images(self) -> Self:
        if not self.data.given:
            return self
        if self.vae.kind not in ("pretrained", "exported"):
            raise ValueError(
                f"vae.kind: got {self.vae.kind}, expected pretrained or exported: the autoencoder that made the latents"
            )
        if names := sorted(self.evaluate.of_images):
            raise ValueError(
                f"evaluate.extractor: {names[0]} needs images, and latents have none: only Inception, with the .npz of ADM's as "
                "evaluate.reference"
            )
        if self.evaluate.measures_floor:
            raise ValueError("evaluate.floor: latents have no images to measure it with: set it to false")
        return self

    def _training_fits(self, model: str) -> None:
        try:
            Train.model_validate(self.train_of(model).model_dump())
        except ValidationError as error:
            raise ValueError(f"models.{model}.train: {error.errors()[0]['ctx']['error']}") from error
        self._base_width_fits(model)
        if model in self.uncounted:
            self._size_fits(model)
        if branch := self.models[model].branch:
            self._branch_fits(model, branch)

    def _base_width_fits(self, model: str) -> None:
        """Rates must be able to follow from the base width."""
        own, base = self.models[model], self.train_of(model).base_width
        if base is None:
            return
        others = {
            name: other for name, other in self.models.items() if other.kind == own.kind and self.train_of(name).base_width == base
        }
        if refusal := own.base_width_refusal(base, others):
            raise ValueError(f"models.{model}: {refusal}")

    def _size_fits(self, model: str) -> None:
        if self.isoflop is None or self.models[model].branch:
            raise ValueError(f"models.{model}.train.publish_images: none, expected image counts, or budgets (`isoflop`)")
        if (decay := self.train_of(model).decay) != "none":
            raise ValueError(
                f"models.{model}: train.decay is {decay}, expected none: a size of a study (`isoflop`) is trained at a constant "
                "rate, and its cooldowns decay"
            )

    def _branch_fits(self, model: str, branch: Branch) -> None:
        where, trunk = f"models.{model}.branch", self.models.get(branch.of)
        if self.models[model].start:
            raise ValueError(f"{where}: a branch begins with its trunk's weights: leave out models.{model}.start")
        if trunk is None or trunk.branch or branch.of in self.uncounted:
            raise ValueError(
                f"{where}.of: got {branch.of!r}, expected a model of this recipe with image counts that is not a branch"
            )
        if self.models[model].sizes != trunk.sizes:
            raise ValueError(f"{where}.of: {branch.of} has other sizes: expected the same, apart from train and seed")
        its, own = self.train_of(branch.of), self.train_of(model)
        last = min(its.images, own.publish_images[0] - 1)
        if branch.at > last or branch.at % its.batch_images or branch.at % own.batch_images:
            raise ValueError(
                f"{where}.at: got {branch.at}, expected a multiple of batch_images up to {last}, which is before the first "
                "published count"
            )

    def seed_groups(self) -> dict[str, str]:
        """Return, for each model, the first of those that differ from it in their seeds alone, those of their trunks included.

        A fork that has the seed of an earlier model is a model of its own, and so is a further branch of the same trunk: they share
        its first part.
        """
        firsts, taken, groups = dict[Any, str](), set[Any](), dict[str, str]()
        for model in self.models:
            branch = self.models[model].branch
            alike, seed = self._without_seed(model), self.seed_of(branch.of if branch else model)
            groups[model] = model if (alike, seed) in taken else firsts.setdefault(alike, model)
            taken.add((alike, seed))
        return groups

    def _without_seed(self, model: str) -> tuple[Any, ...]:
        own = self.models[model]
        trunk = self._without_seed(own.branch.of) if own.branch else ()
        return str(own.sizes), own.train, own.start, own.branch and own.branch.at, trunk

    def start_of(self, model: str) -> FileStart | SweepStart | None:
        """Return the weights with which the training of a model, or of its trunk, began; None for random ones."""
        branch = self.models[model].branch
        return self.models[branch.of if branch else model].start

    def branches_at(self, model: str) -> set[int]:
        """Return the image counts at which other models leave the training of this one."""
        return {each.branch.at for each in self.models.values() if each.branch and each.branch.of == model}

    def require_scan_on(self, device: str) -> None:
        """ValueError if the backend of the scan does not run on this device."""
        if SCAN_DEVICES.get(self.train.scan, device) != device:
            raise ValueError(f"train.scan {self.train.scan} does not run on {device}: set train.scan to auto, or another device")

    def guidance_refusal(self, guidance: Guidance) -> str | None:
        """Return why the models cannot be guided so; None if they can."""
        if isinstance(guidance, Autoguidance):
            return self._guide_refusal(guidance)
        scale = guidance
        if scale == 1 or (self.data.num_classes is not None and self.train.label_dropout > 0):
            return None
        if self.data.num_classes is None:
            return f"got {scale:g}, expected 1: data.num_classes is none: guidance needs labels or a model that guides: set it to 1"
        return (
            f"got {scale:g}, expected 1: train.label_dropout is 0, so no model learns to do without labels: set it to 1, or "
            "train.label_dropout to 0.1"
        )

    def _guide_refusal(self, guide: Autoguidance) -> str | None:
        if guide.by not in self.models:
            if self.uncounted:
                return None  # maybe a branch of a study, which is checked when they are written out
            return f"no model {guide.by!r}{nearest(guide.by, self.models)}: expected one of {', '.join(self.models)}"
        if not (counts := self.train_of(guide.by).publish_images):
            return f"{guide.by} is a size of a study and publishes nothing: expected one of its branches"
        if guide.images not in counts:
            return f"{guide.by} is not published at {guide.images:,} images: expected {' or '.join(f'{n:,}' for n in counts)}"
        return None

    def _sampling_fits(self, where: str, settings: Evaluate) -> None:
        if (settings.sampler in FLOW_SAMPLERS) != (self.diffusion.kind == "flow"):
            raise ValueError(f"{where}: sampler {settings.sampler} does not fit the process {self.diffusion.kind}")
        if self.diffusion.kind == "gaussian" and settings.steps > self.diffusion.steps:
            raise ValueError(f"{where}.steps {settings.steps} exceeds diffusion.steps {self.diffusion.steps}")
        if refusal := self.guidance_refusal(settings.guidance):
            raise ValueError(f"{where}.guidance: {refusal}")
        if (times := settings.guidance_interval) is not None and not 0 <= times[0] < times[1] <= 1000:
            raise ValueError(f"{where}.guidance_interval: got {list(times)}, expected two rising times from 0 to 1000")
        if settings.ema_width is not None and self.train.power_ema is None:
            raise ValueError(f"{where}.ema_width needs power-function averages, and train.power_ema tracks none")
