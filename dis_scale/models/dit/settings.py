"""Settings of a DiT, and its published sizes."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dis_scale.models.settings import FamilySettings
from dis_scale.process.settings import Count

SIZES: dict[str, dict[str, Any]] = {
    "DiT-S": {"width": 384, "depth": 12, "heads": 6},
    "DiT-B": {"width": 768, "depth": 12, "heads": 12},
    "DiT-L": {"width": 1024, "depth": 24, "heads": 16},
    "DiT-XL": {"width": 1152, "depth": 28, "heads": 16},
}
Part = Literal["rms_norm", "qk_norm", "rotary", "swiglu", "no_shift"]
MODERN: tuple[Part, ...] = ("rms_norm", "qk_norm", "rotary", "swiglu", "no_shift")
"""All parts of LightningDiT (arXiv 2501.01423) that DiT lacks."""


class Dit(FamilySettings):
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
    modern: Annotated[tuple[Part, ...], Field(strict=False)] = ()
    """Parts of later models, as in LightningDiT: `rms_norm` with weights, `qk_norm` of queries and keys, `rotary` positions of rows
    and columns besides the table, `swiglu` in the MLP, and blocks with `no_shift`."""

    @field_validator("modern")
    @classmethod
    def _in_one_order(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """Sort the parts: their order changes nothing."""
        return tuple(sorted(parts, key=MODERN.index))

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: choose heads that divide it")
        if self.width % 4:
            raise ValueError(f"DiT's table of positions needs a width that is a multiple of 4, got {self.width}")
        if "rotary" in self.modern and self.head_size % 4:
            raise ValueError(f"rotary needs heads whose size is a multiple of 4, got {self.head_size}: choose other heads")
        if len(set(self.modern)) < len(self.modern):
            raise ValueError(f"modern names a part twice: {', '.join(self.modern)}")
        return self

    @property
    def curve(self) -> str:
        """`dit + modern` with all parts, else with the parts' names."""
        parts = "modern" if self.modern == MODERN else " ".join(self.modern)
        return " + ".join([self.kind, parts] if parts else [self.kind])

    @property
    def transfers(self) -> bool:
        return not self.modern

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def heads_in_file(self) -> int:
        return published_heads(self.width) or self.heads

    def at_width(self, width: int) -> Self:
        """With heads of the same size."""
        return self.model_copy(update={"width": width, "heads": self.heads * width // self.width})

    def base_width_refusal(self, base_width: int, others: Mapping[str, Self]) -> str | None:
        """The base model must exist; and rates transfer between attentions whose heads have one size (arXiv 2505.15270)."""
        size = self.head_size
        if base_width % size:
            return f"heads of size {size} do not divide base_width {base_width}: choose heads or a base_width that fit"
        unlike = next(((name, other.head_size) for name, other in others.items() if other.head_size != size), None)
        return unlike and (
            f"heads of size {size}, and {unlike[0]} of the same base_width has {unlike[1]}: rates transfer only if the heads "
            "of all models have one size: choose heads that are proportional to the width"
        )


def published_heads(width: int) -> int | None:
    """Return the heads of the published DiT of this width; None if no such model was published."""
    return next((sizes["heads"] for sizes in SIZES.values() if sizes["width"] == width), None)
