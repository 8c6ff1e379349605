"""Settings of the three backbones, and the training settings that a model may have of its own."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_serializer, model_validator

from dis_scale.recipe.settings import Count, Fraction, Precision, Settings, runtime
from dis_scale.recipe.train import ImageCounts, Rates


class ModelTrain(Settings):
    """Training settings of one model; what is left out is as in the recipe's `train`."""

    publish_images: Annotated[ImageCounts, Field(min_length=1)] | None = Field(
        None, json_schema_extra={"role": "extent"}
    )
    batch_images: Count | None = None
    """A multiple of the recipe's lanes."""
    learning_rate: float | None = Field(None, gt=0)
    rates: Rates | None = None
    base_width: Count | None = None
    weight_decay: float | None = Field(None, ge=0)
    warmup_images: int | None = Field(None, ge=0)
    decay: Literal["none", "linear", "cosine"] | None = None
    decay_from: Fraction | None = None
    clip: float | None = Field(None, ge=0)
    ema: Fraction | None = None
    precision: Precision | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the recipe's `train`."""
        return {name: value for name, value in self if value is not None}

    @model_serializer
    def _without_what_is_left_out(self) -> dict[str, Any]:
        return self.changes


class Branch(Settings):
    """Where a model's training leaves that of another model of the same sizes, to go on with settings of its own."""

    of: str
    """Name of the other model, the trunk."""
    at: Count
    """Images seen, of which the trunk keeps a resume point."""
    budget: float | None = None
    """Compute budget of a study (`isoflop`) that the branch ends at; written out by it."""


class FileStart(Settings):
    """Weights from a file: a public `.pt` of DiT, SiT or DiS, or a `.safetensors` of ours."""

    kind: Literal["file"]
    path: str = runtime(...)
    """Path or URL of the file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the file, checked when it is read."""

    @property
    def words(self) -> str:
        return self.path


class SweepStart(Settings):
    """Averaged weights that a model of another sweep has published."""

    kind: Literal["sweep"]
    url: str
    """Folder of the sweep, below any storage root."""
    model: str
    """Name of the model there."""
    images: int = Field(ge=0)
    """Published image count."""

    @property
    def words(self) -> str:
        return f"{self.model} at {self.images:,} images of {self.url}"


class BackboneSettings(Settings):
    """What each model has."""

    train: ModelTrain = ModelTrain()
    """Training settings of this model, where they differ from the recipe's."""
    seed: int | None = Field(None, ge=0)
    """Seed of the initial weights and of all that training draws, the order of images included; default: the recipe's.
    `seeds: 3` is short for three models: this one, and `<name>-seed-1` and `<name>-seed-2` with the next seeds."""
    branch: Branch | None = None
    """The training begins at another model's resume point instead of at random weights."""
    start: Annotated[FileStart | SweepStart, Field(discriminator="kind")] | None = None
    """The training begins at 0 images with these weights, and with new moments, instead of at random weights."""

    @property
    def sizes(self) -> dict[str, Any]:
        """What the network is, apart from its training."""
        return self.model_dump(exclude={"train", "seed", "branch", "start"})


class Dis(BackboneSettings):
    """DiS: bidirectional Mamba blocks with long skips (arXiv 2402.05608)."""

    kind: Literal["dis"]
    width: Count
    """Channels of a token."""
    depth: Annotated[int, Field(ge=2, multiple_of=2)]
    """Blocks in addition to the middle one: depth / 2 in-blocks, 1 middle block, depth / 2 out-blocks."""
    patch: Count
    """Pixels of the latent per side of a patch, which is one token."""
    state_size: Count = 16
    """States of the scan per channel."""
    drop_path: Fraction = 0.1
    """Probability with which the last block's branch is left out for an image in training; it rises from 0 over the blocks."""
    init: Literal["ours", "official"] = "ours"
    """`official` keeps the published code's zero bias in the backward direction's dt projection."""
    halve_sum: bool = False
    """Average the two directions instead of summing them (Vim, pull request 90)."""
    conditioning: Literal["tokens", "adaln_zero", "adaln_zero_alone"] = "tokens"
    """Time and class as two tokens; also by norms with shift, scale and gate in each block; by such norms alone, without tokens."""
    skip: Literal["concat", "add", "none"] = "concat"
    """How an out-block takes in an in-block's branch: by a product of both, by their sum, or not at all."""
    directions: Literal[1, 2] = 2
    """1: blocks scan from the first token to the last only, which sees label and time but no later patch."""
    position: Literal["learned", "none"] = "learned"
    """Learned embeddings of the positions, or none."""
    zero_final: bool = False
    """Start the last product at zero."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.halve_sum and self.directions == 1:
            raise ValueError("halve_sum averages two directions, and directions is 1: leave out one of them")
        return self


class DiffuSsm(BackboneSettings):
    """DiffuSSM: gated bidirectional S4D with hourglass layers (arXiv 2311.18257), as specified in docs/models.md."""

    kind: Literal["diffussm"]
    width: Count
    """Channels of a token."""
    depth: Count
    """Number of blocks."""
    patch: Count = 1
    """Pixels of the latent per side of a patch, which then is one position; 1 as in the paper, whose point is to need none."""
    state_size: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Real states per channel, in pairs."""
    hourglass: Count = 2
    """Positions in a group: all layers but the scans work on groups."""
    bidirectional: bool = True
    """Scan in both directions; otherwise from the first token to the last."""
    tied: bool = False
    """Share one set of S4D's parameters between the directions."""
    position: Literal["none", "sine"] = "none"
    """`sine` adds DiT's fixed table, averaged over the positions of a group."""
    init: Literal["lin", "inv", "legs"] = "lin"
    """Initial modes of S4D: S4D-Lin, S4D-Inv or S4D-LegS."""
    dt_min: float = Field(1e-3, gt=0)
    """Least initial time step."""
    dt_max: float = Field(1e-1, gt=0)
    """Largest initial time step."""

    @model_validator(mode="after")
    def _table_fits(self) -> Self:
        if self.position == "sine" and self.width % 4:
            raise ValueError(f"position sine needs a width that is a multiple of 4, got {self.width}")
        return self

    @model_validator(mode="after")
    def _time_steps_rise(self) -> Self:
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min:g} is above dt_max {self.dt_max:g}: exchange them")
        return self


class Dit(BackboneSettings):
    """DiT, the baseline: attention with adaLN-Zero (arXiv 2212.09748)."""

    kind: Literal["dit"]
    width: Count
    """Channels of a token."""
    depth: Count
    """Number of blocks."""
    heads: Count
    """Heads of the attention."""
    patch: Count
    """Pixels of the latent per side of a patch, which is one token."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: choose heads that divide it")
        if self.width % 4:
            raise ValueError(f"DiT's table of positions needs a width that is a multiple of 4, got {self.width}")
        return self

    @property
    def head_size(self) -> int:
        return self.width // self.heads


Model = Annotated[Dis | DiffuSsm | Dit, Field(discriminator="kind")]
