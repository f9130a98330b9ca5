"""A uniform grid whose ranges are learned: rounding that gradients pass through.

The range of each group is its weights' own, shortened by two learned shares; rounding passes
gradients straight through (STE). Forwards it is the very grid: values, scales and zero points are
those of `Grid` at the same range. Source: OmniQuant (arXiv 2308.13137), learnable weight clipping.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .grid import Fit, Grid, _folded


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, exact: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def through(value: Tensor, exact: Tensor) -> Tensor:
    """``exact`` forwards to the bit, the gradient of ``value`` backwards."""
    out: Tensor = _Through.apply(value, exact)  # type: ignore[no-untyped-call]
    return out


def learned_fit(wt: Tensor, grid: Grid, low: Tensor, high: Tensor) -> Fit:
    """Scales and zeros ``[G, m]`` of weights [n, m] at shares of each group's range.

    low, high: shares ``[G, m]`` of the smallest and of the largest weight, in (0, 1]; at 1 the fit
    is that of clip="absmax". Differentiable in all three.
    """
    w = _folded(wt, grid)
    bottom, top = w.amin(1).clamp(max=0) * low, w.amax(1).clamp(min=0) * high
    fixed = grid.ranged(bottom.detach(), top.detach())
    if fixed.zero is None:
        raw = torch.maximum(-bottom, top) / (grid.implied_zero - 0.5)
        return Fit(through(raw, fixed.scale), None)
    scale = through((top - bottom) / (2**grid.bits - 1), fixed.scale)
    return Fit(scale, through(-bottom / scale, fixed.zero))


def rounded(wt: Tensor, grid: Grid, fit: Fit) -> Tensor:
    """Weights [n, m] on the grid; gradients reach wt and the fit."""
    n, m = wt.shape
    scale = fit.scale.unsqueeze(1)
    zero = float(grid.implied_zero) if fit.zero is None else fit.zero.unsqueeze(1)
    units = _folded(wt, grid) / scale
    codes = through(units, torch.round(units.detach())) + zero
    centred = codes.clamp(0, 2**grid.bits - 1) - zero
    return (centred * scale).reshape(-1, m)[:n]
