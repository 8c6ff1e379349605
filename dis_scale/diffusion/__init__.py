"""Diffusion processes, their losses and samplers. Read next: gaussian.py, flow.py, samplers.py, guidance.py."""

from dis_scale.diffusion.flow import FlowMatching
from dis_scale.diffusion.gaussian import GaussianDiffusion
from dis_scale.diffusion.process import Losses, ModelFn
from dis_scale.recipe import Flow, Gaussian, LatentShape

__all__ = ["FlowMatching", "GaussianDiffusion", "Losses", "ModelFn", "Process", "build"]

Process = GaussianDiffusion | FlowMatching


def build(settings: Gaussian | Flow, shape: LatentShape) -> Process:
    """Return the diffusion process of a recipe for latents of this shape."""
    return GaussianDiffusion(settings) if isinstance(settings, Gaussian) else FlowMatching(settings, shape)
