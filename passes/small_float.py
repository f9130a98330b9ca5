"""fp4 and fp8w: weights as floats of few bits, times a scale per group."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.scheme import Codes
from ..compiler.pipeline.base import knob
from ..compiler.pipeline.coding import GroupedCoding, group_knob


@dataclass(frozen=True)
class Float4(GroupedCoding):
    """W → float(q)·scale, q the four bits of an e2m1 float: ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}.

    power=true keeps scales that only move exponents.
    """

    variants = {"fp4": {}}
    source = "ZeroQuant-FP, arXiv 2307.09782; OCP Microscaling formats 1.0"

    group: int | str | None = group_knob(32)

    def codes(self, site: LinearSite) -> Codes:
        group = self.grouped(site)
        return Codes(4, group, grid="e2m1", double=self.double, power=self.power)


@dataclass(frozen=True)
class Float8(GroupedCoding):
    """W → float(q)·scale, q the byte of an 8-bit float, one scale per row unless grouped."""

    variants = {"fp8w": {}}
    source = "FP8 formats, arXiv 2209.05433; ZeroQuant-FP, arXiv 2307.09782"

    group: int | str | None = group_knob(None)
    format: str = knob("e4m3", "exponent and mantissa bits", choices=("e4m3", "e5m2"))

    def codes(self, site: LinearSite) -> Codes:
        group = self.grouped(site)
        return Codes(8, group, grid=self.format, double=self.double, power=self.power)
