"""S4D: a diagonal state space as a long convolution (Gu, Gupta, Goel and Re 2022), and its recurrence, the definition.

N real states are N / 2 complex modes; the factor 2 Re accounts for their conjugates. Parameters are real; kernel and FFT
are float32 (float64 for float64 weights). Axes: B samples, L time, H channels, M modes. Read next: network.py.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.tokens import wide
from dis_scale.scan.counts import active, keeping, report, reporting

INITIAL_STEPS = (1e-3, 1e-1)
"""Least and largest initial time step of a channel."""
CHUNK = 2**24
"""Complex numbers in a chunk of the Vandermonde product: 128 MB. About three chunks are in memory at once. The complete product at
1152 channels and 4096 taps has 1.2 GB."""


def initial_modes(init: str, N: int) -> tuple[Tensor, Tensor]:
    """Return A and B (M,), complex128, of the initialisations lin, inv and legs of the S4D paper.

    legs: eigenvalues of the normal part of HiPPO-LegS. B's phases are omitted, since those of C are random.
    """
    n = torch.arange(N // 2, dtype=torch.float64)
    if init == "legs":
        frequencies, weights = _legs(N)
        return torch.complex(torch.full_like(n, -0.5), torch.from_numpy(frequencies)), torch.from_numpy(weights) + 0j
    imaginary = math.pi * n if init == "lin" else N / math.pi * (N / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(n, -0.5), imaginary), torch.ones_like(n) + 0j


def _legs(N: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (M,), ascending, and |V* B| of HiPPO-LegS: A + P P^T = -1/2 + a skew matrix, P = sqrt(n + 1/2)."""
    root = np.sqrt(2 * np.arange(N, dtype=np.float64) + 1)
    products = np.outer(root, root) / 2
    skew = np.triu(products, 1) - np.tril(products, -1)
    frequencies, vectors = np.linalg.eigh(-1j * skew)
    return frequencies[N // 2 :], np.abs(vectors.conj().T @ root)[N // 2 :]


class S4D(nn.Module):
    """H independent state spaces of one direction. `forward` returns the spectrum; `recurrence` is the reference."""

    def __init__(self, channels: int, settings: DiffuSsm):
        super().__init__()
        self.chunk = CHUNK
        H, M = channels, settings.state_size // 2
        with torch.device("cpu"):
            A_M, B_M = initial_modes(settings.init, settings.state_size)
        self.log_dt = nn.Parameter(torch.empty(H).uniform_(*map(math.log, INITIAL_STEPS)))
        self.log_neg_re = _rows((-A_M.real).log(), H)
        self.im = _rows(A_M.imag, H)
        self.B = _rows(torch.view_as_real(B_M), H)
        self.C = nn.Parameter(torch.randn(H, M, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(H))

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the spectrum (L + 1, H) of the kernel padded to 2L, and the skip D (H)."""
        kernel_HL = self.kernel(length)
        return torch.fft.rfft(kernel_HL, n=2 * length).T, wide(self.D)

    def kernel(self, length: int) -> Tensor:
        """K (H, L): 2 Re sum_n C_n B_n (exp(dt A_n) - 1) / A_n exp(l dt A_n); in chunks over n."""
        with reporting("kernel", self.C.numel() // 2 * length * 6):  # a power (4), the real part of a product (2)
            return self._kernel(length)

    def _kernel(self, length: int) -> Tensor:
        dtA_HM, dB_HM = self.discrete()
        weights_HM = _complex(self.C) * dB_HM
        taps_L = torch.arange(length, dtype=dtA_HM.real.dtype, device=self.D.device)
        H, M = weights_HM.shape
        size = max(1, self.chunk // (H * length))
        if size >= M:
            return _vandermonde(weights_HM, dtA_HM, taps_L)
        # Keeping all chunks for the backward pass would need the full memory, so the backward pass recomputes each chunk.
        pairs = zip(weights_HM.split(size, 1), dtA_HM.split(size, 1), strict=True)
        recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        run = keeping if active.get() else recomputed
        return functools.reduce(torch.add, (run(_vandermonde, w, a, taps_L) for w, a in pairs))  # keeps no term

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Return dt A and the zero-order hold of B, (H, M) complex."""
        A_HM = torch.complex(-wide(self.log_neg_re).exp(), wide(self.im))
        dtA_HM = wide(self.log_dt).exp()[:, None] * A_HM
        return dtA_HM, _complex(self.B) * _expm1(dtA_HM) / A_HM

    def recurrence(self, u_BLH: Tensor) -> Tensor:
        """Return y (B, L, H), computed step by step: x <- dA x + dB u; y = 2 Re(C x) + D u, read from the updated state."""
        dtA_HM, dB_HM = self.discrete()
        dA_HM, C_HM = dtA_HM.exp(), _complex(self.C)
        x_BHM, ys = torch.zeros_like(dB_HM).expand(len(u_BLH), -1, -1), []
        for u_BH in u_BLH.unbind(1):
            x_BHM = dA_HM * x_BHM + dB_HM * u_BH[:, :, None]
            ys.append(2 * (C_HM * x_BHM).sum(2).real + self.D * u_BH)
        return torch.stack(ys, dim=1)


def convolve(u_BLH: Tensor, spectrum_KH: Tensor, D_H: Tensor) -> Tensor:
    """Convolve u with the kernel of this spectrum and add D u, in u's dtype.

    The conjugate spectrum gives the backward direction: flip, convolve, flip. Both directions include the current position
    (tap 0).
    """
    L = u_BLH.shape[1]
    wide_BLH = u_BLH.to(D_H.dtype)
    report("spectra's product", u_BLH.numel() // L * 4 * (L + 1))
    y_BLH = torch.fft.irfft(torch.fft.rfft(wide_BLH, n=2 * L, dim=1) * spectrum_KH, n=2 * L, dim=1)[:, :L]
    return torch.addcmul(y_BLH, D_H, wide_BLH).to(u_BLH.dtype)


def _vandermonde(weights_HM: Tensor, dtA_HM: Tensor, taps_L: Tensor) -> Tensor:
    powers_HML = torch.exp(dtA_HM[:, :, None] * taps_L)
    return 2 * torch.einsum("hm,hml->hl", weights_HM, powers_HML).real


def _expm1(z: Tensor) -> Tensor:
    """exp(z) - 1 without cancellation at small z, which matters in float32 at dt = 1e-3."""
    half_sine = torch.sin(z.imag / 2)
    real = torch.expm1(z.real) * torch.cos(z.imag) - 2 * half_sine * half_sine
    return torch.complex(real, z.real.exp() * torch.sin(z.imag))


def _complex(x_HM2: Tensor) -> Tensor:
    return torch.view_as_complex(wide(x_HM2).contiguous())


def _rows(row: Tensor, H: int) -> nn.Parameter:
    """A parameter with the same row for each channel, in the default dtype on the current device."""
    return nn.Parameter(torch.empty(H, *row.shape).copy_(row))
