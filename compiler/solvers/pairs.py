"""A grid whose levels belong to two neighbouring inputs together: outlier-victim pairs.

How a pair is rounded and written is the caller's; this module fits the scale, which decides what
counts as an outlier. Source: OliVe (arXiv 2304.07493), where three deviations do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ir.errors import UsageError
from .grid import Bounds, Fit, Grid


@dataclass(frozen=True)
class PairGrid(Grid):
    """Pairs of inputs 2i and 2i + 1; rounds whole groups, so that no sweep can use it.

    rounded: values [..., n] in units of the scale to those of the grid. encoded: such to uint8
    codes. usual: means of |w| that usual weights reach. clip: ``"absmax"`` scales by that, or by
    the largest weight if it is smaller; ``"mse"`` searches both, and shorter ranges.
    """

    rounded: Callable[[Tensor], Tensor] | None = None
    encoded: Callable[[Tensor], Tensor] | None = None
    usual: float = 3.0

    clips: ClassVar[tuple[str, ...]] = ("absmax", "mse")

    def _check_bits(self) -> None:
        if self.rounded is None or self.encoded is None or not self.symmetric:
            raise UsageError("pair grid: expected how pairs are rounded, and no zero point")
        if self.group is not None and self.group % 2:
            raise UsageError(f"pair grid: expected an even group, found {self.group}")

    def snap(self, values: Tensor, bounds: Bounds, out: Tensor) -> Tensor:
        """Whole groups ``[..., g, m]`` alone: a pair is rounded at once."""
        if values.dim() < 2 or values.shape[-2] % 2 or self.rounded is None:
            raise UsageError(
                f"pair grid: expected an even number of inputs, found {list(values.shape)}",
                hint="solver=rtn, without sweeps",
            )
        return out.copy_(self.rounded(values.mT).mT)

    def codes(self, centred: Tensor, fit: Fit) -> Tensor:
        assert self.encoded is not None
        return self.encoded(centred.t()).t()

    def fit(
        self,
        w: Tensor,
        *,
        keep: Tensor | None = None,
        importance: Tensor | None = None,
        unit: float = 1.0,
    ) -> Fit:
        w = w if keep is None else w * keep
        top = w.abs().amax(-2)
        # Zeros are padding or masked: they say nothing about how wide the others lie.
        usual = self.usual * w.abs().sum(-2) / (w != 0).sum(-2).clamp(min=1)
        best = self._reaching(torch.minimum(top, usual), unit)
        if self.clip != "mse":
            return best
        cost = self._cost(w, best, importance)
        for shrink in self._shrinks():
            for size in (top * shrink, torch.minimum(top, 1.4 * shrink * usual)):
                trial = self._reaching(size, unit)
                found = self._cost(w, trial, importance)
                better = found < cost
                cost = torch.where(better, found, cost)
                best = Fit(torch.where(better, trial.scale, best.scale), None)
        return best

    def _reaching(self, size: Tensor, unit: float) -> Fit:
        return Fit(self.store(size / (self.implied_zero - 1), unit), None)
