"""Which weights stay off the grid: the largest, the most sensitive, the least likely.

Sources: SqueezeLLM (arXiv 2306.07629), 0.45 % of the largest and 0.05 % of the most sensitive; GOBO
(arXiv 2005.03842), weights whose log-density under the matrix's own Gaussian is below -4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def outlier_count(share: float, size: int) -> int:
    """Weights of a matrix of that size that are its largest (or most sensitive) ``share``."""
    return round(share * size)


def largest(score: Tensor, count: int) -> Tensor:
    """Bool like score, True for exactly ``count`` of its largest entries; ties: the first ones."""
    flat = score.reshape(-1)
    best = torch.zeros_like(flat, dtype=torch.bool)
    if count > 0:
        edge = flat.kthvalue(max(1, len(flat) - count + 1)).values
        best = flat > edge
        spare = min(count, len(flat)) - int(best.sum())
        best[(flat == edge).nonzero().view(-1)[:spare]] = True
    return best.view_as(score)


def by_size(weight: Tensor, sensitivity: Tensor, large: float, sensitive: float) -> Tensor:
    """Bool ``[m, n]``: the largest share ``large`` of the weights, and of the others the share
    ``sensitive`` with the highest ``sensitivity`` [m, n]; together exactly
    ``outlier_count(large + sensitive, m * n)`` of them.
    """
    total = outlier_count(large + sensitive, weight.numel())
    first = min(outlier_count(large, weight.numel()), total)
    found = largest(weight.abs(), first)
    rest = torch.where(found, -torch.inf, sensitivity)
    return found | largest(rest, total - first)


def by_density(
    weight: Tensor, log_density: float, most: float, keep: Tensor | None = None
) -> Tensor:
    """Bool ``[m, n]``: weights less likely than that under a Gaussian of the matrix's mean and
    variance, the farthest ones where they are more than the share ``most``.

    keep: bool ``[m, n]``, others are zeros that stay and do not count.
    """
    w = weight.double()
    there = w if keep is None else w[keep]
    if not there.numel():
        return torch.zeros_like(weight, dtype=torch.bool)
    mean, spread = there.mean(), there.std(correction=0)
    if not bool(spread > 0):
        return torch.zeros_like(weight, dtype=torch.bool)
    far = (w - mean).abs() / spread
    far = far if keep is None else far * keep
    peak = -math.log(float(spread) * math.sqrt(2 * math.pi))
    found = far > math.sqrt(max(0.0, 2 * (peak - log_density)))
    count = outlier_count(most, weight.numel())
    return found if int(found.sum()) <= count else largest(far, count)
