"""Orders in which blocks scan the patches of a square image: permutations of its row-major positions.

In a scan by rows, vertical neighbours are a complete row apart. In other orders, which blocks use in turn, they are adjacent.
"""

from typing import NamedTuple

import numpy as np

from dis_scale.process.errors import UserError


class Orders(NamedTuple):
    """Orders of tokens as permutations (L): of the block, of its input branch, and of its skip; None is the stream's order."""

    own: np.ndarray | None = None
    branch: np.ndarray | None = None
    skip: np.ndarray | None = None

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Position in the branch of each token of the stream, and the block's order; None if both are in the stream's order."""
        if self.own is None and self.branch is None:
            return None
        return _given(self.branch, self.own).argsort(), _given(self.own, self.branch)

    @property
    def of_skip(self) -> np.ndarray | None:
        """Position in the skip of each token of the branch; None if both have the same order."""
        if self.skip is None and self.branch is None:
            return None
        skip, branch = _given(self.skip, self.branch), _given(self.branch, self.skip)
        return None if np.array_equal(skip, branch) else skip.argsort()[branch]


def _given(order_L: np.ndarray | None, other_L: np.ndarray | None) -> np.ndarray:
    """Return the order, or if it is None the stream's order, with the length of the other one."""
    if order_L is not None:
        return order_L
    assert other_L is not None
    return np.arange(len(other_L))


def orders_of(names: tuple[str, ...], side: int, *, alternate: bool) -> list[np.ndarray]:
    """Return the permutations (side^2) that blocks use in turn; with `alternate` followed by the same permutations reversed.

    UserError for a Hilbert curve whose side is not a power of two.
    """
    grid = np.arange(side * side).reshape(side, side)
    paths = [path for name in names for path in _paths(name, grid)]
    return paths + [path[::-1] for path in paths] if alternate else paths


def _paths(name: str, grid: np.ndarray) -> list[np.ndarray]:
    match name:
        case "raster":
            return [_rows(grid)]
        case "column":
            return [_rows(grid.T)]
        case "zigzag":
            return [_zigzag(grid)]
        case "sweep8" | "zigzag8" | "jpeg8":
            path = {"sweep8": _rows, "zigzag8": _zigzag, "jpeg8": _diagonals}[name]
            corners = (grid, grid[:, ::-1], grid[::-1], grid[::-1, ::-1])
            return [path(each) for corner in corners for each in (corner, corner.T)]
        case "hilbert":
            side = len(grid)
            if side & (side - 1):
                raise UserError(f"order hilbert needs a power of two patches on a side, got {side}: choose zigzag8")
            return [np.argsort(_hilbert(side).ravel())]
    raise AssertionError(name)


def _rows(grid: np.ndarray) -> np.ndarray:
    return grid.ravel()


def _zigzag(grid: np.ndarray) -> np.ndarray:
    """Return the path row by row, every second row backwards: each step goes to a neighbour (ZigMa, arXiv 2403.13802)."""
    turned = grid.copy()
    turned[1::2] = turned[1::2, ::-1]
    return turned.ravel()


def _diagonals(grid: np.ndarray) -> np.ndarray:
    """Return the path by diagonals, up and down in turn, as JPEG orders its coefficients (DiMSUM, arXiv 2411.04168)."""
    side = len(grid)
    rising = [grid[::-1].diagonal(place) for place in range(1 - side, side)]
    return np.concatenate([diagonal[:: -1 if number % 2 else 1] for number, diagonal in enumerate(rising)])


def _hilbert(side: int) -> np.ndarray:
    """Return each patch's position on Hilbert's curve: four curves of half the side, of which the first and last are turned."""
    if side == 1:
        return np.zeros((1, 1), int)
    half = _hilbert(side // 2)
    count = half.size
    return np.block([[half.T, count + half], [3 * count + half.T[::-1, ::-1], 2 * count + half]])
