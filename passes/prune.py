"""prune: zeros in the weights, N kept of M consecutive inputs or anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Program
from ..compiler.ir.scheme import Mask, Sparse
from ..compiler.pipeline.analysis import linear_weights
from ..compiler.pipeline.base import Example, Lossy, Precondition, knob
from ..compiler.pipeline.encode import encode_mask, encode_sparse
from ..compiler.pipeline.sites import BLOCK_WEIGHT, Protecting
from ..compiler.solvers.masks import recover_bound

_SHARED = ("damp", "act_order", "sweeps", "mask_search")


def _blocks_fit(made: Any, site: LinearSite) -> str | None:
    if made.m and site.in_features % made.m:
        return f"{site.in_features} inputs do not divide into blocks of {made.m}"
    return None


@dataclass(frozen=True)
class Prune(Protecting):
    """W → M ⊙ Ŵ, where M keeps n of each m consecutive inputs, or 1-sparsity of all weights.

    sparsegpt chooses the mask while it sweeps and lets the survivors compensate; wanda and
    magnitude drop the lowest scores and change nothing else. With a grid in the same string the two
    are one joint solve, and the mask stays exact.

    recover= brings the best weights of each row back where n:m dropped them, as sparse rows beside
    the mask, off the grid. allocate=global ranks all weights of the model by ½·w²·F, F the Fisher
    information, and each matrix gets the share of zeros that falls to it.
    """

    variants = {
        "prune24": {"n": 2, "m": 4, "sparsity": 0.5},
        "prune48": {"n": 4, "m": 8, "sparsity": 0.5},
        "prune": {},
    }
    stage = "mask"
    effect = Lossy("perplexity")
    needs = ("gram",)
    source = "SparseGPT, arXiv 2301.00774; Wanda, arXiv 2306.11695; WRP; OBD (LeCun et al., 1989)"
    pattern = linear_weights
    preconditions = (*BLOCK_WEIGHT, Precondition("blocks_fit", _blocks_fit))
    hits = (Example("llama_gqa"), Example("with_bias"), Example("moe"))
    misses = (Example("tied_head", "param_read_once"), Example("odd_inputs", "blocks_fit"))

    solver: str = knob(
        "sparsegpt", "how the mask is chosen", choices=("sparsegpt", "wanda", "magnitude")
    )
    n: int = knob(0, "kept of each m consecutive inputs; 0 = unstructured", lo=0, hi=32)
    m: int = knob(0, "block of consecutive inputs; 0 = unstructured", lo=0, hi=32)
    sparsity: float = knob(0.5, "share of zeros when n and m are 0", lo=0.0, hi=0.99)
    allocate: str = knob(
        "uniform",
        "how sparsity= is shared out: every weight alike, or ranked by the whole model's loss",
        choices=("uniform", "global"),
    )
    spread: float = knob(0.15, "how far a weight's sparsity may lie off, if global", lo=0, hi=1)
    samples: int = knob(16, "calibration windows whose gradients are taken, if global", lo=1)
    recover: float = knob(
        0.0, "share of each row's best weights that come back beside n:m", lo=0.0, hi=1.0
    )
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

        if self.recover and not self.m:
            raise UsageError(
                "prune:recover: expected n and m beside it, found unstructured zeros",
                hint="a lower sparsity keeps the best weights by itself",
            )
        if self.recover and self.mask_search:
            raise UsageError(
                f"{self.called}:mask_search: expected a mask that stays, found recover="
                f"{self.recover:g}, which brings back what one mask drops"
            )

        if self.m and self.allocate == "global":
            raise UsageError(
                f"{self.called}:allocate: expected unstructured zeros to share out, found "
                f"{self.n}:{self.m}"
            )
        idle = [k for k in ("spread", "samples") if self.explicit(k) and self.allocate != "global"]
        if idle:
            raise UsageError(f"{self.called}:{idle[0]}: expected allocate=global beside it")

    def facts(self, site: LinearSite) -> dict[str, Any]:
        if self.m:
            mask = Mask(self.n, self.m, 1 - self.n / self.m)
            return {"mask": mask} | ({"sparse": sparse} if (sparse := self._sparse(site)) else {})
        return {"mask": Mask(sparsity=self.sparsity, by_loss=self.allocate == "global")}

    def solving(self, site: LinearSite) -> dict[str, Any]:
        out: dict[str, Any] = {"mask_solver": self.solver}
        if self.allocate == "global":
            out |= {k: getattr(self, k) for k in ("allocate", "spread", "samples")}
        return out | {k: getattr(self, k) for k in _SHARED if self.explicit(k)}

    def rewrite(self, program: Program, site: LinearSite) -> list[str]:
        mask, sparse = self.facts(site)["mask"], self._sparse(site)
        made = encode_mask(program, site.node, mask, made_by=self.called, slot=site.slot)
        if sparse is None:
            return made
        return made + encode_sparse(
            program, site.node, mask, sparse, self._one_score, made_by=self.called, slot=site.slot
        )

    @property
    def _one_score(self) -> bool:
        """Whether mask and recovered weights are ranked by one score of the dense weights."""
        return self.solver != "sparsegpt"

    def _sparse(self, site: LinearSite) -> Sparse | None:
        """What comes back at this site; None where that can be no weight of any row."""
        if not self.recover:
            return None
        most = recover_bound(self.recover, self.n, self.m, site.in_features, self._one_score)
        return Sparse("csr", self.recover) if most else None
