"""Averages of the weights over training: the exponential one that is published, and power-function ones of any width.

Training tracks a few power-function averages. From their snapshots at the published counts, the average of any other relative
width can be rebuilt after training (Karras et al. 2023, arXiv 2312.02696, section 3). A relative width is the standard deviation
of the averaging profile, divided by the length of training so far. Training counts time in optimizer steps. Profiles depend on
ratios of times only, so they are rebuilt by images, whose count stays continuous if a fork changes the batch. Read next: engine.py,
published.py.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from dis_scale.process.errors import UserError
from dis_scale.process.settings import NARROWEST_EMA, WIDEST_EMA
from dis_scale.recipe import Train

EXPONENTIAL = "ema"


class Snapshot(NamedTuple):
    """A power-function average of relative width `width` after `images` images."""

    images: int
    width: float


def names(settings: Train) -> tuple[str, ...]:
    """Return the names of the averages that training tracks, used for the states and for the published files."""
    return (EXPONENTIAL, *(power_name(width) for width in settings.power_ema or ()))


def power_name(width: float) -> str:
    """Return the name of a power-function average."""
    return f"power-{width:.3f}"


def decays(settings: Train, step: int) -> dict[str, float]:
    """Return the decay of each average at step number `step`, counted from 1 (power functions: equation 127).

    With a ramp, the exponential average's half-life is at most that share of the steps (Karras et al. 2022, arXiv 2206.00364, their
    code's `ema_rampup_ratio`).
    """
    powers = {power_name(width): (1 - 1 / step) ** (exponent(width) + 1) for width in settings.power_ema or ()}
    return {EXPONENTIAL: float(_exponential(settings, np.array(step)))} | powers


def start_share(settings: Train, images_seen: int, since: int = 0) -> float:
    """Return the share that the average at `since` images, at 0 the initial weights, has in the one at `images_seen`."""
    steps = np.arange(since // settings.batch_images + 1, images_seen // settings.batch_images + 1)
    return float(np.exp(np.log(_exponential(settings, steps)).sum()))


def _exponential(settings: Train, steps: np.ndarray) -> np.ndarray:
    """Return the decay of the exponential average at these steps."""
    if settings.ema_ramp is None:
        return np.full(steps.shape, settings.ema)
    return np.minimum(settings.ema, 0.5 ** (1 / (settings.ema_ramp * steps)))


@cache
def exponent(width: float) -> float:
    """Return the power g whose profile t^g has this relative width: w^2 = (g + 1) / ((g + 2)^2 (g + 3)) (Algorithm 2)."""
    if not NARROWEST_EMA <= width <= WIDEST_EMA:
        raise UserError(f"average of width {width}: expected a relative width from {NARROWEST_EMA} to {WIDEST_EMA}")
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots.real.max())


def coefficients(snapshots: Sequence[Snapshot], wanted: Snapshot) -> np.ndarray:
    """Return the snapshots' shares in the average nearest to the wanted one, by least squares (Algorithm 3); float64.

    Unlike in the paper, the shares are constrained to add up to 1, as profiles do (a Lagrange multiplier). Any other sum would
    scale all weights; with few snapshots that harms far more than a slightly wrong profile.
    """
    n = len(snapshots)
    system = np.ones((n + 1, n + 1))
    system[:n, :n], system[n, n] = _grams(snapshots) * wanted.images, 0  # scaled to the size of the ones beside them
    right = np.array([*(_inner(a, wanted) * wanted.images for a in snapshots), 1])
    shares: np.ndarray = np.linalg.lstsq(system, right)[0][:n]
    return shares


def misfit(snapshots: Sequence[Snapshot], wanted: Snapshot) -> float:
    """Return the relative error of the profile rebuilt by `coefficients`: 0 is exact, 1 is as bad as predicting zero."""
    shares = coefficients(snapshots, wanted)
    grams = _grams(snapshots)
    crossed = np.array([_inner(a, wanted) for a in snapshots])
    square = _inner(wanted, wanted) - 2 * shares @ crossed + shares @ grams @ shares
    return float(np.sqrt(max(0.0, square) / _inner(wanted, wanted)))


def _grams(snapshots: Sequence[Snapshot]) -> np.ndarray:
    return np.array([[_inner(a, b) for b in snapshots] for a in snapshots])


def _inner(a: Snapshot, b: Snapshot) -> float:
    """Return the integral of two profiles' product over their common time (equation 151).

    A profile is (g + 1) t^g / T^(g + 1) on [0, T].
    """
    g, h = exponent(a.width), exponent(b.width)
    shared, total = min(a.images, b.images), g + h + 1
    ratio: float = (shared / a.images) ** (g + 1) * (shared / b.images) ** (h + 1)
    return (g + 1) * (h + 1) * ratio / (shared * total)
