"""Table grids: any levels times a scale per group, and levels that follow from the weights' own
quantiles.

The levels are given as values by code; names for them are the caller's. Snapping looks the nearest
one up between sorted midpoints; a tie takes the lower level.

Sources: QLoRA (arXiv 2305.14314) for absmax scales; BitNet b1.58 (arXiv 2402.17764) and BWN (arXiv
1603.05279) for scales by the mean magnitude; ZeroQuant-FP (arXiv 2307.09782) for powers of two;
8-bit optimizers (arXiv 2110.02861) for quantile levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..ir.errors import UsageError
from .double import ScaleCodes
from .grid import CLIPS, Bounds, Fit, Grid, group_absmax


def midpoints(levels: Tensor) -> Tensor:
    """Between neighbours of ascending levels ``[..., k, m]`` or ``[k]``: one fewer."""
    if levels.dim() == 1:
        return (levels[1:] + levels[:-1]) / 2
    return (levels[..., 1:, :] + levels[..., :-1, :]) / 2


def nearest(values: Tensor, mids: Tensor) -> Tensor:
    """Index of the nearest level, int64 like values: ``[m]`` or ``[..., g, m]``.

    mids: ``[k]``, shared by all, or ``[..., k, m]``, each column's own.
    """
    if mids.dim() == 1:
        return torch.bucketize(values.contiguous(), mids)
    if values.dim() == 1:
        return (values > mids).sum(0)
    index = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    for k in range(mids.shape[-2]):
        index += values > mids[..., k : k + 1, :]
    return index


def snap_to(values: Tensor, bounds: Bounds, out: Tensor) -> Tensor:
    """`Grid.snap` where bounds are midpoints and ascending levels."""
    mids, levels = bounds
    assert isinstance(mids, Tensor)
    assert isinstance(levels, Tensor)
    index = nearest(values, mids)
    if levels.dim() == 1:
        return out.copy_(levels[index])
    if values.dim() == 1:
        return out.copy_(levels.gather(0, index[None])[0])
    return out.copy_(levels.gather(-2, index))


@dataclass(frozen=True)
class TableGrid(Grid):
    """Fixed levels times a scale per group.

    values: the level of each code, NaN for a code that stands for none; ``2**bits`` of them. clip:
    as for `Grid`, where absmax lets the largest weight meet the outermost level of its side, or
    ``"absmean"``: the scale is the mean magnitude (ternary and binary levels).
    """

    values: tuple[float, ...] = ()

    clips: ClassVar[tuple[str, ...]] = (*CLIPS, "absmean")

    def _check_bits(self) -> None:
        if not 1 <= self.bits <= 8 or len(self.values) != 1 << self.bits:
            raise UsageError(
                f"table grid: expected 2**bits levels, found {len(self.values)} for {self.bits}"
            )
        if not self.symmetric:
            raise UsageError("table grid: expected no zero point beside levels, found one")

    @property
    def has_zero(self) -> bool:
        return 0.0 in self.values

    @cached_property
    def _ready(self) -> dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor]]:
        return {}

    def ordered(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Midpoints, distinct levels ascending, and the first code of each, as like's dtype."""
        key = (like.dtype, like.device)
        if key not in self._ready:
            first: dict[float, int] = {}
            for code, value in enumerate(self.values):
                if not math.isnan(value):
                    first.setdefault(value + 0.0, code)
            levels = torch.tensor(sorted(first), dtype=like.dtype, device=like.device)
            codes = torch.tensor([first[v] for v in sorted(first)], device=like.device)
            self._ready[key] = midpoints(levels), levels, codes
        return self._ready[key]

    def snap(self, values: Tensor, bounds: Bounds, out: Tensor) -> Tensor:
        """The nearest level of each value; a tie goes to the lower one."""
        mids, levels, _ = self.ordered(values)
        return snap_to(values, (mids, levels), out)

    def codes(self, centred: Tensor, fit: Fit) -> Tensor:
        mids, _, codes = self.ordered(centred)
        return codes[nearest(centred, mids)].to(torch.uint8)

    def fit(
        self,
        w: Tensor,
        *,
        keep: Tensor | None = None,
        importance: Tensor | None = None,
        unit: float = 1.0,
    ) -> Fit:
        if self.clip != "absmean":
            return super().fit(w, keep=keep, importance=importance, unit=unit)
        size = w.abs() if keep is None else w.abs() * keep
        # Masked weights are zeros here, and so is the padding of a short last group.
        return Fit(self.store(size.sum(-2) / (size > 0).sum(-2).clamp(min=1), unit), None)

    def ranged(self, low: Tensor, high: Tensor, unit: float = 1.0) -> Fit:
        _, levels, _ = self.ordered(low)
        needed = torch.maximum(-low / -levels[0], high / levels[-1])
        return Fit(self.store(needed, unit), None)

    def _shrinks(self) -> list[float]:
        few = len(self.values) <= 4  # the outermost of few levels stands for the middle of a half
        return [1.0 - 0.05 * i for i in range(1, 18)] if few else [1 - 0.04 * i for i in range(13)]


