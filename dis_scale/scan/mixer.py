"""The two-way mixer of DiS as one function of autograd, where a backend has it. Read next: triton_mixer.py."""

from torch import Tensor

from dis_scale.scan import choose, counts
from dis_scale.scan.graphs import outside_graphs


@outside_graphs
def fused_mixer(h_BLD: Tensor, *weights: Tensor, backend: str = "auto") -> Tensor | None:
    """Return the mixer's output, of s6.Mixer's weights in their order; None where its parts run one by one."""
    if counts.active.get() or choose(backend, h_BLD.device).name != "triton":
        return None
    from dis_scale.scan import triton_mixer  # here: Triton comes only with PyTorch's builds for Linux

    return triton_mixer.mixer(h_BLD, *weights) if triton_mixer.takes(h_BLD, weights) else None
