"""Settings of the diffusion process, of training and of the latents' reader."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dis_scale.process.settings import CHECKPOINTING, Count, Fraction, Precision, Settings, Width, extent, runtime

Prediction = Literal["velocity", "image", "noise"]


class Gaussian(Settings):
    """DDPM: noise prediction with a learned range variance (Nichol and Dhariwal 2021)."""

    kind: Literal["gaussian"]
    betas: Literal["linear", "cosine"] = "linear"
    """Schedule of the noise."""
    steps: Count = 1000
    """Steps of the process, of which a sampler may use fewer."""

    @property
    def prediction(self) -> Prediction:
        return "noise"


class Flow(Settings):
    """Linear path, by default with velocity prediction (SiT, arXiv 2401.08740)."""

    kind: Literal["flow"]
    times: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the times in training."""
    shift: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """Time shift: t <- shift t / (1 + (shift - 1) t) (Esser et al. 2024). `auto`: the root of the latents' values over 4,096."""
    predicts: Prediction = "velocity"
    """What the network's output is. Of patches with more values than the network has channels only `image` can be learned, with its
    own or velocity's loss (JiT, arXiv 2511.13720)."""
    loss: Prediction = "velocity"
    """What the squared error is of; the output is converted to it, with a divisor of at least 0.05."""

    @property
    def prediction(self) -> Prediction:
        return self.predicts


RANGE = re.compile(r"[1-9]\d*\.\.[1-9]\d*")


def _count_or_range(value: Any) -> Any:
    if (isinstance(value, int) and value > 0) or RANGE.fullmatch(str(value)):
        return value
    raise ValueError(f"got {value!r}, expected: a number of workers, or a range of them such as 2..8")


def _known_checkpointing(value: Any) -> Any:
    if isinstance(value, str) and CHECKPOINTING.fullmatch(value):
        return value
    raise ValueError(f"got {value!r}, expected: none, block, selective, or every_2, every_3, ...")


SCAN_DEVICES = {"native": "cpu", "triton": "cuda", "mamba": "cuda"}
"""The device of each backend of the scan that needs one."""
Checkpointing = Annotated[
    str,
    BeforeValidator(_known_checkpointing, json_schema_input_type=Annotated[str, Field(pattern=rf"^({CHECKPOINTING.pattern})$")]),
]
Workers = Annotated[
    int | str, BeforeValidator(_count_or_range, json_schema_input_type=Count | Annotated[str, Field(pattern=rf"^{RANGE.pattern}$")])
]


ImageCounts = tuple[Annotated[int, Field(ge=0)], ...]


class Cooldowns(Settings):
    """A branch of each model for each of these image counts, whose last share is trained at a falling rate."""

    images: Annotated[tuple[Count, ...], Field(min_length=1)]
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2


