"""The built-in families' costs by formulas, which the counts of models/cost.py are compared with.

Symbols: L tokens, T patches, D width, E = 2D, N states, R rank of the time step, C channels, P = C p^2.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dis_scale.models.checkpointing import recompute_every
from dis_scale.models.cost import Part
from dis_scale.models.diffussm.s4d import CHUNK
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.dis.network import TAPS, inner_width, step_rank
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dit.settings import Dit
from dis_scale.models.tokens import FREQUENCIES
from dis_scale.process.settings import LatentShape, Precision
from dis_scale.scan.backend import NATIVE_CHUNK

DISCRETISED = 39
"""Float32 numbers that autograd keeps of a mode's discretisation (S4D.discrete), counted."""
SCAN_MACS = 4.5
"""Multiply-adds per channel, state, token and direction: 9 FLOPs."""


@dataclass(frozen=True)
class Kept:
    """Activation elements kept for the backward pass, per image.

    `block`: all of one block. `boundary`: a block's inputs. `products`: its expensive products. `skips`: all long skips.
    `ends`: everything outside of the blocks. `wide`, `wide_boundary`: those of a block and of its boundary that stay float32
    under bf16: the stream, and what the scans and convolutions compute in float32.
    """

    blocks: int
    block: int
    boundary: int
    products: int
    skips: int
    ends: int
    wide: int = 0
    wide_boundary: int = 0
    kernel_bytes: int = 0
    """Of a block, once per forward pass: DiffuSSM's kernels, in complex numbers of two float32."""

    def by_part(self, checkpointing: str) -> dict[str, int]:
        """Elements at the peak, by part. With checkpointing: all of one block, and the boundaries of the others.

        The skips of recomputed blocks are boundaries. Selective checkpointing also keeps the products of these blocks.
        """
        recomputed = self._recomputed(checkpointing)
        return {
            "blocks": (self.blocks - recomputed) * self.block,
            "skips": self.skips * (self.blocks - recomputed) // self.blocks,
            "boundaries": recomputed * self.boundary,
            "products": recomputed * self.products if checkpointing == "selective" else 0,
            "one block": self.block if recomputed else 0,
            "ends": self.ends,
        }

    def _recomputed(self, checkpointing: str) -> int:
        """Number of recomputed blocks."""
        k = recompute_every(checkpointing)
        return len(range(0, self.blocks, k)) if k else 0

    def _complete(self, checkpointing: str) -> int:
        """Number of blocks that are in memory with all that they keep."""
        recomputed = self._recomputed(checkpointing)
        return self.blocks - recomputed + (1 if recomputed else 0)

    def wide_elements(self, checkpointing: str) -> int:
        """Elements of `by_part` that stay float32 under bf16."""
        return self._complete(checkpointing) * self.wide + self._recomputed(checkpointing) * self.wide_boundary

    def fixed_bytes(self, checkpointing: str) -> int:
        """Bytes that do not depend on the images of a forward pass."""
        return self._complete(checkpointing) * self.kernel_bytes


@dataclass(frozen=True)
class Cost:
    """Cost of one image. `gmacs_*` are 10^9 multiply-adds, which the DiT paper calls Gflops."""

    tokens: int
    parts: tuple[Part, ...]
    kept: "Kept"
    kernel_gmacs: float = 0.0
    """Work per micro-batch, independent of its size: DiffuSSM's kernels."""

    @property
    def gmacs_forward(self) -> float:
        """10^9 multiply-adds of one forward pass."""
        return sum(part.macs for part in self.parts) / 1e9

    @property
    def gmacs_training(self) -> float:
        """10^9 multiply-adds of a forward and a backward pass without recomputation."""
        return sum(part.macs * part.passes for part in self.parts) / 1e9

    def activation_bytes(self, checkpointing: str = "none", precision: Precision = "fp32") -> int:
        """Bytes kept for the backward pass of one image: within 5 % on the CPU in fp32, within 10 % on a GPU."""
        elements = sum(self.kept.by_part(checkpointing).values())
        return 4 * elements if precision == "fp32" else 2 * (elements + self.kept.wide_elements(checkpointing))


def price(settings: Any, shape: LatentShape, num_classes: int | None) -> Cost:
    """Return the cost of one image by the formulas of its family."""
    match settings:
        case Dis():
            return _dis(settings, shape, num_classes)
        case Dit():
            return _dit(settings, shape)
        case _:
            return _diffussm(settings, shape)


