"""gobo: one table of levels per matrix, and the weights that its Gaussian does not expect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.scheme import Codes, Sparse
from ..compiler.pipeline.base import knob
from ..compiler.pipeline.coding import Coding
from ..compiler.solvers.outliers import outlier_count


@dataclass(frozen=True)
class Gobo(Coding):
    """W → level[q] + S, levels by k-means under the L1 rule, S the unlikely weights as they are."""

    variants = {"gobo": {}}
    source = "GOBO, arXiv 2005.03842"

    bits: int = knob(3, "bits of a code", lo=1, hi=8)
    solver: str = knob(
        "rtn",
        "how codes are chosen: rtn takes the nearest level, gptq compensates on top",
        choices=("rtn", "gptq"),
    )
    density: float = knob(-4.0, "log-density below which a weight is an outlier", lo=-50, hi=50)
    most: float = knob(0.01, "share of the weights that outliers may be at most", lo=0.0, hi=0.2)

    def codes(self, site: LinearSite) -> Codes:
        return Codes(self.bits, None, grid="shared")

    def beside(self, site: LinearSite) -> Sparse | None:
        count = outlier_count(self.most, site.in_features * site.out_features)
        return Sparse("outliers", self.most) if count else None

    def solving(self, site: LinearSite) -> dict[str, Any]:
        return super().solving(site) | {"density": self.density}