class Train(Settings):
    """One training run per model; images seen are the clock. A model may have settings of its own (`ModelTrain`)."""

    publish_images: ImageCounts = extent()
    """Image counts at which EMA weights are published; training ends at the last. Left out only in a study (`isoflop`), which
    computes them."""
    batch_images: Count
    """Images in a step, over all workers; a multiple of the lanes."""
    lanes: Count
    """Parts of equal size that the global batch always splits into; a worker computes one or more of them."""
    micro_images: Count | None = runtime(None)
    """Images in one forward pass, a multiple of a lane's. Default: one lane on a CPU; on a GPU as many as its memory holds."""
    workers: Workers = runtime(1)
    """A number, or a range such as `2..8`: each attempt takes the largest available number. Any number up to `lanes` will do;
    numbers that divide the lanes leave no worker waiting."""
    grow_after_s: Annotated[float, Field(gt=0)] = runtime(600.0)
    """Seconds that an attempt on fewer workers than possible runs before it may stop at a resume point to grow."""
    zero_stage: Literal[1, 2, 3] = runtime(1)
    """DeepSpeed's ZeRO stage: 1 shards the optimizer, 2 also gradients, 3 also weights."""
    precision: Precision = "fp32"
    """`bf16`: products compute in bfloat16. Weights, gradients, norms and the dynamics of the scans stay float32."""
    checkpointing: Checkpointing = runtime("none")
    """Activation checkpointing: `none`, `block`, every second or third block (`every_2`, ...), or `selective`."""
    compile: bool = runtime(False)
    """Run blocks through torch.compile; scans and convolutions stay as they are and break the graph at their borders."""
    graphs: bool = runtime(False)
    """Run each block as two CUDA graphs, where Python sets the pace of a GPU: with 32 images on an H200 models trained 1.4 to 2.3
    times as fast. Takes memory for gradients of the blocks' inputs, outputs and weights. Not for passes that fill the GPU; no
    training on several GPUs has used it yet."""
    scan: Literal["auto", "reference", "native", "triton", "mamba", "chunked"] = runtime("auto")
    """Backend of the selective scan; `auto` takes the fastest of the device."""
    learning_rate: float = Field(1e-4, gt=0)
    """Rate of AdamW after the warm-up."""
    base_width: Count | None = None
    """Width at which the learning rate was found. Rates and initial weights of other widths follow by maximal-update
    parametrisation (models/transfer.py); experimental but for a DiT without `modern`. Default: every width as it is."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = Field(0.0, ge=0)
    """For products and embeddings; the dynamics and convolutions of scans, norms, biases and positions never decay."""
    warmup_images: int = Field(0, ge=0)
    """Images over which the rate rises linearly from zero."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Shape in which the rate falls to zero at the last published count."""
    decay_from: Fraction = 0.0
    """Share of the training after which the learning rate falls to zero."""
    clip: float = Field(1.0, ge=0)
    """Largest norm of a step's gradient, which is scaled down to it; 0 for no limit."""
    ema: Fraction = 0.9999
    """Decay per step of the exponential moving average of the weights."""
    ema_ramp: Annotated[float, Field(gt=0)] | None = 0.05
    """Half-life of that average at most this share of the steps so far (EDM's ramp), so that an early one is not the random
    start; `null` for none, as the papers of DiT and DiS have it."""
    power_ema: tuple[Width, Width] | None = None
    """Relative widths of two power-function averages to track as well (0.05 and 0.1 are usual); others are rebuilt from them."""
    label_dropout: Fraction = 0.1
    """Share of the labels that are replaced by the null label, so that a model can be guided."""
    resume_every_images: Count = runtime(100_000)
    """Images between resume points, rounded up to complete steps."""
    keep_resume: Count = runtime(2)
    """Last resume points that are kept."""
    keep_spaced: int = runtime(4, ge=0)
    """Resume points that are kept besides, evenly spaced over the training, so that a run can be rolled back (`dis-scale fork`)."""
    restarts: int = runtime(3, ge=0)
    """Consecutive attempts within one job that may fail without a new resume point."""
    start_over: bool = runtime(False)
    """Train a run from the beginning although it was further, if none of its resume points can be used any more.
    `dis-scale resume` forgets it."""
    hang_after_s: Annotated[float, Field(gt=0)] = runtime(900.0)
    """Seconds without a finished step after which an attempt counts as hanging: its stacks are logged and it restarts. Its first
    step may take four times as long."""
    skips_in_a_row: Count = runtime(20)
    """Consecutive steps skipped for gradients that are not finite, after which a run stops."""

    @property
    def images(self) -> int:
        """Images seen at the end."""
        return self.publish_images[-1]

    @property
    def lane_images(self) -> int:
        """Images of a lane."""
        return self.batch_images // self.lanes

    @property
    def world_sizes(self) -> list[int]:
        """Numbers of workers that an attempt may have, falling; each worker needs a lane."""
        least, _, most = str(self.workers).partition("..")
        return list(range(min(int(most or least), self.lanes), int(least) - 1, -1))

    @property
    def most_workers(self) -> int:
        return self.world_sizes[0]

    @model_validator(mode="after")
    def _widths_differ(self) -> Self:
        if self.power_ema and len({f"{width:.3f}" for width in self.power_ema}) < 2:  # as files and states are named
            raise ValueError(f"power_ema: {list(self.power_ema)} are one average: expected two that differ by 0.001 or more")
        return self

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        if self.batch_images % self.lanes:
            raise ValueError(f"batch_images {self.batch_images} is not a multiple of lanes {self.lanes}")
        if self.compile and self.checkpointing == "selective":
            raise ValueError("compile: selective checkpointing cannot be compiled: choose one of them")
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile: ZeRO stage 3 gathers weights inside the blocks: set zero_stage to 1 or 2, or compile to false"
            )
        if self.graphs and (self.compile or self.checkpointing != "none" or self.zero_stage == 3):
            raise ValueError(
                "graphs: blocks that are compiled or recomputed, or whose weights ZeRO stage 3 gathers, cannot be captured: set "
                "compile to false, checkpointing to none and zero_stage to 1 or 2, or graphs to false"
            )
        if not self.world_sizes:
            raise ValueError(
                f"workers {self.workers}: expected at most as many as lanes, {self.lanes}: set workers lower or lanes higher, "
                "and the least number first"
            )
        if self.micro_images and self.micro_images % self.lane_images:
            raise ValueError(
                f"micro_images {self.micro_images} is not a multiple of a lane's {self.lane_images} images (batch_images / lanes)"
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
    """Memory per worker for the latents; default: half of what is free, shared by the node's workers.
    A larger set is read in blocks."""
    cache_gib: float = runtime(20.0, ge=0)
    """Disk per node for cached shards, shared by its workers; 0 for none. Latents on a local path are not cached."""
    cache_folder: str | None = runtime(None)
    """Folder of the cache; default: a folder per user in the system's temporary folder."""