def _dis(settings: Dis, shape: LatentShape, num_classes: int | None) -> Cost:
    T = (shape.size // settings.patch) ** 2
    L = T + settings.extra_tokens(num_classes)
    parts = tuple(_dis_parts(settings, shape, num_classes, T, L))
    D = settings.width
    kept = Kept(
        blocks=settings.depth + 1,
        block=_dis_block_elements(settings, L),
        boundary=2 * L * D,  # branch and stream; the skips are branches
        products=_dis_product_elements(settings, L),
        skips=settings.depth // 2 * 2 * L * D if settings.skip == "concat" else 0,
        ends=5 * T * D,
        wide=L * D,
        wide_boundary=L * D,
    )
    return Cost(L, parts, kept)


def _dis_parts(settings: Dis, shape: LatentShape, num_classes: int | None, T: int, L: int) -> Iterator[Part]:
    D, N, E, R = settings.width, settings.state_size, inner_width(settings.width), step_rank(settings.width)
    P, blocks, ways = shape.channels * settings.patch**2, settings.depth + 1, settings.directions
    yield Part("patches", T * P * D, passes=2)
    yield Part("time: first", 4 * D * D, passes=2)
    yield Part("time: second", 4 * D * D)
    if settings.skip == "concat":
        yield Part("skip", (settings.depth // 2) * L * 2 * D * D)
    yield Part("in_proj", blocks * L * D * 2 * E)
    yield Part("conv", blocks * ways * L * E * TAPS)
    yield Part("x_proj", blocks * ways * L * E * (R + 2 * N))
    yield Part("dt_proj", blocks * ways * L * R * E)
    yield Part("scan", blocks * ways * L * E * N * SCAN_MACS)
    yield Part("D u and gate", blocks * (ways * L * E + ways * L * E))
    yield Part("out_proj", blocks * L * E * D)
    if settings.conditioning != "tokens":
        yield Part("modulation", blocks * 3 * D * D)
    if num_classes is not None:
        yield Part("final modulation", 2 * D * D)
    yield Part("final", T * D * 2 * P)


def _dis_block_elements(settings: Dis, L: int) -> int:
    """Stream and norm (3 D), x and z, each direction's u, delta and (step, B, C), the scan's states, the gated sum.

    An adaptive norm keeps its output and what its gate multiplies. One direction alone is gated by PyTorch: both factors.
    """
    D, N, E, R = settings.width, settings.state_size, inner_width(settings.width), step_rank(settings.width)
    ways, alone = settings.directions, 2 - settings.directions
    states = ways * E * N * ((L - 1) // NATIVE_CHUNK)
    modulated = 0 if settings.conditioning == "tokens" else 2 * D
    return L * (3 * D + modulated + 2 * E + ways * (2 * E + R + 2 * N) + E + alone * 2 * E) + states


def _dis_product_elements(settings: Dis, L: int) -> int:
    """x and z, each direction's (step, B, C), and in half of the blocks the skip. out_proj's product is the boundary."""
    D, N, E, R = settings.width, settings.state_size, inner_width(settings.width), step_rank(settings.width)
    skip = D * (settings.depth // 2) // (settings.depth + 1) if settings.skip == "concat" else 0
    return L * (2 * E + settings.directions * (R + 2 * N) + skip)


def _dit(settings: Dit, shape: LatentShape) -> Cost:
    T = (shape.size // settings.patch) ** 2
    D, depth = settings.width, settings.depth
    P = shape.channels * settings.patch**2
    parts = (
        Part("patches", T * P * D, passes=2),
        Part("time: first", FREQUENCIES * D, passes=2),
        Part("time: second", D * D),
        Part("modulation", depth * 6 * D * D),
        Part("qkv", depth * T * 3 * D * D),
        Part("attention", depth * 2 * T * T * D),
        Part("attention out", depth * T * D * D),
        Part("mlp", depth * T * 8 * D * D),
        Part("final modulation", 2 * D * D),
        Part("final", T * D * 2 * P),
    )
    # Both norms, their modulation and both gates (8), the stream, q k v (3), attention's output, the MLP (8);
    # products: q k v, attention, its projection, the MLP's inner numbers (4) and output.
    kept = Kept(blocks=depth, block=20 * T * D, boundary=T * D, products=10 * T * D, skips=0, ends=4 * T * D)
    return Cost(T, parts, kept)


def _diffussm(settings: DiffuSsm, shape: LatentShape) -> Cost:
    """Products and two data FFTs per direction. The kernels, once per micro-batch, are counted separately."""
    D, M, depth = settings.width, settings.hourglass, settings.depth
    P, L = shape.channels * settings.patch**2, (shape.size // settings.patch) ** 2
    G, S = L // M, (2 if settings.bidirectional else 1) * D
    kernels = depth * D * (2 if settings.bidirectional else 1)
    parts = (
        Part("embed", G * P * M * D, passes=2),
        Part("time: first", FREQUENCIES * D, passes=2),
        Part("time: second", D * D),
        Part("modulation", depth * 3 * D * D),
        Part("W0, W1, W3, W4", depth * G * 4 * D * D),
        Part("W2", depth * G * 2 * D * D),
        Part("W_up", depth * L * D * S),
        Part("W_down", depth * L * S * (2 * D // M)),
        Part("FFT", depth * S * 2 * _fft_macs(2 * L)),
        Part("spectra's product", depth * S * 4 * (L + 1)),
        Part("final modulation", 2 * D * D),
        Part("final", G * D * M * 2 * P),
    )
    # Per mode and tap a complex power (4) and the real part of a complex product (2), then one FFT of the kernel.
    kernel = kernels * (settings.state_size // 2 * L * 6 + _fft_macs(2 * L))
    # A block keeps its spectrum, its discretised modes, and all powers of them unless they are computed in chunks, which are
    # recomputed one by one.
    modes = settings.state_size // 2 * kernels // depth
    powers = modes * L if settings.state_size // 2 <= CHUNK // (D * L) else 0
    kept = Kept(
        blocks=depth,
        block=16 * G * D + 7 * L * S,
        boundary=G * D,
        products=7 * G * D + L * S,
        skips=0,
        ends=4 * G * D,
        wide=5 * L * S,
        kernel_bytes=8 * ((L + 1) * S + powers) + 4 * DISCRETISED * modes,
    )
    return Cost(L, parts, kept, kernel_gmacs=kernel / 1e9)


def _fft_macs(n: int) -> float:
    """Multiply-adds of a real FFT of n points: half of 2.5 n log2 n FLOPs."""
    return 1.25 * n * math.log2(n)
