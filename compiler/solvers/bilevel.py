"""Scales that are codes of few bits: each group of inputs shares a range per 16 output rows.

A scale is ``low + q·step``. Zero points are integers of the weights' own bits and are stored as
they are, packed: rounded once more they would cost more bits than that, and 0 would leave the grid.

Source: SpQR (arXiv 2306.03078), whose second level is asymmetric, 3 bits and 16 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.errors import UsageError
from .double import ROWS, BilevelScales
from .grid import Fit, Grid, group_absmax


@dataclass(frozen=True)
class BilevelGrid(Grid):
    """A uniform grid whose scales are codes of ``scale_bits``."""

    scale_bits: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.double or self.power or self.scale_dtype != torch.float32:
            raise UsageError("bilevel grid: expected float32 scales, neither double nor power")
        if not 1 <= self.scale_bits <= 8:
            raise UsageError(f"bilevel grid: expected 1 to 8 scale bits, found {self.scale_bits}")

    @property
    def whole(self) -> bool:
        return True

    def fit_whole(
        self,
        wt: Tensor,
        *,
        keep: Tensor | None = None,
        importance: Tensor | None = None,
        unit: float = 1.0,
    ) -> tuple[Fit, BilevelScales]:
        fit, _ = super().fit_whole(wt, keep=keep, importance=importance, unit=unit)
        empty = group_absmax(wt if keep is None else wt * keep, self) == 0
        made = bilevel_scales(fit.scale.double() * unit, empty, self.scale_bits)
        scale = (made.decoded().double() / unit).to(fit.scale.dtype)
        zero = fit.zero
        if zero is not None:
            zero = torch.round(zero * fit.scale / scale).clamp_(0, 2**self.bits - 1)
        return Fit(scale, zero), made


def bilevel_scales(scale: Tensor, empty: Tensor, bits: int) -> BilevelScales:
    """Round positive scales ``[G, m]`` to codes that decode to positive ones.

    empty: bool ``[G, m]``, groups without a weight, whose scale is free.
    """
    groups, rows = scale.shape
    info, levels = torch.finfo(torch.float16), 2**bits - 1

    def blocks(x: Tensor, fill: float) -> Tensor:
        padded = torch.nn.functional.pad(x.masked_fill(empty, fill), (0, -rows % ROWS), value=fill)
        return padded.view(groups, -1, ROWS)

    least, most = blocks(scale, torch.inf).amin(-1), blocks(scale, -torch.inf).amax(-1)
    least = torch.where(torch.isfinite(least), least, 1.0)
    low = least.clamp(info.tiny, info.max).to(torch.float16)
    step = ((most - low.double()) / levels).clamp(0, info.max).to(torch.float16)
    wide = [t.double().repeat_interleave(ROWS, 1)[:, :rows] for t in (low, step)]
    q = ((scale - wide[0]) / wide[1]).nan_to_num(0.0, levels, 0.0).round_().clamp_(0, levels)
    return BilevelScales(q.masked_fill(empty, 0.0).to(torch.uint8), step, low)
