"""nf4 and its siblings: weights on the quantiles of a normal distribution."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.scheme import Codes
from ..compiler.pipeline.base import knob
from ..compiler.pipeline.coding import GroupedCoding, group_knob


@dataclass(frozen=True)
class NormalFloat(GroupedCoding):
    """W → level[q]·scale, levels at quantiles of N(0, 1) with 0 and ±1 exact, scale the absmax.

    Blocks run along rows. With solver=rtn and double=true this is QLoRA's NF4 at 4.127 bits.
    """

    variants = {f"nf{b}": {"bits": b} for b in (4, 3, 2)}
    source = "QLoRA, arXiv 2305.14314"

    bits: int = knob(4, "bits of a code", lo=2, hi=8)
    group: int | str | None = group_knob(64)

    def codes(self, site: LinearSite) -> Codes:
        group = self.grouped(site)
        return Codes(self.bits, group, grid="nf", double=self.double, power=self.power)
