"""Binary-coding grids: a weight is a sum of a few factors, each with a sign of its own.

``w = sum_i factor_i * b_i``, ``b_i`` in {-1, 1}, factors per group of inputs. The greedy start
takes the sign and mean magnitude of what is left, plane after plane; then factors (least squares)
and signs (the nearest of all sums) take turns, and the best of all turns is kept.

Sources: alternating multi-bit quantisation (Xu et al., arXiv 1802.00150); LUT-GEMM (arXiv
2206.09557).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ir.errors import UsageError
from .double import DoubleScales
from .grid import Bounds, Fit, Grid, _folded
from .tables import midpoints, nearest, snap_to

_TURNS = 8
_CHUNK = 1 << 20  # weights worked on at a time


def sums(factors: Tensor) -> Tensor:
    """All sums ``[..., 2**b, m]`` of factors ``[..., b, m]``; bit i of the index is sign i.

    Added plane after plane, as decoding adds them.
    """
    total: Tensor | None = None
    patterns = torch.arange(1 << factors.shape[-2], device=factors.device)
    for i in range(factors.shape[-2]):
        sign = ((patterns >> i) & 1).to(factors.dtype) * 2 - 1
        plane = sign[:, None] * factors[..., i : i + 1, :]
        total = plane if total is None else total + plane
    assert total is not None
    return total


@dataclass(frozen=True)
class BinaryGrid(Grid):
    """Sums of ``bits`` signed factors per group, factors stored in ``scale_dtype``."""

    scaled: ClassVar[bool] = False
    clips: ClassVar[tuple[str, ...]] = ("absmax",)

    def _check_bits(self) -> None:
        if not 1 <= self.bits <= 5:
            raise UsageError(f"signed factors: expected 1 to 5 bits, found {self.bits}")
        if not self.symmetric or self.double or self.power:
            raise UsageError("signed factors: expected no zero point and plain factors")

    @property
    def has_zero(self) -> bool:
        return False

    @property
    def whole(self) -> bool:
        return True

    def bounds(self, zero: Tensor | None, table: Tensor | None = None) -> Bounds:
        assert table is not None
        levels = sums(table).sort(-2).values
        return midpoints(levels), levels

    def snap(self, values: Tensor, bounds: Bounds, out: Tensor) -> Tensor:
        return snap_to(values, bounds, out)

    def codes(self, centred: Tensor, fit: Fit) -> Tensor:
        """Sign i of a weight is bit i of its code."""
        assert fit.table is not None
        n, m = centred.shape
        values, levels = _folded(centred, self), sums(fit.table)
        order = levels.sort(-2).indices
        at = nearest(values, midpoints(levels.gather(-2, order)))
        return order.gather(-2, at).view(-1, m)[:n].to(torch.uint8)

    def stored(self, table: Tensor, unit: float = 1.0) -> Tensor:
        """``[bits, m, G]``."""
        top = float(torch.finfo(self.scale_dtype).max)
        real = (table.double() * unit).clamp(-top, top)
        return real.permute(1, 2, 0).to(self.scale_dtype).contiguous()

    def decoded(self, codes: Tensor, table: Tensor, n: int) -> Tensor:
        total: Tensor | None = None
        for i, factors in enumerate(table.float()):
            sign = ((codes >> i) & 1).float() * 2 - 1
            plane = sign * self.spread(factors.t(), n)
            total = plane if total is None else total + plane
        assert total is not None
        return total

    def fit_whole(
        self,
        wt: Tensor,
        *,
        keep: Tensor | None = None,
        importance: Tensor | None = None,
        unit: float = 1.0,
    ) -> tuple[Fit, DoubleScales | None]:
        n, m = wt.shape
        weights = wt.new_ones(n, 1) if importance is None else importance.view(n, -1)
        weights = weights.expand(n, m).clamp(min=0)
        weights = weights if keep is None else weights * keep
        w, h = _folded(wt, self), _folded(weights, self)
        some = max(1, _CHUNK // (w.shape[1] * m))
        parts = zip(w.split(some), h.split(some), strict=True)
        table = torch.cat([_alternated(a, b, self.bits) for a, b in parts])
        kept = (self.stored(table, unit).double() / unit).permute(2, 0, 1)
        return Fit(wt.new_ones(len(table), m), None, kept.to(wt.dtype).contiguous()), None


def _alternated(w: Tensor, h: Tensor, bits: int) -> Tensor:
    """Factors ``[G, bits, m]`` for weights w and importances h ``[G, g, m]``."""
    top = h.amax(1, keepdim=True)
    h = torch.where(top > 0, h / torch.where(top > 0, top, 1.0), 1.0)
    mass = h.sum(1)
    rest, greedy = w, []
    for _ in range(bits):
        factor = (h * rest.abs()).sum(1) / mass
        greedy.append(factor)
        rest = rest - torch.where(rest >= 0, 1.0, -1.0) * factor[:, None]
    best = factors = torch.stack(greedy, 1)
    least: Tensor | None = None
    for turn in range(_TURNS + 1):
        levels = sums(factors)
        order = levels.sort(1).indices
        near = levels.gather(1, order)
        at = nearest(w, midpoints(near))
        cost = (h * (w - near.gather(1, at)).square()).sum(1)
        better = cost < (torch.inf if least is None else least)
        best = torch.where(better[:, None], factors, best)
        least = cost if least is None else torch.minimum(least, cost)
        if turn == _TURNS or not bool(better.any()):
            break
        code = order.gather(1, at)
        signs = torch.stack([((code >> i) & 1).to(w.dtype) * 2 - 1 for i in range(bits)], -1)
        gram = torch.einsum("gnm,gnmi,gnmj->gmij", h, signs, signs)
        gram = gram + 1e-6 * mass[..., None, None] * torch.eye(bits).to(w)
        right = torch.einsum("gnm,gnmi,gnm->gmi", h, signs, w)
        factors = torch.linalg.solve(gram, right).mT
    return best
