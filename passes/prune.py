"""prune: zeros in the weights, N kept of M consecutive inputs or anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Program
from ..compiler.ir.scheme import Mask
from ..compiler.pipeline.analysis import linear_weights
from ..compiler.pipeline.base import Example, Lossy, Pass, Precondition, knob
from ..compiler.pipeline.encode import encode_mask
from ..compiler.pipeline.sites import BLOCK_WEIGHT

_SHARED = ("damp", "act_order", "sweeps", "mask_search")


def _blocks_fit(made: Any, site: LinearSite) -> str | None:
    if made.m and site.in_features % made.m:
        return f"{site.in_features} inputs do not divide into blocks of {made.m}"
    return None


@dataclass(frozen=True)
class Prune(Pass):
    """W → M ⊙ Ŵ, where M keeps n of each m consecutive inputs, or 1-sparsity of all weights.

    sparsegpt chooses the mask while it sweeps and lets the survivors compensate; wanda and
    magnitude drop the lowest scores and change nothing else. With a grid in the same string the two
    are one joint solve, and the mask stays exact.
    """

    variants = {
        "prune24": {"n": 2, "m": 4, "sparsity": 0.5},
        "prune48": {"n": 4, "m": 8, "sparsity": 0.5},
        "prune": {},
    }
    stage = "mask"
    effect = Lossy("perplexity")
    needs = ("gram",)
    source = "SparseGPT, arXiv 2301.00774; Wanda, arXiv 2306.11695"
    pattern = linear_weights
    preconditions = (*BLOCK_WEIGHT, Precondition("blocks_fit", _blocks_fit))
    hits = (Example("llama_gqa"), Example("with_bias"))
    misses = (Example("tied_head", "param_read_once"), Example("odd_inputs", "blocks_fit"))

    solver: str = knob(
        "sparsegpt", "how the mask is chosen", choices=("sparsegpt", "wanda", "magnitude")
    )
    n: int = knob(0, "kept of each m consecutive inputs; 0 = unstructured", lo=0, hi=32)
    m: int = knob(0, "block of consecutive inputs; 0 = unstructured", lo=0, hi=32)
    sparsity: float = knob(0.5, "share of zeros when n and m are 0", lo=0.0, hi=0.99)
    damp: float = knob(0.01, "damping relative to the mean diagonal of XᵀX", lo=0.0, hi=10.0)
    act_order: bool = knob(False, "most important inputs first, inside the solver")
    sweeps: int = knob(0, "further sweeps of coordinate descent, never uphill", lo=0, hi=100)
    mask_search: bool = knob(False, "let the further sweeps move the mask too")

    def check(self) -> None:
        if (self.n > 0) != (self.m > 0) or (self.m and self.n >= self.m):
            raise UsageError(
                f"prune: expected 0 < n < m, found n={self.n}, m={self.m}",
                hint="for unstructured zeros give sparsity= alone",
            )
        if self.m and self.explicit("sparsity"):
            raise UsageError(
                f"prune: expected either sparsity or n and m, found both ({self.n}:{self.m})"
            )

    def facts(self, site: LinearSite) -> dict[str, Any]:
        if self.m:
            return {"mask": Mask(self.n, self.m, 1 - self.n / self.m)}
        return {"mask": Mask(sparsity=self.sparsity)}

    def solving(self, site: LinearSite) -> dict[str, Any]:
        out: dict[str, Any] = {"mask_solver": self.solver}
        return out | {k: getattr(self, k) for k in _SHARED if self.explicit(k)}

    def rewrite(self, program: Program, site: LinearSite) -> list[str]:
        return encode_mask(program, site.node, self.facts(site)["mask"], made_by=self.called)
