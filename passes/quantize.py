"""w4 and its siblings: weights on a uniform integer grid."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.analysis.linears import LinearSite
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

    variants = {f"w{b}": {"bits": b} for b in (8, 4, 3, 2)}
    source = "GPTQ, arXiv 2210.17323"

    bits: int = knob(4, "bits of a code", lo=2, hi=8)
    symmetric: bool = knob(True, "no stored zero point; false stores one per group")
    clip: str = knob(
        "mse",
        "how the range is fitted: mse searches the shrink that costs least, absmax takes it all, "
        "percentile leaves out the rarest",
        choices=("mse", "absmax", "percentile"),
    )

    def codes(self, site: LinearSite) -> Codes:
        group = self.grouped(site)
        return Codes(self.bits, group, self.symmetric, double=self.double, power=self.power)
