"""A random number comes from what it is for and where it falls, never from a generator's history.

So a run is a function of (recipe, images seen): any worker, at any world size, after any restart, draws the same.
"""

import hashlib

import numpy as np


def seed(what: str, *where: int | str) -> int:
    """A 128-bit seed from a purpose and a place, for example `seed("noise", recipe_seed, step, lane)`."""
    text = "/".join([what, *map(str, where)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(what: str, *where: int | str) -> np.random.Generator:
    """A counter-based generator (Philox, on the CPU) for one purpose at one place."""
    return np.random.Generator(np.random.Philox(key=seed(what, *where)))
