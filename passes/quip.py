"""quip: rotate what a weight reads and makes, so that no weight stands out, then round it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.errors import ModelError
from ..compiler.ir.graph import Program
from ..compiler.ir.ops.rotation import mixed_by
from ..compiler.ir.refusal import Refusal
from ..compiler.ir.scheme import Codes, Transform
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Example, Precondition, knob
from ..compiler.pipeline.coding import GroupedCoding
from ..compiler.pipeline.rotating import already, encode_rotation


@dataclass(frozen=True)
class Sided(LinearSite):
    """A site, and which sides of its weight are rotated already."""

    turned: frozenset[str] = frozenset()


def _mixable(made: Any, site: LinearSite) -> str | None:
    """Both widths can be mixed fast."""
    for side in made.online(site):
        try:
            mixed_by(site.in_features if side == "in" else site.out_features)
        except ModelError as e:
            return f"its {side}puts cannot be rotated: {e.message}"
    return None


@dataclass(frozen=True)
class Quip(GroupedCoding):
    """x Wᵀ → U⁻¹(Q(U W V⁻¹) V x), U and V random rotations: signs, then a Hadamard matrix.

    V rescales the inputs first, by (H_jj / ‖W_:j‖²)^¼, once for all weights that read x. The sweep
    on the rotated weight and the rotated H is LDLQ. Levels are 2**bits evenly spaced ones around 0.
    A side that `rotate` has rotated already is left as it is.
    """

    variants = {"quip": {}}
    source = "QuIP, arXiv 2307.13304; QuIP#, arXiv 2402.04396"
    preconditions = (
        *GroupedCoding.preconditions,
        Precondition("mixable", _mixable),
    )
    hits = (Example("llama_gqa"), Example("with_bias"), Example("odd_inputs"))
    misses = (Example("tied_head", "param_read_once"), Example("moe", "read_plain"))

    bits: int = knob(2, "bits of a code", lo=2, hi=8)
    group: int | None = knob(None, "inputs that share a scale, or row", lo=8, hi=65536)
    clip: str = knob(
        "mse",
        "how the range is fitted: mse searches the shrink that costs least, absmax takes it all, "
        "percentile leaves out the rarest, output searches what each group loses at the output",
        choices=("mse", "absmax", "percentile", "output"),
    )
    grid: str = knob(
        "midrise",
        "levels: midrise has as many below 0 as above, uniform has 0 and one more below",
        choices=("midrise", "uniform"),
    )
    sides: str = knob(
        "both", "what is rotated: inputs, outputs or both", choices=("in", "out", "both")
    )
    rescale: bool = knob(True, "rescale the inputs before they are rotated")
    seed: int = knob(0, "of the signs", lo=0, hi=2**31 - 1)

    def sites(self, analysis: Analysis) -> tuple[list[Any], list[Refusal]]:
        """All weights, each with what is rotated about it already."""
        found, refused = super().sites(analysis)
        known = already(analysis.program)
        return [Sided(**vars(s), turned=known.get(s.param, frozenset())) for s in found], refused

    def online(self, site: LinearSite) -> list[str]:
        """The sides that are rotated at a site."""
        asked = ["in", "out"] if self.sides == "both" else [self.sides]
        return [s for s in asked if s not in getattr(site, "turned", ())]

    def codes(self, site: LinearSite) -> Codes:
        group = self.grouped(site)
        return Codes(self.bits, group, grid=self.grid, double=self.double, power=self.power)

    def facts(self, site: LinearSite) -> dict[str, Any]:
        return super().facts(site) | self._transforms(site)

    def _transforms(self, site: LinearSite) -> dict[str, Transform]:
        return {
            f"t_{side}": Transform("orthogonal", False, scaled=side == "in" and self.rescale)
            for side in self.online(site)
        }

    def solving(self, site: LinearSite) -> dict[str, Any]:
        sides = self.online(site)
        seed = {"seed": self.seed} if sides else {}
        rescale = {"rescale": True} if "in" in sides and self.rescale else {}
        return super().solving(site) | seed | rescale

    def rewrite(self, program: Program, site: LinearSite) -> list[str]:
        made = super().rewrite(program, site)
        turn = self._transforms(site)
        return made + encode_rotation(
            program, site.node, turn.get("t_in"), turn.get("t_out"), made_by=self.called
        )
