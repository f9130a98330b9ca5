"""bcq: weights as sums of a few signed factors."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.scheme import Codes
from ..compiler.pipeline.base import Precondition, knob
from ..compiler.pipeline.coding import Coding, group_divides
from ..compiler.pipeline.sites import BLOCK_WEIGHT


@dataclass(frozen=True)
class BinaryCoding(Coding):
    """W → Σ factorᵢ·bᵢ with bᵢ in {-1, 1}, factors per group of inputs, one bit plane each.

    A greedy start, then factors by least squares and signs by the nearest sum take turns.
    """

    variants = {"bcq": {}}
    source = "LUT-GEMM, arXiv 2206.09557; alternating multi-bit quantisation, arXiv 1802.00150"
    preconditions = (*BLOCK_WEIGHT, Precondition("group_divides", group_divides))

    bits: int = knob(3, "bit planes", lo=1, hi=5)
    group: int | None = knob(
        128,
        "inputs that share factors, or row; the default ends in a shorter group",
        lo=8,
        hi=65536,
    )

    def codes(self, site: LinearSite) -> Codes:
        group = None if self.group is None or self.group >= site.in_features else self.group
        return Codes(self.bits, group, grid="signs")
