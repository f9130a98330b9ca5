"""Weights whose mere presence in a fit costs more than they are worth: SpQR's leave-one-out test.

A range follows from the two ends of its group, so only those can be in the way: each group is
fitted again without its largest and without its smallest weight, and what falls by that is what the
others gain and what the weight itself would have cost.

Source: SpQR (arXiv 2306.03078), which tries every weight of a group; for ranges that is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import Fit, Grid, _folded
from .outliers import largest

_CHUNK = 1 << 20  # weights


def costly_ends(
    wt: Tensor, grid: Grid, cost: Tensor, limit: float, most: int, unit: float = 1.0
) -> Tensor:
    """Bool ``[n, m]``: ends of groups of ``wt`` [n, m] whose removal from the fit lowers the
    group's error by more than ``limit``; the ``most`` that lower it most where there are more.

    cost: ``[n]``, the weight of each input's squared error. unit: see `Grid.store`.
    """
    w, weights = _folded(wt, grid), _folded(cost[:, None], grid)
    some = max(1, _CHUNK // (w.shape[1] * w.shape[2]))
    parts = zip(w.split(some), weights.split(some), strict=True)
    gain = torch.cat([_gains(part, grid, c, unit) for part, c in parts])
    gain = gain.view(-1, w.shape[2])[: len(wt)]
    found = gain > limit
    return found if int(found.sum()) <= most else largest(gain, most)


def _gains(w: Tensor, grid: Grid, cost: Tensor, unit: float) -> Tensor:
    """By how much the error of each group falls without its ends; minus infinity elsewhere.

    w: ``[G, g, m]``. cost: ``[G, g, 1]``.
    """

    def errors(fit: Fit) -> Tensor:
        rounded = grid.centred(w, fit).mul_(fit.scale.unsqueeze(-2))
        return rounded.sub_(w).square_().mul_(cost)

    whole = errors(grid.fit(w, importance=cost, unit=unit)).sum(-2, keepdim=True)
    gain = torch.full_like(w, -torch.inf)
    for sign in (1, -1):
        size, end = (sign * w).max(-2, keepdim=True)
        there = torch.ones_like(w, dtype=torch.bool).scatter_(-2, end, False)
        without = errors(grid.fit(w, keep=there, importance=cost, unit=unit)).mul_(there)
        # A range holds 0, so that beyond it alone there is an end.
        fall = torch.where(size > 0, whole - without.sum(-2, keepdim=True), -torch.inf)
        gain.scatter_(-2, end, fall)
    return gain
