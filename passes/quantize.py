"""w4 and its siblings: weights on a uniform integer grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Program
from ..compiler.ir.scheme import Codes
from ..compiler.pipeline.analysis import linear_weights
from ..compiler.pipeline.base import Example, Lossy, Precondition, knob
from ..compiler.pipeline.encode import encode_codes
from ..compiler.pipeline.sites import BLOCK_WEIGHT, Protecting

_SHARED = ("damp", "act_order", "sweeps", "refit")


def _group_divides(made: Any, site: LinearSite) -> str | None:
    """An explicit group must divide; the default one ends in a shorter group instead."""
    g, n = made.group, site.in_features
    if g is None or g >= n or n % g == 0 or not made.explicit("group"):
        return None
    fits = [d for d in range(1, n + 1) if n % d == 0]
    near = min(fits, key=lambda d: (abs(d - g), d))
    raise UsageError(
        f"w{made.bits}:group: expected a divisor of {n} inputs, found {g}",
        where=site.id,
        hint=f"the nearest is group={near}",
    )


@dataclass(frozen=True)
class QuantizeWeights(Protecting):
    """W → (q - z)·scale, q an integer of that many bits, one scale per group of inputs.

    gptq rounds one input after another and lets the inputs still free compensate; rtn takes the
    nearest code. With a mask in the same string the two are one joint solve: masked weights lie on
    the grid's exact zero.
    """

    variants = {f"w{b}": {"bits": b} for b in (8, 4, 3, 2)}
    stage = "grid"
    effect = Lossy("perplexity")
    needs = ("gram",)
    source = "GPTQ, arXiv 2210.17323"
    pattern = linear_weights
    preconditions = (*BLOCK_WEIGHT, Precondition("group_divides", _group_divides))
    hits = (Example("llama_gqa"), Example("with_bias"), Example("odd_inputs"))
    misses = (Example("tied_head", "param_read_once"),)

    bits: int = knob(4, "bits of a code", lo=2, hi=8)
    group: int | None = knob(
        128,
        "inputs that share a scale, or row; the default ends in a shorter group",
        lo=8,
        hi=65536,
    )
    symmetric: bool = knob(True, "no stored zero point; false stores one per group")
    solver: str = knob("gptq", "how codes are chosen", choices=("gptq", "rtn"))
    clip: str = knob(
        "mse",
        "how the range is fitted: mse searches the shrink that costs least, absmax takes it all",
        choices=("mse", "absmax"),
    )
    damp: float = knob(0.01, "damping relative to the mean diagonal of XᵀX", lo=0.0, hi=10.0)
    act_order: bool = knob(False, "most important inputs first, inside the solver")
    sweeps: int = knob(0, "further sweeps of coordinate descent, never uphill", lo=0, hi=100)
    refit: bool = knob(True, "let the further sweeps move the scales too")

    def facts(self, site: LinearSite) -> dict[str, Any]:
        group = None if self.group is None or self.group >= site.in_features else self.group
        return {"codes": Codes(self.bits, group, self.symmetric)}

    def solving(self, site: LinearSite) -> dict[str, Any]:
        out: dict[str, Any] = {"grid_solver": self.solver, "clip": self.clip}
        return out | {k: getattr(self, k) for k in _SHARED if self.explicit(k)}

    def rewrite(self, program: Program, site: LinearSite) -> list[str]:
        return encode_codes(program, site.node, self.facts(site)["codes"], made_by=self.called)
