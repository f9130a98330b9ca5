"""One-dimensional weighted k-means of many rows at once.

In one dimension the best clusters are intervals of the sorted values, so dynamic programming finds
the optimum; on rows with more than `BINS` values it runs on bins, and Lloyd's iterations finish on
the values themselves. Lloyd never raises the objective, whatever it starts from.

Sources: Wang and Song, Ckmeans.1d.dp (R Journal 3/2, 2011); SqueezeLLM (arXiv 2306.07629) for the
weights; GOBO (arXiv 2005.03842) for the L1 stopping rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 128
_CHUNK = 1 << 17  # interval costs held at a time


def kmeans(values: Tensor, weights: Tensor, k: int, iterations: int = 12) -> Tensor:
    """Ascending centres ``[R, k]`` that minimise the weighted squared error of ``values`` [R, n].

    weights: ``[R, n]``, not negative; a row whose weights are all 0 counts each value alike. Exact
    where n is at most `BINS`, or a row has no more than k distinct values.
    """
    weights = _usable(weights)
    n = values.shape[1]
    some = max(1, _CHUNK // (min(n, BINS) + 1) ** 2)
    parts = []
    for v, w in zip(values.split(some), weights.split(some), strict=True):
        points, mass = (v, w) if n <= BINS else _binned(v, w)
        centres = optimum(points, mass, k)
        if n > BINS:
            centres = _distinct(v, w, lloyd(v, w, centres, iterations))
        parts.append(centres)
    return torch.cat(parts)


def _distinct(values: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """Centres, or the values themselves in rows of no more than k; bins may have joined those."""
    heaviest = values.gather(1, weights.argmax(1, keepdim=True))
    ordered = torch.where(weights > 0, values, heaviest).sort(1).values
    rank = torch.nn.functional.pad((ordered.diff() > 0).cumsum(1), (1, 0))
    k = centres.shape[1]
    few = rank[:, -1] < k
    exact = ordered[:, -1:].double().expand(-1, k).clone()
    exact.scatter_(1, rank.clamp(max=k - 1), ordered.double())
    return torch.where(few[:, None], exact, centres)


def _usable(weights: Tensor) -> Tensor:
    weights = weights.double()
    top = weights.amax(1, keepdim=True)
    return torch.where(top > 0, weights / torch.where(top > 0, top, 1.0), 1.0)


def _binned(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means and masses of `BINS` equal parts of each row's range, both ``[R, BINS]``."""
    heavy = weights > 0
    low = torch.where(heavy, values, torch.inf).amin(1, keepdim=True)
    high = torch.where(heavy, values, -torch.inf).amax(1, keepdim=True)
    width = (high - low).clamp(min=torch.finfo(values.dtype).tiny)
    at = ((values - low) / width * BINS).long().clamp_(0, BINS - 1)
    mass = weights.new_zeros(len(values), BINS).scatter_add_(1, at, weights)
    total = torch.zeros_like(mass).scatter_add_(1, at, weights * values)
    middle = low + (torch.arange(BINS, device=values.device) + 0.5) * width / BINS
    return torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), middle), mass


def optimum(points: Tensor, mass: Tensor, k: int) -> Tensor:
    """Centres ``[R, k]`` of the best k intervals of ``points`` [R, n], exactly.

    A row with fewer than k distinct points repeats its last centre.
    """
    order = points.sort(1)
    x, w = order.values.double(), mass.double().gather(1, order.indices)
    shift = (x * w).sum(1, keepdim=True) / w.sum(1, keepdim=True)
    x = x - shift  # so that differences of sums of squares keep their digits
    zero = x.new_zeros(len(x), 1)
    s0, s1, s2 = (torch.cat([zero, (w * x**p).cumsum(1)], 1) for p in (0, 1, 2))
    n0, n1 = s0[:, None, :] - s0[:, :, None], s1[:, None, :] - s1[:, :, None]
    cost = (s2[:, None, :] - s2[:, :, None]) - n1.square() / torch.where(n0 > 0, n0, 1.0)
    # cost[r, i, j]: points i to j-1 as one cluster
    n = x.shape[1]
    ends = torch.arange(n + 1, device=x.device)
    cost = torch.where(ends[:, None] <= ends, cost.clamp_(min=0), torch.inf)
    best = cost[:, 0]
    cuts = []
    for _ in range(k - 1):
        best, cut = (best[:, :, None] + cost).min(1)
        cuts.append(cut)
    end = torch.full((len(x), 1), n, dtype=torch.int64, device=x.device)
    centres: list[Tensor] = []
    for cut in [*reversed(cuts), torch.zeros_like(end)]:
        start = cut if cut.shape[1] == 1 else cut.gather(1, end)
        inside = s0.gather(1, end) - s0.gather(1, start)
        mean = (s1.gather(1, end) - s1.gather(1, start)) / torch.where(inside > 0, inside, 1.0)
        later = centres[-1] if centres else x[:, -1:]
        centres.append(torch.where(inside > 0, mean, later))
        end = start
    return (torch.cat(centres, 1) + shift).sort(1).values


def lloyd(values: Tensor, weights: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Centres after that many of Lloyd's iterations; a centre without a weight stays."""
    weights = weights.double()
    moments = weights * values
    for _ in range(iterations):
        new = _moved(values, weights, moments, centres)
        if torch.equal(new, centres):
            break
        centres = new
    return centres


def assign(values: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest of ascending ``centres`` [R, k] for each of ``values`` [R, n]."""
    mids = ((centres[:, 1:] + centres[:, :-1]) / 2).to(values.dtype).contiguous()
    return torch.searchsorted(mids, values.contiguous())


def _moved(values: Tensor, weights: Tensor, moments: Tensor, centres: Tensor) -> Tensor:
    at = assign(values, centres)
    mass = torch.zeros_like(centres).scatter_add_(1, at, weights)
    total = torch.zeros_like(centres).scatter_add_(1, at, moments)
    return torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), centres).sort(1).values


def stopped_by_l1(values: Tensor, k: int, iterations: int = 50) -> Tensor:
    """Centres ``[1, k]`` of ``values`` [1, n] by GOBO's rule.

    From centres with equally many values each, Lloyd's iterations go on while the sum of absolute
    errors falls.
    """
    ordered = values.sort(1).values
    n = values.shape[1]
    at = ((torch.arange(k, dtype=torch.float64) + 0.5) * n / k).long().clamp(max=n - 1)
    centres = ordered[:, at.to(values.device)].double()
    ones = torch.ones_like(values, dtype=torch.float64)
    best, least = centres, torch.inf
    for _ in range(iterations + 1):
        error = float((values - centres.gather(1, assign(values, centres))).abs().sum())
        if error >= least:
            break
        best, least = centres, error
        centres = _moved(values, ones, values.double(), centres)
    return best
