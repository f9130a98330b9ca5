"""w4 and its siblings: weights on a uniform integer grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.errors import UsageError
from ..compiler.ir.scheme import Codes
from ..compiler.pipeline.base import knob
from ..compiler.pipeline.coding import GroupedCoding


@dataclass(frozen=True)
class QuantizeWeights(GroupedCoding):
    """W → (q - z)·scale, q an integer of that many bits, one scale per group of inputs.

    gptq rounds one input after another and lets the inputs still free compensate; rtn takes the
    nearest code. With a mask in the same string the two are one joint solve: masked weights lie on
    the grid's exact zero.
    """

    variants = {f"w{b}": {"bits": b} for b in (8, 6, 5, 4, 3, 2)}
    source = "GPTQ, arXiv 2210.17323"

    bits: int = knob(4, "bits of a code", lo=2, hi=8)
    symmetric: bool = knob(True, "no stored zero point; false stores one per group")
    clip: str = knob(
        "mse",
        "how the range is fitted: mse searches the shrink that costs least, absmax takes it all, "
        "percentile leaves out the rarest, output searches what each group loses at the output, "
        "learned trains the ranges on the block's outputs",
        choices=("mse", "absmax", "percentile", "output", "learned"),
    )
    epochs: int = knob(4, "with clip=learned: passes over its windows", lo=0, hi=1000)
    windows: int = knob(16, "with clip=learned: calibration windows that it trains on", lo=1)

    def solving(self, site: LinearSite) -> dict[str, Any]:
        learn = {"epochs": self.epochs, "windows": self.windows}
        return super().solving(site) | (learn if self.clip == "learned" else {})

    def check(self) -> None:
        super().check()
        for name in ("epochs", "windows"):
            if self.explicit(name) and self.clip != "learned":
                raise UsageError(f"{self.called}:{name}: expected clip=learned beside it")
        if self.clip == "learned" and (self.double or self.sweeps):
            raise UsageError(
                f"{self.called}:clip=learned: expected no double and no sweeps beside it, "
                "for its scales are decided before anything is rounded"
            )

    def codes(self, site: LinearSite) -> Codes:
        group = self.grouped(site)
        return Codes(self.bits, group, self.symmetric, double=self.double, power=self.power)
