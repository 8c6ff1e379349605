"""Seeds computed from (purpose, position), never from a generator's history.

Therefore a run is a function of (recipe, images seen): any worker, at any world size, after any restart, gets the same numbers.
"""

import hashlib

import numpy as np


def seed(purpose: str, *position: int | str) -> int:
    """Return a 128-bit seed, for example `seed("noise", recipe_seed, step, lane)`."""
    text = "/".join([purpose, *map(str, position)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(purpose: str, *position: int | str) -> np.random.Generator:
    """Return a counter-based generator (Philox, on the CPU) for one purpose and position."""
    return np.random.Generator(np.random.Philox(key=seed(purpose, *position)))
