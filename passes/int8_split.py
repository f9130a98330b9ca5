"""int8_split: vector-wise int8, with the columns that hold outliers beside it as they are."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.scheme import Codes, InputGrid, Sparse
from ..compiler.pipeline.base import knob
from ..compiler.pipeline.coding import RoundedCoding


@dataclass(frozen=True)
class Int8Split(RoundedCoding):
    """x Wᵀ → grid(x without O) deq(q)ᵀ + x_O W_Oᵀ, O the inputs that reach the threshold.

    O is found on calibration data behind smooth, and neither W's grid nor x's scales see it. At run
    time a token that holds a larger value outside of O is not rounded: its products are of floats.
    """

    variants = {"int8_split": {}}
    source = "LLM.int8, arXiv 2208.07339"

    group: int | None = knob(None, "inputs that share a scale, or row", lo=8, hi=65536)
    threshold: float | None = knob(
        6.0, "magnitude from which an input is an outlier; none for plain int8", lo=0.0, hi=1e30
    )
    most: float = knob(0.1, "share of the inputs that may be outliers", lo=0.0, hi=1.0)

    def codes(self, site: LinearSite) -> Codes:
        group = self.grouped(site)
        return Codes(8, group, double=self.double, power=self.power)

    def beside(self, site: LinearSite) -> Sparse | None:
        return None if self.threshold is None else Sparse("columns", self.most, self.threshold)

    def reads(self, site: LinearSite) -> InputGrid | None:
        return self.rounded(8)
