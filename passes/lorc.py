"""lorc: what the codes or zeros of the same string lost, given back by factors of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Program
from ..compiler.ir.scheme import LowRank
from ..compiler.pipeline.analysis import linear_weights
from ..compiler.pipeline.base import Example, Lossy, Precondition, knob
from ..compiler.pipeline.residual import encode_low_rank
from ..compiler.pipeline.sites import BLOCK_WEIGHT, Protecting


def _rank_fits(made: Any, site: LinearSite) -> str | None:
    """An explicit rank must fit; the default one ends where the matrix does."""
    most = min(site.in_features, site.out_features)
    if made.rank > most and made.explicit("rank"):
        raise UsageError(
            f"{made.called}:rank: expected at most {most}, found {made.rank}", where=site.id
        )
    return None


@dataclass(frozen=True)
class LowRankCompensation(Protecting):
    """y → linear(x, Ŵ) + A (B x), A·B the best of that rank for W - Ŵ.

    Needs a grid or a mask in the same string, whose error it is. Factors are stored in 16 bits, or
    as 8-bit codes with a scale per row; the bias does not change.
    """

    variants = {"lorc": {}}
    stage = "compensation"
    effect = Lossy("perplexity")
    needs = ("gram",)
    source = "ZeroQuant-V2, arXiv 2303.08302"
    pattern = linear_weights
    preconditions: ClassVar[tuple[Precondition, ...]] = (
        *BLOCK_WEIGHT,
        Precondition("rank_fits", _rank_fits),
    )
    hits: ClassVar[tuple[Example, ...]] = (Example("llama_gqa"), Example("with_bias"))
    misses: ClassVar[tuple[Example, ...]] = (Example("tied_head", "param_read_once"),)

    rank: int = knob(8, "directions that are given back", lo=1, hi=65536)
    form: str = knob(
        "auto",
        "what the error is measured by: outputs on calibration data, weights alone, or auto: "
        "outputs where the passes beside it collect XᵀX anyway",
        choices=("auto", "outputs", "weights"),
    )

    factor_bits: int = knob(16, "bits that a factor's entries are stored in, 8 or 16", lo=8, hi=16)

    def check(self) -> None:
        if self.factor_bits not in (8, 16):
            raise UsageError(
                f"{self.called}:factor_bits: expected 8 or 16, found {self.factor_bits}"
            )

    def facts(self, site: LinearSite) -> dict[str, Any]:
        return {"low_rank": self._at(site)}

    def solving(self, site: LinearSite) -> dict[str, Any]:
        return {"residual": self.form}

    def rewrite(self, program: Program, site: LinearSite) -> list[str]:
        return encode_low_rank(program, site.node, self._at(site), made_by=self.called)

    def _at(self, site: LinearSite) -> LowRank:
        rank = min(self.rank, site.in_features, site.out_features)
        return LowRank(rank, bits=self.factor_bits)
