"""ternary and binary: weights of three or two levels."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.scheme import Codes
from ..compiler.pipeline.base import knob
from ..compiler.pipeline.coding import GroupedCoding

_BITS = {"ternary": 2, "binary": 1}


@dataclass(frozen=True)
class FewLevels(GroupedCoding):
    """W → level·scale, level in {-1, 0, 1} or {-1, 1}, scale the mean magnitude of the group.

    A ternary code takes two bits. Binary levels hold no 0, so that unstructured zeros refuse.
    """

    variants = {name: {"levels": name} for name in _BITS}
    source = "BitNet b1.58, arXiv 2402.17764; BitNet, arXiv 2310.11453; BWN, arXiv 1603.05279"

    levels: str = knob("ternary", "which levels", choices=tuple(_BITS))
    clip: str = knob(
        "absmean",
        "how the scale is fitted: absmean takes the mean magnitude, mse searches what costs least",
        choices=("absmean", "mse"),
    )

    def codes(self, site: LinearSite) -> Codes:
        bits, group = _BITS[self.levels], self.grouped(site)
        return Codes(bits, group, grid=self.levels, double=self.double, power=self.power)
