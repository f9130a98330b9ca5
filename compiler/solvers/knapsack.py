"""The multiple-choice knapsack: one option per group, the whole trade of bytes against loss.

Groups are merged one after another: the frontier so far and the next group's options are added
pairwise, and a sum that costs no less and loses no less than another is dropped. As long as the
frontier is short this is the exact answer for every budget at once. A long one is thinned on a grid
of bytes whose step depends on the options alone, never on a budget: the predicted loss therefore
cannot rise with the budget, whatever was thinned.

Source: Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11 (dominance and dynamic
programming for the multiple-choice problem).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..ir.errors import LlmcError

# Points that are kept between two merges; beyond it the grid of bytes thins them.
LIMIT = 1 << 14

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Merge:
    """How each point of a frontier came about: the point before it, and the option added."""

    parent: npt.NDArray[np.int32]
    option: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Frontier:
    """All sums that nothing dominates.

    Attributes:
        bytes: int64 [points], strictly ascending.
        loss: float64 [points], strictly falling.
        exact: whether no merge was thinned, so that every point is the optimum of its bytes.
    """

    bytes: Ints
    loss: Floats
    exact: bool
    merges: tuple[_Merge, ...]

    def __len__(self) -> int:
        return len(self.bytes)

    @property
    def least(self) -> int:
        """The fewest bytes that any choice takes."""
        return int(self.bytes[0])

    @property
    def most(self) -> int:
        """The bytes from which on more bytes lose nothing less."""
        return int(self.bytes[-1])

    def index(self, budget: float) -> int:
        """The point of least loss within ``budget`` bytes (at least :attr:`least`)."""
        found = int(np.searchsorted(self.bytes, budget, side="right")) - 1
        if found < 0:
            raise LlmcError(f"expected a budget of at least {self.least} bytes, found {budget}")
        return found

    def choice(self, point: int) -> list[int]:
        """The option of each group at a point, in the order of the groups."""
        out: list[int] = []
        for merge in reversed(self.merges):
            out.append(int(merge.option[point]))
            point = int(merge.parent[point])
        return out[::-1]

    def best(self, budget: float) -> list[int]:
        """The option of each group that loses least within ``budget`` bytes."""
        return self.choice(self.index(budget))


def frontier(options: Sequence[Sequence[tuple[int, float]]], limit: int = LIMIT) -> Frontier:
    """Every choice of one option per group that no other choice beats in bytes and loss.

    Args:
        options: for each group its options as (bytes, loss); losses add, lower is better.
        limit: points kept between merges. A thinned frontier answers a budget no worse than the
            optimum of that budget less one grid step, (most - least bytes) / limit, for each group.
    Raises:
        LlmcError: a group without options, or a loss that is not finite.
    """
    tables = []
    for i, group in enumerate(options):
        size = np.array([b for b, _ in group], dtype=np.int64)
        loss = np.array([x for _, x in group], dtype=np.float64)
        if not len(size) or not np.isfinite(loss).all():
            raise LlmcError(f"expected options with finite losses, found {group!r} in group {i}")
        tables.append((size, loss))
    span = sum(int(size.max() - size.min()) for size, _ in tables)
    step = max(1, math.ceil(span / limit))
    size, loss = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float64)
    merges, exact = [], True
    for more, rise in tables:
        sums = (size[:, None] + more).ravel()
        losses = (loss[:, None] + rise).ravel()
        kept = _undominated(sums, losses)
        if len(kept) > limit:
            kept, exact = _thinned(kept, sums, step), False
        merges.append(
            _Merge((kept // len(more)).astype(np.int32), (kept % len(more)).astype(np.int32))
        )
        size, loss = sums[kept], losses[kept]
    return Frontier(size, loss, exact, tuple(merges))


def _undominated(size: Ints, loss: Floats) -> Ints:
    """Indices of the points that no other beats, by ascending bytes; of equals the first stays."""
    order = np.lexsort((loss, size))
    sorted_loss = loss[order]
    before = np.concatenate(([np.inf], np.minimum.accumulate(sorted_loss)[:-1]))
    return np.asarray(order[sorted_loss < before], dtype=np.int64)


def _thinned(kept: Ints, size: Ints, step: int) -> Ints:
    """The last point of each cell of ``step`` bytes, which loses least, and the smallest of all."""
    cells = (size[kept] - size[kept[0]]) // step
    last = np.append(cells[1:] != cells[:-1], True)
    last[0] = True
    return kept[last]


__all__ = ["LIMIT", "Frontier", "frontier"]
