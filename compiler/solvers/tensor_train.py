"""Tensor trains: a tensor as a chain of small cores, by one truncated SVD after the other.

A tensor [d₁, …, d_N] is the product of cores G_k [r_{k-1}, d_k, r_k], r₀ = r_N = 1. From left to
right each unfolding is cut to its r_k leading directions, which stay as the core; what remains is
unfolded again. What the cuts drop is orthogonal to all that is kept, so the squared error is the
sum of all dropped σ², exactly, and at most N-1 times that of the best train of these ranks.

Sources: Oseledets, SIAM J. Sci. Comput. 33 (2011), Theorem 2.2; TensorGPT, arXiv 2307.00526.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ..ir.errors import ModelError, UsageError

EXACT = 768
"""Up to this smaller side of an unfolding a full SVD is taken, beyond it the smaller Gram's."""
POWERS = 16
_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Train:
    """Cores [B, r_{k-1}, d_k, r_k], fp64, of B tensors; all but the last have orthonormal columns.

    Attributes:
        dropped: fp64 [B], the squared error of each tensor: Σ of its dropped σ².
    """

    cores: tuple[Tensor, ...]
    dropped: Tensor

    @property
    def ranks(self) -> tuple[int, ...]:
        """r₁ … r_{N-1}."""
        return tuple(c.shape[3] for c in self.cores[:-1])

    def dense(self) -> Tensor:
        """The tensors themselves, fp64 [B, d₁, …, d_N]."""
        batch = self.cores[0].shape[0]
        out = self.cores[0].reshape(batch, -1, self.cores[0].shape[3])
        for core in self.cores[1:]:
            out = (out @ core.flatten(2)).reshape(batch, -1, core.shape[3])
        return out.reshape(batch, *(c.shape[2] for c in self.cores))


