"""squeezellm: a table of levels per row, where errors weigh what they cost, and sparse outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.errors import UsageError
from ..compiler.ir.scheme import Codes, Sparse
from ..compiler.pipeline.base import knob
from ..compiler.pipeline.coding import Coding
from ..compiler.solvers.outliers import outlier_count


@dataclass(frozen=True)
class SqueezeLLM(Coding):
    """W → level[row][q] + S, levels by weighted k-means, S the largest and most sensitive weights.

    The weight of an error is the Fisher information of the whole model's loss, or the diagonal of
    XᵀX. Levels are weights: there is no scale.
    """

    variants = {"squeezellm": {}}
    source = "SqueezeLLM, arXiv 2306.07629"

    bits: int = knob(4, "bits of a code", lo=1, hi=8)
    solver: str = knob(
        "rtn",
        "how codes are chosen: rtn takes the nearest level, gptq compensates on top",
        choices=("rtn", "gptq"),
    )
    weigh: str = knob(
        "fisher", "what an error weighs: the Fisher information, or XᵀX", choices=("fisher", "gram")
    )
    samples: int = knob(16, "calibration windows whose gradients are taken", lo=1)
    outliers: float = knob(0.0045, "share of the largest weights that stay", lo=0.0, hi=0.2)
    sensitive: float = knob(0.0005, "share of the most sensitive ones too", lo=0.0, hi=0.2)

    def check(self) -> None:
        if self.explicit("samples") and self.weigh != "fisher":
            raise UsageError(f"{self.called}:samples: expected weigh=fisher beside it")

    def codes(self, site: LinearSite) -> Codes:
        return Codes(self.bits, None, grid="lut")

    def beside(self, site: LinearSite) -> Sparse | None:
        share = self.outliers + self.sensitive
        count = outlier_count(share, site.in_features * site.out_features)
        return Sparse("outliers", share) if count else None

    def solving(self, site: LinearSite) -> dict[str, Any]:
        how: dict[str, Any] = {"weigh": self.weigh, "sensitive": self.sensitive}
        if self.weigh == "fisher":
            how["samples"] = self.samples
        return super().solving(site) | how