@dataclass(frozen=True)
class QuantileGrid(Grid):
    """Levels at the quantiles of a matrix's own weights, each divided by its group's scale.

    One table for the matrix, stored as 16-bit floats: level i lies midway between neighbours of the
    ``2**bits + 1`` quantiles, all are stretched to reach 1, and the one nearest to 0 becomes 0.
    """

    MOST: ClassVar[int] = 1 << 20
    """Weights whose quantiles are taken, evenly spaced ones of a larger matrix."""

    @property
    def whole(self) -> bool:
        return True

    def bounds(self, zero: Tensor | None, table: Tensor | None = None) -> Bounds:
        assert table is not None
        levels = table.reshape(-1)
        return midpoints(levels), levels

    def snap(self, values: Tensor, bounds: Bounds, out: Tensor) -> Tensor:
        return snap_to(values, bounds, out)

    def codes(self, centred: Tensor, fit: Fit) -> Tensor:
        mids, _ = self.bounds(None, fit.table)
        assert isinstance(mids, Tensor)
        return nearest(centred, mids).to(torch.uint8)

    def stored(self, table: Tensor, unit: float = 1.0) -> Tensor:
        return table.reshape(1, -1).to(torch.float16)

    def fit_whole(
        self,
        wt: Tensor,
        *,
        keep: Tensor | None = None,
        importance: Tensor | None = None,
        unit: float = 1.0,
    ) -> tuple[Fit, ScaleCodes | None]:
        scale = group_absmax(wt if keep is None else wt * keep, self)
        units = (wt / self.spread(torch.where(scale > 0, scale, 1.0), len(wt))).reshape(-1)
        units = units if keep is None else units[keep.reshape(-1)]
        levels = self._levels(units[:: max(1, len(units) // self.MOST)])
        fixed = TableGrid(
            self.bits, self.group, clip=self.clip, scale_dtype=self.scale_dtype, power=self.power,
            double=self.double, percentile=self.percentile, values=tuple(levels.tolist()),
        )  # fmt: skip
        fit, double = fixed.fit_whole(wt, keep=keep, importance=importance, unit=unit)
        return fit._replace(table=levels.to(wt)[None, :, None]), double

    def _levels(self, units: Tensor) -> Tensor:
        count = 1 << self.bits
        if not len(units):
            return torch.linspace(-1, 1, count)
        ordered = units.double().sort().values
        at = torch.linspace(0, len(ordered) - 1, count + 2, dtype=torch.float64)[1:-1]
        at = at.to(ordered.device)
        found = torch.lerp(ordered[at.floor().long()], ordered[at.ceil().long()], at.frac())
        top = found.abs().max()
        found = (found / top if bool(top > 0) else found).half().double()
        found[found.abs().argmin()] = 0.0
        return found.sort().values
