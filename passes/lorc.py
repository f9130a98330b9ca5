"""lorc, lowrank_residual: low rank beside the codes or zeros of the same string."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Program
from ..compiler.ir.scheme import LowRank
from ..compiler.pipeline.alternating import STARTS
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


def rank_knob(default: int) -> Any:
    """The knob ``rank``."""
    return knob(default, "directions of the factors", lo=1, hi=65536)


def rounds_knob(default: int) -> Any:
    """The knob ``rounds``."""
    return knob(default, "solves of the rest, each beside other factors", lo=1, hi=64)


def start_knob(default: str) -> Any:
    """The knob ``start``."""
    text = "what is found first: the rest (LoRC), the weight's own directions (SVDQuant), or both"
    return knob(default, text, choices=STARTS)


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
    source: ClassVar[str] = "ZeroQuant-V2, arXiv 2303.08302"
    pattern = linear_weights
    preconditions: ClassVar[tuple[Precondition, ...]] = (
        *BLOCK_WEIGHT,
        Precondition("rank_fits", _rank_fits),
    )
    hits: ClassVar[tuple[Example, ...]] = (Example("llama_gqa"), Example("with_bias"))
    misses: ClassVar[tuple[Example, ...]] = (Example("tied_head", "param_read_once"),)

    rank: int = rank_knob(8)
    form: str = knob(
        "auto",
        "what the error is measured by: outputs on calibration data, weights alone, or auto: "
        "outputs where the passes beside it collect XᵀX anyway",
        choices=("auto", "outputs", "weights"),
    )

    rounds: int = rounds_knob(1)
    start: str = start_knob("rest")
    factor_bits: int = knob(16, "bits that a factor's entries are stored in, 8 or 16", lo=8, hi=16)

    def check(self) -> None:
        if self.factor_bits not in (8, 16):
            raise UsageError(
                f"{self.called}:factor_bits: expected 8 or 16, found {self.factor_bits}"
            )

    def facts(self, site: LinearSite) -> dict[str, Any]:
        return {"low_rank": self._at(site)}

    def solving(self, site: LinearSite) -> dict[str, Any]:
        again = self.rounds > 1 or self.start != "rest"
        return {"residual": self.form} | (
            {"rounds": self.rounds, "start": self.start} if again else {}
        )

    def rewrite(self, program: Program, site: LinearSite) -> list[str]:
        return encode_low_rank(program, site.node, self._at(site), made_by=self.called)

    def _at(self, site: LinearSite) -> LowRank:
        rank = min(self.rank, site.in_features, site.out_features)
        return LowRank(rank, bits=self.factor_bits)


@dataclass(frozen=True)
class LowRankResidual(LowRankCompensation):
    """y → linear(x, Ŵ) + A (B x), Ŵ the codes or zeros of W - A·B, found in turn with A·B.

    The factors take what a grid or a mask cannot hold, and Ŵ is solved again for what they leave;
    the best turn is kept, which never loses more than ``lorc`` of the same rank.
    """

    variants = {"lowrank_residual": {}}
    source = "SVDQuant, arXiv 2411.05007; ZeroQuant-V2, arXiv 2303.08302"

    rank: int = rank_knob(32)
    rounds: int = rounds_knob(4)
    start: str = start_knob("best")
