"""Options of the benchmarks that bring up a device: which device, and small sizes for a CPU."""

import argparse
from typing import NamedTuple

import torch


class Options(NamedTuple):
    """`quick`: sizes at which a CPU takes seconds."""

    device: torch.device
    quick: bool


def rounds(description: str | None, default: int) -> int:
    """Read the command line of a benchmark whose only option is the number of its rounds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", type=int, nargs="?", default=default)
    return int(parser.parse_args().rounds)


def options(description: str | None) -> Options:
    """Read the command line; the device is the GPU, if any, unless one is named."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a CPU")
    arguments = parser.parse_args()
    return Options(torch.device(arguments.device), arguments.quick)
