"""Settings of a DiS."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dis_scale.models.settings import FamilySettings
from dis_scale.process.settings import Count, Fraction

HEAD_SIZE = 64
"""Most channels of a head of attention."""
LEAST_SSD_HEAD = 16
"""Least channels of a head of `ssd`, whose products have no fewer."""


PUBLISHED: dict[str, Any] = {
    "mixer": "s6",
    "conditioning": "tokens",
    "skip": "concat",
    "directions": 2,
    "position": "learned",
    "order": ("raster",),
    "spectrum": "free",
    "attention_every": None,
}
"""Options of the public code."""
Order = Literal["raster", "column", "zigzag", "sweep8", "zigzag8", "jpeg8", "hilbert"]


class Dis(FamilySettings):
    """DiS: bidirectional Mamba blocks with long skips (arXiv 2402.05608)."""

    only_initial: ClassVar[frozenset[str]] = frozenset({"drop_path", "init"})

    kind: Literal["dis"]
    width: Count
    """Channels of a token."""
    depth: Annotated[int, Field(ge=2, multiple_of=2)]
    """Blocks in addition to the middle one: depth / 2 in-blocks, 1 middle block, depth / 2 out-blocks."""
    patch: Count
    """Pixels of the latent per side of a patch, which is one token."""
    mixer: Literal["s6", "ssd"] = "s6"
    """The selective scan with a decay for each channel and state, or Mamba-2's state-space duality: one for each head, of up to
    64 channels."""
    combine: Literal["sum", "hydra"] = "sum"
    """How `ssd` joins its directions: their sum, each behind a causal convolution of its own; or as Hydra: one convolution around
    a token and one quasi-separable matrix a head, in which a token's weight on itself is free."""
    state_size: Count = 16
    """States of the scan per channel."""
    spectrum: Literal["free", "tied"] = "free"
    """Rates at which a channel's states decay: each its own, or one for all, of which state n has n times as much."""
    drop_path: Fraction = 0.1
    """Probability with which the last block's branch is left out for an image in training; it rises from 0 over the blocks."""
    init: Literal["ours", "official"] = "ours"
    """`official` keeps the published code's zero bias in the backward direction's dt projection."""
    conditioning: Literal["tokens", "adaln_zero", "adaln_zero_alone", "adaln_alone"] = "tokens"
    """Time and class as two tokens; also by norms with shift, scale and gate in each block; by such norms alone, without tokens;
    by norms with shift and scale alone."""
    skip: Literal["concat", "add", "none"] = "concat"
    """How an out-block takes in an in-block's branch: by a product of both, by their sum, or not at all."""
    directions: Literal[1, 2, "alternate"] = 2
    """1: blocks scan from the first token to the last only; with one order, a patch sees label and time but no later patch.
    `alternate`: one direction, but of the patches the other one in every second round of `order`."""
    order: Annotated[tuple[Order, ...], Field(min_length=1, strict=False)] = ("raster",)
    """Orders in which the blocks scan the patches, in turn: `[raster, column]` scans by rows and by columns. `sweep8`, `zigzag8`
    and `jpeg8` are eight each, two from each corner, as in ZigMa and DiMSUM."""
    position: Literal["learned", "none"] = "learned"
    """Learned embeddings of the positions, or none."""

    attention_every: Count | None = None
    """Every so many blocks, the last of them has attention in place of the scans; 1: all have. Default: none."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.attention_every and self.width % 4:
            raise ValueError(f"attention_every needs a width that is a multiple of 4, got {self.width}")
        if self.mixer == "ssd" and self.width % 2:
            raise ValueError(f"mixer ssd needs an even width, got {self.width}")
        if self.mixer == "ssd" and head_size(2 * self.width) < LEAST_SSD_HEAD:
            raise ValueError(
                f"mixer ssd: width {self.width} gives heads of {head_size(2 * self.width)} channels, expected at least "
                f"{LEAST_SSD_HEAD}: choose a multiple of {LEAST_SSD_HEAD // 2}"
            )
        if self.mixer == "s6" and self.combine != "sum":
            raise ValueError(f"combine: {self.combine} is of the mixer ssd, got mixer: s6: set mixer: ssd")
        if self.mixer == "ssd" and self.init == "official":
            raise ValueError("init: official is of the mixer s6, got mixer: ssd: leave it out")
        if self.mixer == "ssd" and self.spectrum == "tied":
            raise ValueError("spectrum: tied is of the mixer s6, whose channels have many rates, got mixer: ssd: leave it out")
        if len(self.order) > 1 and len(set(self.order)) == 1:
            raise ValueError(f"order: {self.order[0]} in each block is [{self.order[0]}]")
        if self.attention_every == 1 and (self.mixer, self.order, self.spectrum, self.directions) != (
            "s6", ("raster",), "free", 2,
        ):  # fmt: skip
            raise ValueError("attention_every: 1 leaves no scan: leave mixer, order, spectrum and directions out")
        return self

    @model_validator(mode="after")
    def _orders_are_all_scanned(self) -> Self:
        scans = self.depth + 1 - (self.depth + 1) // (self.attention_every or self.depth + 2)
        *earlier, last = (8 if order.endswith("8") else 1 for order in self.order)
        if 0 < scans <= sum(earlier):
            raise ValueError(f"order: {scans} blocks scan, and {self.order[-1]} would be that of a later one: name fewer orders")
        paths = sum(earlier) + last
        if self.directions == "alternate" and 0 < scans <= paths:
            raise ValueError(
                f"directions: alternate changes the direction after a round of order, which has {paths} blocks, and {scans} scan: "
                "choose fewer orders or directions: 1"
            )
        return self

    def base_width_refusal(self, base_width: int, others: Mapping[str, Self]) -> str | None:
        """Rates transfer between attentions whose heads have one size, and nobody knows how they do with `ssd`."""
        del others
        if self.mixer == "ssd":
            return "how rates of the mixer ssd follow from a width is not known: give base_width to the other models only"
        if not self._attends:
            return None
        ours, base = head_size(self.width), head_size(base_width) if base_width % 4 == 0 else 0
        if ours != base:
            return f"attention's heads have {ours} channels here and {base} at base_width {base_width}: choose multiples of 64"
        return None

    @property
    def curve(self) -> str:
        """Other mixers, attention, orders and directions: `dis + ssd hydra`, `dis + attention every 4`, `dis + raster column`."""
        options = [f"ssd {self.combine}"] if self.mixer == "ssd" else []
        if self._attends:
            options.append(f"attention every {self.attention_every}")
        options += [" ".join(self.order)] if self.order != PUBLISHED["order"] else []
        options += ["tied"] if self.spectrum == "tied" else []
        options += [f"directions {self.directions}"] if self.directions != 2 else []
        return " + ".join([self.kind, *options])

    @property
    def unpublished(self) -> str | None:
        """Name of the first setting that the public code lacks; None if it has all."""
        own = self.model_dump(include=set(PUBLISHED)) | {"attention_every": self.attention_every if self._attends else None}
        return next((name for name, public in PUBLISHED.items() if own[name] != public), None)

    @property
    def _attends(self) -> bool:
        """Whether a block has attention."""
        return self.attention_every is not None and self.attention_every <= self.depth + 1

    @property
    def ways(self) -> Literal[1, 2]:
        """Scans of a block."""
        return 2 if self.directions == 2 else 1

    def extra_tokens(self, num_classes: int | None) -> int:
        """Return the number of tokens before the patches: label and time."""
        return 0 if self.conditioning.endswith("_alone") else 1 if num_classes is None else 2


def head_size(width: int) -> int:
    """Return the channels of a head of attention: the largest divisor of the width up to 64 with whole pairs for both axes."""
    return max(size for size in range(4, HEAD_SIZE + 1, 4) if width % size == 0)
