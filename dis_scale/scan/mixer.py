"""Two-way mixers as one function of autograd, where a backend has it. Read next: triton_mixer.py, triton_ssd_mixer.py.

Their modules are imported when they are needed: Triton comes only with PyTorch's builds for Linux.
"""

from torch import Tensor

from dis_scale.scan.graphs import outside_graphs
from dis_scale.scan.norms import by_triton


@outside_graphs
def fused_mixer(h_BLD: Tensor, *weights: Tensor, backend: str = "auto") -> Tensor | None:
    """Return the mixer's output, of s6.Mixer's weights in their order; None where its parts run one by one."""
    if not by_triton(h_BLD, backend):
        return None
    from dis_scale.scan import triton_mixer

    return triton_mixer.mixer(h_BLD, *weights) if triton_mixer.takes(h_BLD, weights) else None


@outside_graphs
def fused_ssd_mixer(h_BLD: Tensor, *weights: Tensor, backend: str = "auto") -> Tensor | None:
    """As `fused_mixer`, of the weights of ssd.SsdMixer with Hydra's convolution, in their order."""
    if not by_triton(h_BLD, backend):
        return None
    from dis_scale.scan import triton_ssd_mixer

    return triton_ssd_mixer.mixer(h_BLD, *weights) if triton_ssd_mixer.takes(h_BLD, weights) else None
