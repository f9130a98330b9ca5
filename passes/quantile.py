"""quantile: weights on the quantiles of their own matrix."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.scheme import Codes
from ..compiler.pipeline.base import knob
from ..compiler.pipeline.coding import GroupedCoding, group_knob


@dataclass(frozen=True)
class Quantile(GroupedCoding):
    """W → level[q]·scale, levels at quantiles of the matrix's own scaled weights, one table."""

    variants = {"quantile": {}}
    source = "8-bit optimizers, arXiv 2110.02861; k-bit inference scaling laws, arXiv 2212.09720"

    bits: int = knob(4, "bits of a code", lo=2, hi=8)
    group: int | str | None = group_knob(64)

    def codes(self, site: LinearSite) -> Codes:
        group = self.grouped(site)
        return Codes(self.bits, group, grid="quantile", double=self.double, power=self.power)
