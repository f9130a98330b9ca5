"""olive: 4-bit codes in which an outlier takes the place of its neighbour."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.errors import UsageError
from ..compiler.ir.scheme import Codes, InputGrid
from ..compiler.pipeline.base import Example, Precondition, knob
from ..compiler.pipeline.coding import RoundedCoding


def _even(made: Olive, site: LinearSite) -> str | None:
    if site.in_features % 2:
        return f"{site.in_features} inputs are no pairs"
    return None


@dataclass(frozen=True)
class Olive(RoundedCoding):
    """Two neighbours of W, and of x, are integers, or an outlier with a wide range beside a 0.

    Which of both costs less is decided for each pair, so that memory stays aligned and an outlier
    needs no index. A pair is rounded at once, which no sweep can do: codes are the nearest ones.
    """

    variants = {"olive": {}}
    needs = ("absmax", "absmean")
    source = "OliVe, arXiv 2304.07493"
    preconditions = (*RoundedCoding.preconditions, Precondition("even_inputs", _even))
    hits = (Example("llama_gqa"), Example("with_bias"))

    bits: int = knob(4, "bits of a code, 4 or 8", lo=4, hi=8)
    group: int | None = knob(None, "inputs that share a scale, or row", lo=8, hi=65536)
    solver: str = knob("rtn", "how codes are chosen: rtn takes the nearest", choices=("rtn",))
    clip: str = knob(
        "mse",
        "what counts as an outlier: what lies beyond three deviations, or a searched range",
        choices=("mse", "absmax"),
    )
    act_bits: int | None = knob(4, "bits of an input's code, 4 or 8; none leaves x", lo=4, hi=8)

    def check(self) -> None:
        super().check()
        for name in ("bits", "act_bits"):
            if getattr(self, name) not in (4, 8, None):
                raise UsageError(f"olive:{name}: expected 4 or 8, found {getattr(self, name)}")
        for name in ("group", "act_group"):
            if (getattr(self, name) or 0) % 2:
                raise UsageError(f"olive:{name}: expected an even group of whole pairs")
        if self.sweeps:
            raise UsageError("olive:sweeps: expected none, for a pair is rounded at once")

    def codes(self, site: LinearSite) -> Codes:
        group = self.grouped(site)
        return Codes(self.bits, group, grid="pairs", double=self.double, power=self.power)

    def reads(self, site: LinearSite) -> InputGrid | None:
        return None if self.act_bits is None else self.rounded(self.act_bits, "pairs")
