"""spqr: tiny groups whose scales are codes themselves, and outliers that the sweep keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.errors import UsageError
from ..compiler.ir.scheme import Codes, Sparse
from ..compiler.pipeline.base import knob
from ..compiler.pipeline.coding import GroupedCoding, group_knob
from ..compiler.solvers.outliers import outlier_count


@dataclass(frozen=True)
class SpQR(GroupedCoding):
    """W → (q - z)·(low + p·step) + S, p a scale's code, S what would cost most to round.

    A weight stays in S where the sweep meets it with a squared error of more than the threshold,
    relative to the variance of the weights and counted as the inputs still free would leave it.
    Ranges are fitted without weights that widen them for more than that, and again without S.
    Scales share low and step per 16 output rows; zero points are integers of as many bits as q.
    """

    variants = {"spqr": {}}
    source = "SpQR, arXiv 2306.03078"

    bits: int = knob(3, "bits of a code", lo=2, hi=8)
    group: int | str | None = group_knob(16)
    symmetric: bool = knob(False, "no stored zero points")
    scale_bits: int = knob(3, "bits of the code of a scale", lo=1, hi=8)
    threshold: float | None = knob(
        0.2, "relative cost beyond which a weight stays; none keeps all on the grid", lo=0.0
    )
    most: float = knob(0.03, "share of the weights that may stay", lo=0.0, hi=1.0)

    def check(self) -> None:
        super().check()
        if self.double or self.power:
            raise UsageError(f"{self.called}: expected neither double nor power: scales are codes")
        if self.solver == "rtn" and self.threshold is not None:
            raise UsageError(
                f"{self.called}:solver: expected gptq, whose sweep finds what stays, found rtn",
                hint="threshold=none keeps all on the grid",
            )

    def codes(self, site: LinearSite) -> Codes:
        return Codes(self.bits, self.grouped(site), self.symmetric, bilevel=self.scale_bits)

    def beside(self, site: LinearSite) -> Sparse | None:
        count = outlier_count(self.most, site.in_features * site.out_features)
        return Sparse("outliers", self.most) if count and self.threshold is not None else None

    def solving(self, site: LinearSite) -> dict[str, Any]:
        limit = {} if self.beside(site) is None else {"threshold": self.threshold}
        return super().solving(site) | limit
