"""awq: scale the channels that see large activations up before the weights are rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..compiler.pipeline.base import Example, knob
from ..compiler.pipeline.equivalence import Edge, Equivalence, Move
from ..compiler.solvers import Grid
from ..compiler.solvers.equivalent import Reader, powers, search

ALPHAS = tuple(i / 20 for i in range(20))
"""0 comes first: s = 1 is always tried, so the searched loss is never above that without scales."""


@dataclass(frozen=True)
class Awq(Equivalence):
    """Q(W·s) (x / s), s_j = mean|x_j|^alpha, alpha searched by what the readers' outputs lose.

    All readers of x are judged together on the grid that the same recipe gives them (rounded to
    nearest), by the closed form tr(D H Dᵀ) over XᵀX. alpha = 0 is among the candidates, so the loss
    on calibration data is never above that without scales. Query heads that share a value head
    share their scales.
    """

    variants = {"awq": {}}
    needs = ("absmean", "gram")
    source = "AWQ, arXiv 2306.00978"
    hits = (Example("llama_gqa"), Example("layer_norm"), Example("one_plus_gain"), Example("moe"))
    misses = (
        Example("norm_feeds_add", "all_users_rewritten"),
        Example("gelu_between", "absorbable"),
    )

    share: str = knob(
        "mean", "statistic of channels that share a scale (grouped heads)", choices=("mean", "max")
    )
    bits: int = knob(4, "bits of the grid that is assumed where the recipe states none", lo=2, hi=8)
    group: int | None = knob(128, "its inputs that share a scale, or row", lo=8, hi=65536)
    symmetric: bool = knob(False, "it stores no zero point")

    def decide(self, edge: Edge) -> Move:
        size = edge.stats["absmean"].value
        gram = edge.stats["gram"].value
        size = edge.reduced(size, "amax" if self.share == "max" else "mean")
        candidates = self.rounded(powers(size, ALPHAS), edge.stored)
        spread = candidates[:, edge.site.expand.to(candidates.device)]
        found = search(self.readers(edge), gram, spread)
        return Move(candidates[found.index], record={
            "alpha": ALPHAS[found.index], "loss": found.loss, "loss_unscaled": found.base,
        })  # fmt: skip

    def readers(self, edge: Edge) -> list[Reader]:
        """The readers that will be rounded; where the recipe rounds none, all of them."""
        flat = [w.flatten(0, -2) for w in edge.weights]
        stated = [
            Reader(w, p.grid, p.weighed)
            for w, p in zip(flat, edge.planned, strict=True)
            if p.grid is not None
        ]
        assumed = Grid(self.bits, self.group, self.symmetric, scale_dtype=torch.float16)
        return stated or [Reader(w, assumed) for w in flat]
