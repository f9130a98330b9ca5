"""Searching scales of one edge by what its readers' outputs lose on their own grids.

Readers W [m, n] of one value x are stored as Q(W·s) and read x/s. The loss of a choice of s is the
calibration error of their outputs, in closed form from H = XᵀX: the sum over the readers of
tr(D H Dᵀ), D = Q(W·s)/s - W. Source: AWQ (arXiv 2306.00978) for the candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid, rtn_t

ROWS = 32
"""Rows of each reader that rank the candidates; the best one is then judged on all."""


@dataclass(frozen=True)
class Reader:
    """One matrix that reads the value.

    Attributes:
        weight: [m, n], the value's channels last.
        grid: what it will be rounded to.
        weighed: whether the fit of the grid knows diag(H), as it does where the solve reads XᵀX.
    """

    weight: Tensor
    grid: Grid
    weighed: bool = True


@dataclass(frozen=True)
class Found:
    """The chosen candidate: its index, its loss, and the loss of the first candidate, all exact."""

    index: int
    loss: float
    base: float


def powers(size: Tensor, alphas: Sequence[float]) -> Tensor:
    """Candidates s = size^alpha / sqrt(max·min), one for each alpha: [len(alphas), n].

    size: [n], the mean magnitude of each channel; one that is always 0 keeps s = 1, and takes no
    part in the normalisation. alpha 0 gives exactly 1.
    """
    alive = size > 0
    out = size.new_ones(len(alphas), len(size))
    if not bool(alive.any()):
        return out
    base = size[alive].clamp(min=torch.finfo(torch.float32).tiny)
    for row, alpha in zip(out, alphas, strict=True):
        s = (base**alpha).clamp(min=1e-4)
        row[alive] = s / (s.max() * s.min()).sqrt()
    return out


def output_loss(
    reader: Reader, hessian: Tensor, scales: Tensor, rows: Tensor | None = None
) -> Tensor:
    """tr(D H Dᵀ) for each candidate: fp64 [candidates].

    hessian: XᵀX [n, n] of the unscaled value. scales: [candidates, n], positive. rows: int64, the
    rows of the weight that count; None takes all.
    """
    w = reader.weight if rows is None else reader.weight[rows]
    wt = w.t().contiguous()
    diagonal = hessian.diagonal().to(wt)
    deltas = []
    for s in scales.to(wt):
        scaled = wt * s[:, None]
        weights = diagonal / s.square() if reader.weighed else None
        if reader.grid.clip == "output":
            weights = hessian.to(wt) / (s[:, None] * s)
        rounded = rtn_t(scaled, reader.grid, importance=weights)[0]
        deltas.append(rounded.sub_(scaled).div_(s[:, None]))
    delta = torch.cat(deltas, 1)
    per_row = (hessian.to(wt) @ delta).mul_(delta).sum(0, dtype=torch.float64)
    return per_row.view(len(scales), -1).sum(1).cpu()


def search(readers: Sequence[Reader], hessian: Tensor, scales: Tensor, rows: int = ROWS) -> Found:
    """The candidate [candidates, n] of least loss; never one worse than the first.

    All candidates are ranked on ``rows`` evenly spaced rows of each reader, then the best and the
    first one are judged on all rows.
    """
    ranks = torch.zeros(len(scales), dtype=torch.float64)
    for reader in readers:
        m = len(reader.weight)
        some = None if m <= rows else torch.linspace(0, m - 1, rows).round().long()
        ranks += max(1.0, m / rows) * output_loss(reader, hessian, scales, some)
    best = int(ranks.argmin())
    pick = scales[[0, best]] if best else scales[:1]
    exact = torch.stack([output_loss(r, hessian, pick) for r in readers]).sum(0)
    base, loss = float(exact[0]), float(exact[-1])
    return Found(best, loss, base) if loss < base else Found(0, base, base)