def tt_svd(tensors: Tensor, ranks: Sequence[int]) -> Train:
    """The train of each of B tensors [B, d₁, …, d_N] with these ranks, at most the full ones.

    Raises:
        UsageError: a rank that does not fit. ModelError: a number that is not finite.
    """
    sizes = tuple(tensors.shape[1:])
    full, bonds = full_ranks(sizes), (1, *ranks)
    if len(ranks) != len(full) or not all(
        1 <= r <= min(f, before * d)
        for r, f, before, d in zip(ranks, full, bonds, sizes, strict=False)
    ):
        raise UsageError(f"ranks: expected up to {list(full)}, found {list(ranks)}")
    if not bool(torch.isfinite(tensors).all()):
        raise ModelError("expected finite numbers to make a tensor train of, found NaN or Inf")
    step = max(1, _AT_ONCE // max(1, prod(sizes)))
    parts = [_trains(part.double(), ranks) for part in tensors.split(step)]
    cores = tuple(torch.cat(group) for group in zip(*(p.cores for p in parts), strict=True))
    return Train(cores, torch.cat([p.dropped for p in parts]))


def _trains(tensors: Tensor, ranks: Sequence[int]) -> Train:
    batch, sizes = len(tensors), tensors.shape[1:]
    cores: list[Tensor] = []
    dropped = tensors.new_zeros(batch)
    rest, before = tensors.reshape(batch, 1, -1), 1
    for size, rank in zip(sizes[:-1], ranks, strict=True):
        unfolded = rest.reshape(batch, before * size, -1)
        left, lost = _leading(unfolded, rank)
        dropped += lost
        cores.append(left.reshape(batch, before, size, rank))
        rest, before = left.mT @ unfolded, rank
    cores.append(rest.reshape(batch, before, sizes[-1], 1))
    return Train(tuple(cores), dropped)


def _leading(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(orthonormal leading left directions [B, m, rank], Σ of the squared values dropped [B])."""
    rows, columns = matrices.shape[1:]
    if min(rows, columns) <= EXACT:
        left, values, _ = torch.linalg.svd(matrices, full_matrices=False)
        squares = values.square()
    else:
        wide = rows <= columns
        gram = matrices @ matrices.mT if wide else matrices.mT @ matrices
        squares, vectors = torch.linalg.eigh(gram)
        squares, left = squares.flip(-1).clamp(min=0), vectors.flip(-1)
        if not wide:
            left = torch.linalg.qr(matrices @ left).Q
    return left[:, :, :rank], squares[:, rank:].sum(-1)


# ** shapes and ranks **


def full_ranks(sizes: Sequence[int]) -> tuple[int, ...]:
    """The ranks at which a train of that shape is lossless: the smaller side of each unfolding."""
    return tuple(min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes)))


def numbers(sizes: Sequence[int], ranks: Sequence[int]) -> int:
    """Numbers in the cores of one train."""
    bonds = (1, *ranks, 1)
    return sum(bonds[k] * d * bonds[k + 1] for k, d in enumerate(sizes))


def capped(sizes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Ranks of at most ``rank``, none above what its neighbours can tell apart."""
    found = [min(rank, f) for f in full_ranks(sizes)]
    for _ in found:
        bonds = [1, *found, 1]
        found = [
            min(r, bonds[k] * sizes[k], sizes[k + 1] * bonds[k + 2]) for k, r in enumerate(found)
        ]
    return tuple(found)


def fitting(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    """The largest ranks with at most so many numbers: one cap for all, then one more where it fits.

    Raises:
        UsageError: even ranks of 1 take more.
    """
    least = numbers(sizes, capped(sizes, 1))
    if least > most:
        raise UsageError(f"expected at least {least} numbers for ranks of 1, found {most}")
    low, high = 1, max(full_ranks(sizes), default=1)
    while low < high:
        middle = (low + high + 1) // 2
        if numbers(sizes, capped(sizes, middle)) <= most:
            low = middle
        else:
            high = middle - 1
    found, full = list(capped(sizes, low)), full_ranks(sizes)
    grown = True
    while grown:
        grown = False
        for k in range(len(found)):
            bonds = [1, *found, 1]
            told = min(full[k], bonds[k] * sizes[k], sizes[k + 1] * bonds[k + 2])
            more = [*found[:k], found[k] + 1, *found[k + 1 :]]
            if found[k] < told and numbers(sizes, more) <= most:
                found, grown = more, True
    return tuple(found)


@lru_cache(maxsize=4096)
def factors(number: int, count: int) -> tuple[int, ...] | None:
    """``number`` as a product of ``count`` rising factors above 1 with the least sum; else None."""
    return _factors(number, count, 2)


def _factors(number: int, count: int, least: int) -> tuple[int, ...] | None:
    if count == 1:
        return (number,) if number >= least else None
    best: tuple[int, ...] | None = None
    for first in range(least, int(number ** (1 / count) + 1e-9) + 1):
        if number % first:
            continue
        rest = _factors(number // first, count - 1, first)
        if rest is not None and (best is None or first + sum(rest) <= sum(best)):
            best = (first, *rest)
    return best


def padded(number: int, count: int) -> tuple[int, ...]:
    """Factors of a number from ``number`` on, within 2 % (or 64), whose sum is least.

    Where its own factors add up to at most a tenth more, they are taken.
    """
    own = factors(number, count)
    found = (factors(n, count) for n in range(number, number + max(64, number // 50) + 1))
    best = min((f for f in found if f is not None), key=lambda f: (sum(f), prod(f)))
    return own if own is not None and 10 * sum(own) <= 11 * sum(best) else best


def nearest_shape(number: int, given: Sequence[int]) -> tuple[int, ...] | None:
    """The factors of ``number``, as many as given, that are nearest to those; None: there are none.

    Nearest by the sum of |log| ratios; the order is kept.
    """
    best: tuple[float, tuple[int, ...]] | None = None
    logs = torch.tensor([float(max(g, 1)) for g in given]).log()

    def walk(rest: int, made: tuple[int, ...]) -> None:
        nonlocal best
        if len(made) == len(given) - 1:
            shape = (*made, rest)
            if rest > 1:
                off = float((torch.tensor([float(s) for s in shape]).log() - logs).abs().sum())
                if best is None or (off, shape) < best:
                    best = (off, shape)
            return
        for d in range(2, rest // 2 + 1):
            if rest % d == 0:
                walk(rest // d, (*made, d))

    walk(number, ())
    return None if best is None else best[1]


# ** the order of rows **


def cluster_order(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Row indices, int64 [n], so that like rows share leading digits of their place.

    Places are numbers of digits ``sizes``, the first the most significant. Rows are sorted along
    their main direction and shared out to the first digit's values, then within each, and so on.
    """
    order = torch.arange(len(rows))
    _sort(rows.double(), order, tuple(sizes))
    return order


def _sort(rows: Tensor, order: Tensor, sizes: tuple[int, ...]) -> None:
    """Sort the rows that ``order`` names, in place."""
    if len(order) < 2 or not sizes:
        return
    mine = rows[order]
    centred = mine - mine.mean(0)
    along = centred[centred.norm(dim=1).argmax()]
    for _ in range(POWERS):
        along = torch.nn.functional.normalize(along, dim=0)
        along = centred.t() @ (centred @ along)
    order.copy_(order[(centred @ along).argsort(stable=True)])
    step = prod(sizes[1:])
    for part in order.split(step):
        _sort(rows, part, sizes[1:])
