"""Ranks of many weights at once: one share of all, the best split of a budget, or a threshold.

A weight [m, n] of rank k stores k (m + n) numbers instead of m n, so below some rank it saves and
above it must stay dense. What truncation loses is Σ dropped σ² of each weight, times what an error
there weighs; the split that loses least in sum is a multiple-choice knapsack. The losses add, so
the best split of the bytes that one share of all takes never loses more than that share does.

Sources: ASVD, arXiv 2312.05821 (threshold on sensitivities); :mod:`.knapsack`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..ir.errors import UsageError
from .knapsack import frontier

Ranks = dict[str, int]
"""Rank by weight; a weight that is not named stays dense."""
OPTIONS = 64
"""Ranks of one weight that the best split chooses from, evenly spaced."""


@dataclass(frozen=True)
class Part:
    """One weight, or several that are stacked because they share their right factor.

    Attributes:
        rows, columns: m, of all together, and n.
        width: bytes of one stored number; step: ranks are multiples of it.
    """

    id: str
    rows: int
    columns: int
    width: int = 2
    step: int = 1

    @property
    def full(self) -> int:
        """The largest rank that there is."""
        return min(self.rows, self.columns)

    @property
    def dense(self) -> int:
        """Numbers of the whole weight."""
        return self.rows * self.columns

    @property
    def each(self) -> int:
        """Numbers that one direction takes."""
        return self.rows + self.columns

    @property
    def most(self) -> int:
        """The largest multiple of ``step`` that stores fewer numbers than the weight; 0: none."""
        return (self.dense - 1) // self.each // self.step * self.step

    def bytes(self, rank: int | None) -> int:
        """Stored at that rank, or dense for None."""
        return self.width * (self.dense if rank is None else rank * self.each)


def step_of(rows: int, columns: int, multiple: int) -> int:
    """``multiple``, halved until eight steps fit into the full rank."""
    while multiple > 1 and min(rows, columns) < 8 * multiple:
        multiple //= 2
    return multiple


def stored(parts: Sequence[Part], ranks: Mapping[str, int]) -> int:
    """Bytes of all parts together."""
    return sum(p.bytes(ranks.get(p.id)) for p in parts)


def uniform(parts: Sequence[Part], keep: float) -> Ranks:
    """The same share of the numbers of every part, up to one step, and no more than it in sum.

    Shares are rounded down, and what is left over goes to those that were cut down most.
    Raises:
        UsageError: even one step of each is more.
    """
    total = sum(p.dense for p in parts)
    # A share that is a whole number of directions up to rounding is that number.
    budget = math.floor(keep * total * (1 + 1e-12) + 1e-6)
    least = sum(p.step * p.each for p in parts)
    if least > budget:
        raise UsageError(
            f"expected a share of at most {math.floor(1000 * (1 - least / total)) / 1000:g} that "
            f"goes, found {1 - keep:g}: not one step of directions would be left everywhere"
        )
    exact = {p.id: keep * p.dense / p.each for p in parts}
    out = {
        p.id: min(max(math.floor(exact[p.id] / p.step + 1e-9) * p.step, p.step), p.most)
        for p in parts
    }
    spare = budget - sum(out[p.id] * p.each for p in parts)
    while spare < 0:
        # One step was more than the share of some: the others make up for it, widest first.
        widest = max((p for p in parts if out[p.id] > p.step), key=lambda p: out[p.id])
        out[widest.id] -= widest.step
        spare += widest.step * widest.each
    for p in sorted(parts, key=lambda p: (out[p.id] - exact[p.id]) / p.step):
        cost = p.step * p.each
        if cost <= spare and out[p.id] + p.step <= p.most and out[p.id] < exact[p.id]:
            out[p.id] += p.step
            spare -= cost
    return out


def predicted(
    parts: Sequence[Part], tails: Mapping[str, Tensor], weighs: Mapping[str, float],
    ranks: Mapping[str, int],
) -> float:  # fmt: skip
    """What truncation to these ranks loses in sum, weighed; tails as of :func:`.factor.tail`."""
    found = (p.id for p in parts if p.id in ranks)
    return sum(weighs[i] * _at(tails[i], ranks[i]) for i in found)


def best(
    parts: Sequence[Part], tails: Mapping[str, Tensor], weighs: Mapping[str, float], start: Ranks
) -> Ranks:
    """The ranks of least predicted loss within the bytes of ``start``, which they never lose to.

    Args:
        tails: squared error at every rank, fp64; weighs: what it counts, by part.
    """
    menus = [_menu(p, start.get(p.id)) for p in parts]
    options = [
        [(p.bytes(k), 0.0 if k is None else weighs[p.id] * _at(tails[p.id], k)) for k in menu]
        for p, menu in zip(parts, menus, strict=True)
    ]
    chosen = frontier(options).best(stored(parts, start))
    picked = ((p.id, menu[i]) for p, menu, i in zip(parts, menus, chosen, strict=True))
    found = {name: k for name, k in picked if k is not None}
    # The frontier is thinned where there are very many sums.
    args = parts, tails, weighs
    return found if predicted(*args, found) <= predicted(*args, start) else dict(start)


def _menu(part: Part, also: int | None) -> list[int | None]:
    """Dense, ranks in even steps, and the one that it would have anyway."""
    step = part.step * max(1, math.ceil(part.most / part.step / OPTIONS))
    ranks = {*range(part.step, part.most + 1, step), *([] if also is None else [also])}
    return [None, *sorted(ranks)]


def _at(tail: Tensor, rank: int) -> float:
    return float(tail[min(rank, len(tail) - 1)])


def below(
    parts: Sequence[Part], losses: Mapping[str, Mapping[int, float]], budget: int
) -> tuple[Ranks, float]:  # fmt: skip
    """The smallest tried rank of every part whose loss is within a threshold, else dense.

    The threshold is the lowest one within ``budget`` bytes.
    Args:
        losses: of the whole model with that part alone at that rank.
    Raises:
        UsageError: the smallest tried ranks of all take more.
    """
    levels = sorted({loss for tried in losses.values() for loss in tried.values()})

    def at(level: float) -> Ranks:
        within = {p: [k for k, loss in tried.items() if loss <= level]
                  for p, tried in losses.items()}  # fmt: skip
        return {p: min(ks) for p, ks in within.items() if ks}

    low, high = 0, len(levels) - 1
    if not levels or stored(parts, at(levels[high])) > budget:
        raise UsageError(f"expected tried ranks within {budget} bytes, found none")
    # Stored bytes fall as the threshold rises.
    while low < high:
        middle = (low + high) // 2
        if stored(parts, at(levels[middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    return at(levels[high]), levels[high]
