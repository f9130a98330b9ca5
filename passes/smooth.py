"""smooth: migrate activation outliers into the weights behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..compiler.analysis.migrate import MigrationSite
from ..compiler.ir.graph import Program
from ..compiler.pipeline.analysis import scale_migrations
from ..compiler.pipeline.base import Exact, Example, Pass, knob


@dataclass(frozen=True)
class Smooth(Pass):
    """(x / s) @ (W·s)ᵀ == x @ Wᵀ, with 1/s folded into whatever makes x.

    s_j = max|x_j|^alpha / max|W_:j|^(1-alpha), W over all readers of x. The data flow proves each
    site: a norm before all its linears, the up projection before down, the value projection before
    the output projection through the head groups' index map. Every reader of x is rewritten, or the
    site is refused.
    """

    variants = {"smooth": {}}
    stage = "equivalence"
    effect = Exact(rtol=1e-4)
    needs = ("absmax",)
    source = "SmoothQuant, arXiv 2211.10438"
    pattern = scale_migrations
    hits = (Example("llama_gqa"), Example("layer_norm"), Example("one_plus_gain"))
    misses = (
        Example("norm_feeds_add", "all_users_rewritten"),
        Example("gelu_between", "absorbable"),
    )

    alpha: float = knob(0.5, "share of the outliers that moves into the weights", lo=0.0, hi=1.0)
    round: str = knob(
        "auto",
        "rounding of s: pow2 is exact in any dtype; auto takes pow2 for 16-bit weights, else none",
        choices=("auto", "pow2", "none"),
    )

    def rewrite(self, program: Program, site: MigrationSite) -> list[str]:
        """The graph stays; readers and absorbers get new tensors, gains in fp32."""
        for a in site.absorbers:
            param = program.params[a.param]
            if len(param.shape) == 1:
                program.params[a.param] = replace(param, dtype=torch.float32)
        return [p for _, p, _ in site.consumers] + [a.param for a in site.absorbers]

    def scales(
        self, site: MigrationSite, absmax: Tensor, weights: Sequence[Tensor], stored: torch.dtype
    ) -> Tensor:
        """s of each channel group.

        Args:
            absmax: max|x| per channel, [channels].
            weights: the readers' matrices with x's channels on the last axis.
            stored: dtype in which the readers' weights are stored.
        Returns:
            [n_scales], positive and finite, fp32.
        """
        top = torch.stack([w.abs().flatten(0, -2).amax(0).float() for w in weights]).amax(0)
        x, w = absmax.new_zeros(site.n_scales), top.new_zeros(site.n_scales)
        index = site.expand.to(absmax.device)
        x.scatter_reduce_(0, index, absmax.float(), "amax")
        w.scatter_reduce_(0, index, top, "amax")
        s = x.clamp(min=1e-5) ** self.alpha / w.clamp(min=1e-5) ** (1 - self.alpha)
        s = torch.where((x > 0) & (w > 0), s, torch.ones_like(s)).clamp(1e-5, 1e5)
        sixteen = stored in (torch.float16, torch.bfloat16)
        if self.round == "pow2" or (self.round == "auto" and sixteen):
            s = torch.exp2(torch.round(torch.log2(s)))
        return s
