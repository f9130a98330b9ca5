"""smooth: migrate activation outliers into the weights behind them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..compiler.pipeline.base import Example, knob
from ..compiler.pipeline.equivalence import Edge, Equivalence, Move


@dataclass(frozen=True)
class Smooth(Equivalence):
    """(x / s) @ (W·s)ᵀ == x @ Wᵀ, with 1/s folded into whatever makes x.

    s_j = max|x_j|^alpha / max|W_:j|^(1-alpha), W over all readers of x. The data flow proves each
    site: a norm before all its linears, the up projection before down, the value projection before
    the output projection through the head groups' index map. Every reader of x is rewritten, or the
    site is refused.
    """

    variants = {"smooth": {}}
    needs = ("absmax",)
    source = "SmoothQuant, arXiv 2211.10438"
    hits = (Example("llama_gqa"), Example("layer_norm"), Example("one_plus_gain"))
    misses = (
        Example("norm_feeds_add", "all_users_rewritten"),
        Example("gelu_between", "absorbable"),
    )

    alpha: float = knob(0.5, "share of the outliers that moves into the weights", lo=0.0, hi=1.0)

    def decide(self, edge: Edge) -> Move:
        x = edge.reduced(edge.stats["absmax"].value.float(), "amax")
        tops = [w.abs().flatten(0, -2).amax(0).float() for w in edge.weights]
        w = edge.reduced(torch.stack(tops).amax(0), "amax")
        s = x.clamp(min=1e-5) ** self.alpha / w.clamp(min=1e-5) ** (1 - self.alpha)
        s = torch.where((x > 0) & (w > 0), s, torch.ones_like(s)).clamp(1e-5, 1e5)
        return Move(self.rounded(s, edge.stored))
