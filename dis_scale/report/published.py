"""Published results, plotted next to a sweep's own points: marked as published, never in a fit.

FID-50K on ImageNet 256x256 without guidance after 400K steps of 256 images, against multiply-adds of one forward pass.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """One published model; `gmacs` in 10^9 multiply-adds."""

    family: str
    model: str
    gmacs: float
    fid: float


IMAGES = 400_000 * 256
STEPS = 250
"""Sampling steps of all of them."""
MARKERS = {"DiT": "1", "SiT": "2", "DiG": "3"}
SAMPLERS = {"DiT": "ddpm", "SiT": "euler_maruyama", "DiG": "ddpm"}
"""Our name of each family's sampler."""
PUBLISHED = [
    # Peebles and Xie 2022 (arXiv 2212.09748), table 4; multiply-adds from its table 1
    Published("DiT", "DiT-S/2", 6.06, 68.4),
    Published("DiT", "DiT-B/2", 23.0, 43.5),
    Published("DiT", "DiT-L/2", 80.7, 23.3),
    Published("DiT", "DiT-XL/2", 118.6, 19.5),
    # Ma et al. 2024 (arXiv 2401.08740): DiT's backbones under flow matching
    Published("SiT", "SiT-B/2", 23.0, 33.0),
    Published("SiT", "SiT-L/2", 80.7, 18.8),
    Published("SiT", "SiT-XL/2", 118.6, 17.2),
    # Zhu et al. 2024 (arXiv 2405.18428); its multiply-adds are another paper's count, and of smaller sizes none is known
    Published("DiG", "DiG-XL/2", 89.4, 18.5),
]
