"""Cost of a model: parameters, multiply-adds and activation bytes of one image, counted in a forward pass that computes nothing.

Counting rules: products and convolutions count exactly, attention as its two products, a real FFT of n points as 2.5 n log2 n
FLOPs. The scan and S4D report their own counts (scan/counts.py). One multiply-add is two FLOPs. Norms, activations and sums count
as zero. Read next: counter.py.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dis_scale.models import build, families
from dis_scale.models.checkpointing import recompute_every
from dis_scale.models.counter import CountedPass, Saved
from dis_scale.models.settings import FamilySettings
from dis_scale.models.tokens import Backbone
from dis_scale.process.errors import UserError
from dis_scale.process.settings import LatentShape, Precision

IMAGES = (2, 3)
"""Image counts of the two passes. Not 1: with an axis of length one, some operations return a view instead of a copy."""


@dataclass(frozen=True)
class Part:
    """Multiply-adds of one kind of operation in one forward pass; training needs `passes` times as many.

    The backward pass of a product needs one product for the weights' gradient and one for the input's. The model's input needs
    no gradient (passes 2).
    """

    name: str
    macs: float
    passes: int = 3


@dataclass(frozen=True)
class Kept:
    """Bytes kept for the backward pass, by storage: `image` for each image, `fixed` for each forward pass."""

    outside: Saved
    blocks: list[Saved]
    image: list[int]
    fixed: list[int]
    states: int
    """Bytes of an image in the states of all scans, which are kept in addition if memory allows."""

    def image_bytes(self, checkpointing: str) -> int:
        """Return the bytes of an image at the peak: those kept by the forward pass, and those of one recomputed block."""
        return self._peak(checkpointing, self.image)

    def inputs_bytes(self) -> int:
        """Return the bytes of an image in the inputs of all blocks. An input of several blocks counts for each of them."""
        return sum(self.image[i] for block in self.blocks for i in block.inputs)

    def fixed_bytes(self, checkpointing: str) -> int:
        """Return the bytes at the peak that do not depend on the number of images."""
        return self._peak(checkpointing, self.fixed)

    def left_bytes(self, checkpointing: str) -> int:
        """Return the bytes of an image that remain after the forward pass."""
        return sum(self.image[i] for i in self._left(checkpointing))

    def _left(self, checkpointing: str) -> set[int]:
        """Return the storages that remain after a forward pass: of a recomputed block its inputs, and products if `selective`."""
        left, k = set(self.outside.kept), recompute_every(checkpointing)
        for number, block in enumerate(self.blocks):
            if not k or number % k:
                left |= block.kept
            else:
                left |= block.inputs | (block.products if checkpointing == "selective" else set())
        return left

    def _peak(self, checkpointing: str, sizes: list[int]) -> int:
        left, k = self._left(checkpointing), recompute_every(checkpointing)
        recomputed = self.blocks[::k] if k else []
        more = max((sum(sizes[i] for i in block.kept - left) for block in recomputed), default=0)
        return sum(sizes[i] for i in left) + more


@dataclass(frozen=True)
class Cost:
    """Cost of one image. `gmacs_*` are 10^9 multiply-adds, which the DiT paper calls Gflops."""

    settings: FamilySettings
    shape: LatentShape
    num_classes: int | None
    parameters_by_part: dict[str, int]
    tokens: int
    parts: tuple[Part, ...]
    kept: Kept
    kernel_gmacs: float = 0.0
    """10^9 multiply-adds of S4D's kernels for a micro-batch of any size."""
    thop_gflops: float | None = None
    """Gflops as the DiS paper counts them, or None; see `Family`."""

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(self.parameters_by_part.values())

    @property
    def gmacs_forward(self) -> float:
        """10^9 multiply-adds of one forward pass."""
        return sum(part.macs for part in self.parts) / 1e9

    @property
    def gmacs_training(self) -> float:
        """10^9 multiply-adds of a forward and a backward pass without recomputation."""
        return sum(part.macs * part.passes for part in self.parts) / 1e9

    def training_flops(self, micro_images: int) -> float:
        """Return the FLOPs of an image's forward and backward pass, including its share of the micro-batch's S4D kernels."""
        return 2e9 * (self.gmacs_training + 3 * self.kernel_gmacs / micro_images)

    def activation_bytes(self, checkpointing: str = "none", precision: Precision = "fp32") -> int:
        """Return the bytes that PyTorch's CPU kernels keep for the backward pass of one image; within 10 % on a GPU."""
        return self.kept_in(precision).image_bytes(checkpointing)

    def kept_in(self, precision: Precision) -> Kept:
        """Return the bytes kept for the backward pass in this precision."""
        return self.kept if precision == "fp32" else self._narrow

    @cached_property
    def _narrow(self) -> Kept:
        """Bytes kept in bfloat16, counted at the first access."""
        model = _uninitialised(self.settings, self.shape, self.num_classes)
        model.precision = "bf16"
        return _kept(*(_count(model, images) for images in IMAGES))


def price_model(settings: FamilySettings, shape: LatentShape, num_classes: int | None) -> Cost:
    """Return the cost of one image: the difference of two passes. The remainder is the cost of a pass with any number of images."""
    model = _uninitialised(settings, shape, num_classes)
    less, more = (_count(model, images) for images in IMAGES)
    parameters = _by_part((name, weight.numel()) for name, weight in model.named_parameters())
    counts = {key: (part, more.operations[key].macs - part.macs) for key, part in less.operations.items()}
    return Cost(
        settings, shape, num_classes, parameters, model.tokens,
        tuple(Part(name, macs, part.passes) for (name, _), (part, macs) in counts.items() if macs),
        _kept(less, more),
        kernel_gmacs=sum(part.macs - IMAGES[0] * macs for part, macs in counts.values()) / 1e9,
        thop_gflops=families.find(settings.kind).thop_gflops(settings, shape, num_classes),
    )  # fmt: skip


def _uninitialised(settings: FamilySettings, shape: LatentShape, num_classes: int | None) -> Backbone:
    with _Uninitialised():
        return build(settings, shape, num_classes)


class _Uninitialised(TorchFunctionMode):
    """Mode that skips the in-place functions which set initial weights. The system allocates memory only when it is written."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.__name__.endswith("_") and not function.__name__.endswith("__"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _count(model: Backbone, images: int) -> CountedPass:
    """Count a forward pass of this many images. UserError for an operation that cannot be counted."""
    x_BCHW, t_B = torch.zeros(images, model.shape.channels, model.shape.size, model.shape.size), torch.zeros(images)
    y_B = None if model.num_classes is None else torch.zeros(images, dtype=torch.int64)
    with CountedPass([(_part(name), weight) for name, weight in model.named_parameters()]) as counter:
        try:
            model(x_BCHW, t_B, y_B)
        except UserError as error:
            raise UserError(f"models of kind {model.settings.kind}: {error}") from error
    return counter


def _kept(less: CountedPass, more: CountedPass) -> Kept:
    image = [b - a for a, b in zip(less.bytes, more.bytes, strict=True)]
    fixed = [a - IMAGES[0] * each for a, each in zip(less.bytes, image, strict=True)]
    return Kept(less.outside, less.blocks, image, fixed, more.states - less.states)


def _by_part(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return parameter counts by name, summed over the blocks: `blocks.3.mixer.in_proj` counts under `mixer.in_proj`."""
    parts: dict[str, int] = {}
    for name, count in counts:
        parts[_part(name)] = parts.get(_part(name), 0) + count
    return parts


def _part(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.|\.(weight|bias)$", "", name)
