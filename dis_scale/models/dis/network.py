"""DiS: bidirectional Mamba blocks with long skips (Fei et al., arXiv 2402.05608), as the public code runs it.

Axes: B samples, C channels, L tokens (label, time, patches), D width. The residual stream is float32 whatever the weights are.
Read next: s6.py, ssd.py and attention.py (the mixers), public.py.
"""

import functools
import itertools
import math
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale.models.checkpointing import recompute_every, run_block
from dis_scale.models.dis.attention import Attention
from dis_scale.models.dis.orders import Orders, orders_of
from dis_scale.models.dis.s6 import Mixer, inner_width
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dis.ssd import SsdMixer
from dis_scale.models.dis.verification import verify_block
from dis_scale.models.tokens import Backbone, Linear, PatchEmbed, TimeEmbedding, modulate, unpatchify, wide, zero_
from dis_scale.process.settings import LatentShape
from dis_scale.scan import choose
from dis_scale.scan.backend import KeepingStates
from dis_scale.scan.norms import added_rms_norm, normalised, reordered
from dis_scale.scan.selftest import Case, distinct

MIXERS = {"s6": Mixer, "ssd": SsdMixer}


class DiSBlock(nn.Module):
    """One block: add to the stream, normalise, mix. Maps (branch h, stream r) to (branch h, stream r); no MLP.

    The mixer gets the tokens in the block's own order. The branch stays in this order: the next block's norm reads each token at
    its position there. `attention`, if given, is the mixer.
    """

    order: Tensor | None
    place: Tensor | None
    skip_order: Tensor | None

    def __init__(
        self, settings: Dis, scan: str, *, skip: bool, orders: Orders = Orders(), attention: Attention | None = None
    ):  # fmt: skip
        super().__init__()
        place, order = orders.places or (None, None)
        # Computed, not learned: not persistent, so that the state dict holds exactly what is trained.
        for name, each in (("place", place), ("order", order), ("skip_order", orders.of_skip)):
            self.register_buffer(name, _buffer(each), persistent=False)
        D = settings.width
        self.scan = scan
        self.norm = nn.Parameter(torch.ones(D))
        self.mixer = attention or MIXERS[settings.mixer](settings, scan)
        self.skip = _zero_bias(Linear(2 * D, D)) if skip and settings.skip == "concat" else None
        self.gated = settings.conditioning.startswith("adaln_zero")
        self.modulation = None if settings.conditioning == "tokens" else Linear(D, (2 + self.gated) * D)
        if self.modulation is not None:
            zero_(self.modulation)

    def forward(
        self, h_BLD: Tensor, r_BLD: Tensor | None, c_BD: Tensor, skip_BLD: Tensor | None, drop_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if skip_BLD is not None:
            skip_BLD = reordered(skip_BLD, self.skip_order)
            h_BLD = h_BLD + skip_BLD if self.skip is None else self.skip(torch.cat([h_BLD, skip_BLD], dim=-1))
        if r_BLD is None:  # the first block's stream is the tokens themselves
            r_BLD = wide(h_BLD)
            n_BLD = reordered(normalised(r_BLD, self.norm, h_BLD.dtype), self.order)
        else:
            places = None if self.place is None or self.order is None else (self.place, self.order)
            r_BLD, n_BLD = added_rms_norm(r_BLD, dropped(h_BLD, drop_B), self.norm, self.scan, places)
        if self.modulation is None:
            return self.mixer(n_BLD), r_BLD
        shift_BD, scale_BD, *gate_BD = self.modulation(F.silu(c_BD)).chunk(2 + self.gated, dim=1)
        mixed_BLD = self.mixer(modulate(n_BLD, shift_BD, scale_BD))
        return gate_BD[0].unsqueeze(1) * mixed_BLD if self.gated else mixed_BLD, r_BLD


def _buffer(order_L: np.ndarray | None) -> Tensor | None:
    return None if order_L is None else torch.tensor(order_L)


def dropped(h_BLD: Tensor, drop_B: Tensor | None) -> Tensor:
    """Return the branch with its samples multiplied by `drop_B` (drop path)."""
    return h_BLD if drop_B is None else h_BLD * drop_B.to(h_BLD.dtype)[:, None, None]


def _zero_bias(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.bias)
    return layer


class _Kernels(NamedTuple):
    """A set of compiled kernels: backend, type of the products, case, and whether its norms change the order of tokens."""

    scan: str
    dtype: torch.dtype
    case: Case
    ordered: bool


class DiS(Backbone):
    """depth / 2 in-blocks, a middle block, depth / 2 out-blocks. Each out-block gets an in-block's branch: last in, first out."""

    settings: Dis
    dynamics = frozenset({"dynamics", "A_log", "dt_bias"})
    vectors = Backbone.vectors | {"conv"}
    place: Tensor | None
    undecayed = Backbone.undecayed | {"conv"}

    def __init__(self, settings: Dis, shape: LatentShape, num_classes: int | None, scan: str = "auto", checkpointing: str = "none"):
        super().__init__(settings, shape, num_classes, scan, checkpointing)
        D, half = settings.width, settings.depth // 2
        self.patches = PatchEmbed(shape.channels, settings.patch, D)
        self.time = TimeEmbedding(D, 4 * D, D)
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, D)
        self.extras = settings.extra_tokens(num_classes)
        self.length = self.extras + (shape.size // settings.patch) ** 2
        self.position = nn.Parameter(torch.zeros(1, self.length, D)) if settings.position == "learned" else None
        side, every = shape.size // settings.patch, settings.attention_every
        turns = itertools.cycle(_token_orders(settings, self.extras, side))
        attends = [every is not None and (i + 1) % every == 0 for i in range(2 * half + 1)]
        own = [None if attention else next(turns) for attention in attends]
        self.blocks = nn.ModuleList()
        for i, attention in enumerate(attends):
            orders = Orders(own[i], own[i - 1] if i else None, own[2 * half - i] if i > half else None)
            mixer = Attention(D, settings.depth, self.extras, side) if attention else None
            self.blocks.append(DiSBlock(settings, scan, skip=i > half, orders=orders, attention=mixer))
        self.register_buffer("place", None if own[-1] is None else _buffer(own[-1].argsort()), persistent=False)
        self.norm = nn.Parameter(torch.ones(D))
        self.modulation = None if num_classes is None else Linear(D, 2 * D)
        self.final = Linear(D, settings.patch**2 * 2 * shape.channels)
        # Block i adds the branch of block i - 1 at the rate that the public code gives block i; the first adds none.
        if settings.drop_path:
            rates = torch.linspace(0, settings.drop_path, settings.depth, device="cpu").tolist()
            self.drop_rates = (*rates, settings.drop_path)
        self._initialise()

    def _initialise(self) -> None:
        for layer in (self.time.up, self.time.down, self.modulation, self.final):
            if layer is not None:
                nn.init.zeros_(layer.bias)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        self.check(x_BCHW, y_B)
        dtype = self.compute_dtype
        c_BD = time_BD = self.time(t_B, dtype)
        tokens = [time_BD.unsqueeze(1), self.patches(x_BCHW.to(dtype))]
        if self.label is not None and y_B is not None:
            label_BD = self.label(y_B).to(dtype)
            c_BD = time_BD + label_BD
            tokens = [label_BD.unsqueeze(1), *tokens]
        h_BLD = torch.cat(tokens, dim=1) if self.extras else tokens[-1]
        if self.position is not None:
            h_BLD = h_BLD + self.position.to(dtype)
        drops: list[Tensor | None] = [None] * (len(self.blocks) + 1)
        if drop is not None and self.drop_rates:
            drops[1:] = drop.unbind()
        h_BLD, r_BLD = self._run(h_BLD, c_BD, drops)
        return self._image(r_BLD + dropped(reordered(h_BLD, self.place), drops[-1]), c_BD, dtype)

    @property
    def tokens(self) -> int:
        return self.length

    def verify_kernels(self, device: torch.device, images: Collection[int], *, training: bool) -> None:
        """Verify one block for each set of compiled kernels, once per process."""
        for each in self.kernel_cases(device, images, training=training):
            _verify_once(self.settings, device, each)

    def kernel_cases(self, device: torch.device, images: Collection[int], *, training: bool) -> list[_Kernels]:
        """Return each set of compiled kernels."""
        name = choose(self.scan, device).name
        cases = distinct(name, device, self._cases(images, training=training))
        return [_Kernels(name, self.compute_dtype, *each) for each in itertools.product(cases, self._kinds_of_norms())]

    def _kinds_of_norms(self) -> list[bool]:
        """Return whether norms change the order of tokens: of all blocks, none, or some (both values). Skips the first block, whose
        norm adds no branch."""
        return sorted({isinstance(block, DiSBlock) and block.place is not None for block in [*self.blocks][1:]})

    def _cases(self, images: Collection[int], *, training: bool) -> list[Case]:
        """Return all passes of these image counts. A recomputed block keeps states in its second forward pass only, which is also
        the only one with a backward pass. Kernels of state-space duality and attention do not depend on the image counts.
        """
        sizes = self.length, inner_width(self.settings.width), self.settings.state_size
        if self.settings.mixer == "ssd" or self.settings.attention_every == 1:
            return [Case(*sizes, 2, self.settings.ways, training)]
        mode = self.checkpointing if training else "none"
        first = training and recompute_every(mode) != 1
        passes = [(first, first and self.keeps_states), (True, True)][: 1 if mode == "none" else 2]
        return [Case(*sizes, count, self.settings.ways, *each) for count in images for each in passes]

    def scale_initial(self, weights: Mapping[str, Tensor], growth: Mapping[str, float], base_width: int) -> None:  # noqa: ARG002
        """Scale the projections to B and C, which have the same number of values at each width."""
        for name, weight in weights.items():
            if name.endswith("x_proj"):
                weight[:, -2 * self.settings.state_size :].mul_(growth[name] ** -0.5)

    def resized(self, name: str, weight: Tensor) -> tuple[Tensor, str] | None:
        """Return learned positions, interpolated; None for other weights."""
        if name != "position":
            return None
        patches = self.length - self.extras
        return resized_positions(weight, self.extras, patches), f"positions of {patches} patches interpolated"

    def _run(self, h_BLD: Tensor, c_BD: Tensor, drops: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        half = len(self.blocks) // 2
        skips: list[Tensor] = []
        r_BLD = None
        with KeepingStates() if self.keeps_states and torch.is_grad_enabled() else nullcontext():
            for i, block in enumerate(self.blocks):
                inputs = (h_BLD, r_BLD, c_BD, skips.pop() if i > half and skips else None, drops[i])
                h_BLD, r_BLD = run_block(self.checkpointing, i, block, *inputs)
                if i < half and self.settings.skip != "none":
                    skips.append(h_BLD)
        assert r_BLD is not None
        return h_BLD, r_BLD

    def _image(self, r_BLD: Tensor, c_BD: Tensor, dtype: torch.dtype) -> Tensor:
        """Map the stream to (B, 2C, H, W): both norms, the final modulation if the model has classes, one product."""
        x_BTD = normalised(r_BLD[:, self.extras :], self.norm, dtype)
        x_BTD = F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=1e-6)
        if self.modulation is not None:
            shift_BD, scale_BD = self.modulation(F.silu(c_BD)).chunk(2, dim=1)
            x_BTD = modulate(x_BTD, shift_BD, scale_BD)
        return unpatchify(self.final(x_BTD), self.patch)


@functools.cache
def _verify_once(settings: Dis, device: torch.device, kernels: _Kernels) -> None:
    scan, dtype, case, ordered = kernels
    plain, tokens = settings.model_copy(update={"conditioning": "tokens"}), np.arange(case.L)
    orders = Orders(tokens[::-1].copy(), np.roll(tokens, 1)) if ordered else Orders()

    def make(scan: str) -> DiSBlock:
        alone = Attention(settings.width, settings.depth, case.L, 0) if settings.attention_every == 1 else None
        return DiSBlock(plain, scan, skip=False, orders=orders, attention=alone)

    verify_block(make, settings.width, scan, device, dtype, case)


def _token_orders(settings: Dis, extras: int, side: int) -> list[np.ndarray | None]:
    """Return the orders of all tokens that blocks use in turn: label and time, then the patches; None for the stream's order."""
    raster = np.arange(side**2)
    patches = orders_of(settings.order, side, alternate=settings.directions == "alternate")
    every = [np.concatenate([np.arange(extras), extras + order]) for order in patches]
    return [None if np.array_equal(p, raster) else o for p, o in zip(patches, every, strict=True)]


def resized_positions(position_1LD: Tensor, extras: int, patches: int) -> Tensor:
    """Return learned positions for `patches` patches of a square image; the first `extras` positions do not change."""
    first, grid_1TD = position_1LD[:, :extras], position_1LD[:, extras:]
    before, after = math.isqrt(grid_1TD.shape[1]), math.isqrt(patches)
    grid_1DHW = grid_1TD.float().unflatten(1, (before, before)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid_1DHW, size=(after, after), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([first, resized.flatten(2).transpose(1, 2)], dim=1)
