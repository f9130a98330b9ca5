"""Grids whose levels are weights: a table per output row, or one per matrix, found by k-means.

Sources: SqueezeLLM (arXiv 2306.07629): rows of their own, errors weighted by sensitivity; GOBO
(arXiv 2005.03842): one table for the matrix, found on everything but outliers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ir.errors import UsageError
from .double import DoubleScales
from .grid import Bounds, Fit, Grid
from .kmeans import kmeans, stopped_by_l1
from .tables import midpoints, nearest, snap_to


@dataclass(frozen=True)
class LutGrid(Grid):
    """``2**bits`` levels by k-means, stored in ``scale_dtype``; no scales, no groups.

    shared: one table for the whole matrix, by the L1 rule (GOBO); else one per row, weighted by the
    sensitivity of each weight. pinned: one of the levels is 0, for zeros that a mask scatters.
    """

    shared: bool = False
    pinned: bool = False

    scaled: ClassVar[bool] = False
    clips: ClassVar[tuple[str, ...]] = ("absmax",)

    def _check_bits(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError(f"table of levels: expected 1 to 8 bits, found {self.bits}")
        if self.group is not None or not self.symmetric or self.double or self.power:
            raise UsageError(
                "table of levels: expected no group, zero point or kind of scale, for levels are "
                "weights themselves"
            )

    @property
    def has_zero(self) -> bool:
        return self.pinned

    @property
    def whole(self) -> bool:
        return True

    def bounds(self, zero: Tensor | None, table: Tensor | None = None) -> Bounds:
        assert table is not None
        if table.shape[-1] == 1:
            table = table.reshape(-1)
        return midpoints(table), table

    def snap(self, values: Tensor, bounds: Bounds, out: Tensor) -> Tensor:
        return snap_to(values, bounds, out)

    def codes(self, centred: Tensor, fit: Fit) -> Tensor:
        assert fit.table is not None
        mids, _ = self.bounds(None, fit.table[0])
        assert isinstance(mids, Tensor)
        return nearest(centred, mids).to(torch.uint8)

    def stored(self, table: Tensor, unit: float = 1.0) -> Tensor:
        """``[m, 2**bits]``, or ``[1, 2**bits]`` where it is shared."""
        top = float(torch.finfo(self.scale_dtype).max)
        real = (table[0].double() * unit).clamp(-top, top)
        return real.t().to(self.scale_dtype).contiguous()

    def decoded(self, codes: Tensor, table: Tensor, n: int) -> Tensor:
        levels = table.float().t().expand(-1, codes.shape[1])
        return levels.gather(0, codes.long())

    def fit_whole(
        self,
        wt: Tensor,
        *,
        keep: Tensor | None = None,
        importance: Tensor | None = None,
        unit: float = 1.0,
    ) -> tuple[Fit, DoubleScales | None]:
        n, m = wt.shape
        free = (1 << self.bits) - self.pinned
        if self.shared:
            flat = wt.reshape(1, -1) if keep is None else wt[keep][None]
            flat = flat if flat.shape[1] else wt.reshape(1, -1)
            centres = stopped_by_l1(flat, free)
        else:
            weights = wt.new_ones(n, 1) if importance is None else importance.view(n, -1)
            weights = weights.expand(n, m).clamp(min=0)
            if keep is not None:
                weights = weights * keep
            centres = kmeans(wt.t().contiguous(), weights.t().contiguous(), free)
        if self.pinned:
            centres = torch.nn.functional.pad(centres, (1, 0)).sort(1).values
        table = centres.t()[None]
        kept = self.stored(table, unit).double().t()[None] / unit
        return Fit(wt.new_ones(1, m), None, kept.to(wt.dtype).contiguous()), None
