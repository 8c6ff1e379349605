"""Settings of a DiffuSSM."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dis_scale.models.settings import FamilySettings
from dis_scale.process.settings import Count


class DiffuSsm(FamilySettings):
    """DiffuSSM: gated bidirectional S4D with hourglass layers (arXiv 2311.18257), as specified in docs/models.md."""

    only_initial: ClassVar[frozenset[str]] = frozenset({"init"})

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
    skip: Literal["none", "concat"] = "none"
    """`concat`: long skips, our reading of UViSSM, which has no code. A block of the last half begins with a product of
    its stream and that of a block of the first half, last in, first out."""
    position: Literal["none", "sine"] = "none"
    """`sine` adds DiT's fixed table, averaged over the positions of a group."""
    init: Literal["lin", "inv", "legs"] = "lin"
    """Initial modes of S4D: S4D-Lin, S4D-Inv or S4D-LegS."""

    @model_validator(mode="after")
    def _table_fits(self) -> Self:
        if self.position == "sine" and self.width % 4:
            raise ValueError(f"position sine needs a width that is a multiple of 4, got {self.width}")
        return self

    def base_width_refusal(self, base_width: int, others: Mapping[str, Self]) -> str | None:
        """The base model must exist."""
        del others
        if self.position == "sine" and base_width % 4:
            return f"position: sine needs widths that are multiples of 4, and base_width is {base_width}: choose another"
        if 2 * base_width % self.hourglass == 0:
            return None
        return f"hourglass {self.hourglass} does not divide twice the base_width {base_width}: choose another"
