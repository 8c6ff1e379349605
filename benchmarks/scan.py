"""Speed of the scan, compared with peers in the same run: `python -m benchmarks.scan [rounds]`.

On the CPU. Each row is a median of pairs (rows.py). A job that takes more than six seconds runs once.
"""

import ctypes
import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import bringup
from benchmarks.rows import Job, Row, measure, on_threads, report
from dis_scale.scan import Direction, choose, native_build, selective_scan, two_way_conv_silu, two_way_scan

B, L, E, N, TAPS = 4, 258, 736, 16, 4  # DiS-S/2 of the public code at 32x32 latents, four images
LENGTHS = {66: 62, 258: 16, 1026: 4, 4098: 1}  # length: sequences; about the same number of tokens each


ROWS = [
    Row("forward, against the public loop", "forward", "forward, public loop", 80, at_least=True),
    Row("forward+backward, against the public loop", "training", "training, public loop", 500, at_least=True),
    Row("forward+backward, against our reference", "training", "training, reference", None, at_least=True),
    Row("forward+backward, against chunked", "training", "training, chunked", None, at_least=True),
    Row("two-way with conv and gate, against in_proj", "mixer", "in_proj", 1.5, at_least=False),
    Row("AVX2, against AVX-512", "training, avx2", "training", 2.5, at_least=False),
    Row("two threads, against one", "training", "training, one thread", 1.8, at_least=True),
]


def direction(B: int, L: int, E: int) -> Direction:
    """Inputs as early in training: A = -1..-N, delta around 0.05."""
    A_EN = -torch.arange(1.0, N + 1).repeat(E, 1)
    rows = [torch.randn(B, L, X) for X in (E, E, N, N)]
    tensors = Direction(rows[0], rows[1], A_EN, rows[2], rows[3], torch.ones(E), torch.full((E,), -3.0))
    return Direction(*(x.requires_grad_() for x in tensors))


def forward(d: Direction, backend: str) -> None:
    with torch.no_grad():
        selective_scan(*d, backend=backend)


def training(d: Direction, dy_BLE: Tensor, backend: str) -> None:
    torch.autograd.grad(selective_scan(*d, backend=backend), d, dy_BLE)


def public_loop(d: Direction) -> Tensor:
    """The scan as in state-spaces/mamba's selective_scan_ref, which runs on a CPU: all decays first, then the loop."""
    delta = torch.nn.functional.softplus(d.delta_BLE + d.delta_bias_E)
    decay_BLEN = torch.exp(torch.einsum("ble,en->blen", delta, d.A_EN))
    input_BLEN = torch.einsum("ble,bln,ble->blen", delta, d.B_BLN, d.u_BLE)
    h_BEN, y = d.u_BLE.new_zeros(len(d.u_BLE), *d.A_EN.shape), []
    for t in range(d.u_BLE.shape[1]):
        h_BEN = decay_BLEN[:, t] * h_BEN + input_BLEN[:, t]
        y.append(torch.einsum("ben,bn->be", h_BEN, d.C_BLN[:, t]))
    return torch.stack(y, dim=1) + d.u_BLE * d.D_E


def mixer(B: int, L: int, E: int) -> Job:
    """The mixer between its products, forward and backward: convolution, softplus, both scans, gate."""
    x, z = (half.detach().requires_grad_() for half in torch.randn(B, L, 2 * E).chunk(2, -1))
    w, b, w_back, b_back = (torch.randn(shape, requires_grad=True) for shape in ((E, TAPS), (E,)) * 2)
    front, back, dy = direction(B, L, E), direction(B, L, E), torch.randn(B, L, E)
    wanted = [x, z, w, b, w_back, b_back, *front[1:], *back[1:]]

    def job() -> None:
        u, u_back = two_way_conv_silu(x, w, b, w_back, b_back)
        y = two_way_scan(front._replace(u_BLE=u), back._replace(u_BLE=u_back), z)
        torch.autograd.grad(y, wanted, dy)

    return job


def product(tokens: int, E: int) -> Job:
    x, weight = torch.randn(tokens, E // 2), torch.randn(2 * E, E // 2)
    return lambda: torch.nn.functional.linear(x, weight)


def on(isa: str, job: Job) -> None:
    native_build.use_instruction_set(isa)
    job()
    native_build.use_instruction_set(native_build.instruction_set())


def jobs() -> dict[str, Job]:
    d, dy = direction(B, L, E), torch.randn(B, L, E)
    ours = functools.partial(training, d, dy, "native")
    result: dict[str, Job] = {
        "forward": lambda: forward(d, "native"),
        "forward, public loop": torch.no_grad()(lambda: public_loop(d)),
        "training": ours,
        "training, public loop": lambda: torch.autograd.grad(public_loop(d), d, dy),
        "training, reference": lambda: training(d, dy, "reference"),
        "training, chunked": lambda: training(d, dy, "chunked"),
        "training, one thread": on_threads(1, ours),
        "mixer": mixer(B, L, E),
        "in_proj": product(B * L, E),
        "training, avx2": functools.partial(on, "avx2", ours),
    }
    for length, batch in LENGTHS.items():
        result[f"mixer, {length} tokens"] = mixer(batch, length, E)
    return result


def flatness(times: dict[str, list[float]]) -> tuple[str, float, float]:
    """Time per token of the slowest length over the fastest, from least times: the spread of noisy times is never 1."""
    a_token = [min(times[f"mixer, {length} tokens"]) / (length * batch) for length, batch in LENGTHS.items()]
    return "time a token, dearest of 66..4098 over cheapest", max(a_token) / min(a_token), 1.15


def resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def peak_memory() -> float:
    """The peak of forward and backward over inputs, outputs and gradients together; Linux only."""
    d, dy = direction(4 * B, L, E), torch.randn(4 * B, L, E)
    inputs = sum(x.nbytes for x in d)
    training(d, dy, "native")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident_bytes("VmRSS")
    training(d, dy, "native")
    added = resident_bytes("VmHWM") - before
    needed = 2 * inputs + 2 * dy.nbytes  # inputs and their gradients, y and its gradient
    return (inputs + dy.nbytes + added) / needed


def main(rounds: int) -> None:
    torch.manual_seed(0)
    print(json.dumps({"scan": str(choose("auto", "cpu")), "threads": torch.get_num_threads(), "B L E N": [B, L, E, N]}))
    memory = peak_memory()
    times = measure(jobs(), rounds)
    report(ROWS, times, [("peak memory over inputs, outputs, gradients", memory, 1.1), flatness(times)])


if __name__ == "__main__":
    main(bringup.rounds(__doc__, 5))
