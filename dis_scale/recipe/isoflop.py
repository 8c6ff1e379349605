"""Settings of a study of compute budgets; planning/isoflop.py, which knows what a model costs, computes its image counts."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dis_scale.process.settings import Count, Settings, extent, runtime


class Isoflop(Settings):
    """Compute budgets at which model sizes are compared (IsoFLOP profiles: Hoffmann et al. 2022, approach 2).

    The sizes are the models without `publish_images`. Each is trained once, at a constant rate; a cooldown branch ends at
    each budget. Their `warmup_images` follow from the study's `warmup`.
    """

    flops: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = extent()
    """Operations of one training, two for each multiply-add, rising. Larger budgets may be added."""
    share: float = Field(0.2, gt=0, lt=1)
    """Share of a training's images at the falling rate."""
    warmup: float = Field(0.05, ge=0, le=0.1)
    """Share of a size's smallest training for which the rate rises: a longer one handicaps large sizes at small budgets, and
    bends the law (Porian et al. 2024, arXiv 2406.19146)."""
    least_steps: Count = 100
    """A size with fewer steps at a budget is left out there."""
    most_images: Count | None = None
    """A size with more images at a budget is left out there: its epochs would be too many, or its training too long."""
    hold_out: Literal["largest", "none"] = runtime("largest")
    """`largest`: the report also fits the law of all runs without the largest budget, and says first by how much it misses that
    budget's lowest loss."""

    @model_validator(mode="after")
    def _flops_rise(self) -> Self:
        if list(self.flops) != sorted(set(self.flops)):
            raise ValueError(f"flops must rise: got {list(self.flops)}")
        if self.warmup >= 1 - self.share:
            raise ValueError(f"warmup {self.warmup:g} leaves nothing at the constant rate beside share {self.share:g}")
        return self
