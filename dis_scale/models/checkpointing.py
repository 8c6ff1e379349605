"""Activation checkpointing: what a block keeps for its backward pass, and what is computed there again.

    none        everything is kept
    block       of each block its inputs; all of it runs twice (Chen et al. 2016, arXiv 1604.06174)
    every_<k>   so for each k-th block, the others keep everything
    selective   inputs, attention and the products that cost much a number; norms, convolutions and scans run twice

A run's losses do not depend on it. Read next: cost.py for the bytes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dis_scale.errors import UserError, nearest
from dis_scale.recipe import CHECKPOINTING

WORTH_KEEPING_MACS = 128
"""Multiply-adds a number from which on a product is kept: the scan's time step, of rank width / 16, is not."""

_aten = torch.ops.aten
_INNER: dict[Any, Callable[..., int]] = {
    _aten.mm.default: lambda a, *_: a.shape[1],
    _aten.addmm.default: lambda _, a, *__: a.shape[1],
    _aten.bmm.default: lambda a, *_: a.shape[2],
}
"""How many multiply-adds each number of a product costs."""
_ATTENTION = (
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
)


def require_known(mode: str) -> None:
    """UserError where the mode is none of these."""
    if not CHECKPOINTING.fullmatch(mode):
        known = ("none", "block", "every_2", "selective")
        raise UserError(
            f"unknown checkpointing {mode!r}{nearest(mode, known)}; known: none, block, every_<k>, selective"
        )


def recompute_every(mode: str) -> int:
    """Each how manieth block is recomputed; 0 for none."""
    return int(mode.removeprefix("every_")) if mode.startswith("every_") else int(mode != "none")


def run_block(mode: str, number: int, block: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """Block `number` of the model applied to its inputs, which keeps what the mode says."""
    if mode == "none" or number % recompute_every(mode) or not torch.is_grad_enabled():
        return block(*inputs)
    rerun = partial(checkpoint, block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return rerun(context_fn=partial(create_selective_checkpoint_contexts, _policy)) if mode == "selective" else rerun()


def _policy(_: Any, op: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
    worth = op in _ATTENTION or (op in _INNER and _INNER[op](*arguments) >= WORTH_KEEPING_MACS)
    return CheckpointPolicy.MUST_SAVE if worth else CheckpointPolicy.PREFER_RECOMPUTE
