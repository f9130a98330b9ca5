"""os_plus: shift channels to the middle of their range, then scale the loud ones down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..compiler.analysis.migrate import MigrationSite, shift_biases
from ..compiler.ir.graph import Program
from ..compiler.ir.ops.rounding import round_input
from ..compiler.ir.refusal import Refusal
from ..compiler.ir.scheme import InputGrid
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Example, knob
from ..compiler.pipeline.compensate import Bias, add_bias, free_name
from ..compiler.pipeline.equivalence import Edge, Equivalence, Move
from ..compiler.pipeline.inputs import attributes
from ..compiler.solvers.equivalent import ROWS
from ..compiler.solvers.grid import Grid, rtn_t


@dataclass(frozen=True)
class OsPlus(Equivalence):
    """((x - z) / s) @ (W·s)ᵀ + W·z == x @ Wᵀ, z_j = (max x_j + min x_j) / 2, s_j = max(1, top_j/t).

    t is searched by the error of the readers' outputs with inputs and weights rounded as the recipe
    states, from the largest magnitude top down; the first t gives s = 1. The shift goes into a
    LayerNorm's bias and W·z into the readers' biases, which are added where there are none. A value
    that no bias makes (an RMSNorm, a product) is scaled only.
    """

    variants = {"os_plus": {}}
    needs = ("range", "sample")
    source = "Outlier Suppression+, arXiv 2304.09145"
    hits = (Example("layer_norm"), Example("llama_gqa"), Example("one_plus_gain"))
    misses = (
        Example("norm_feeds_add", "all_users_rewritten"),
        Example("gelu_between", "absorbable"),
        Example("llama_gqa", "shift_absorbed"),
    )

    shift: bool = knob(True, "shift channels where a bias can take it")
    steps: int = knob(32, "values of t that are tried", lo=1, hi=1000)
    bits: int = knob(8, "bits of the inputs per token where the recipe states none", lo=2, hi=8)

    def sites(self, analysis: Analysis) -> tuple[list[Any], list[Refusal]]:
        """All edges; a refusal says which of them are scaled only, and why."""
        found, refused = super().sites(analysis)
        for site in found if self.shift else ():
            norm, why = shift_biases(analysis.program, site)
            if norm is None:
                reason = f"{site.id} is scaled only: {why}"
                path = analysis.path(site.value)
                refused.append(Refusal("os_plus", site.value, reason, "shift_absorbed", path))
        return found, refused

    def prepare(self, program: Program, sites: Sequence[MigrationSite]) -> list[str]:
        """Zero biases for the readers that have none, where a shift needs them."""
        made = []
        for site in sites if self.shift else ():
            norm, found = shift_biases(program, site)
            for node, bias in found.items() if norm and isinstance(found, dict) else ():
                if bias is None:
                    weight = program.param_of(program.node(node).args[1])
                    assert weight is not None
                    name = free_name(program, f"{weight.name}_bias")
                    zeros = torch.zeros(weight.shape[0], dtype=torch.float32)
                    add_bias(program, Bias(node, name, weight.name, True), zeros)
                    made.append(name)
        return made

    def params(self, program: Program, site: MigrationSite) -> list[str]:
        """As for scales, and the readers' biases behind a shift."""
        norm, found = shift_biases(program, site)
        shifted = self.shift and norm is not None and isinstance(found, dict)
        biases = found.values() if shifted and isinstance(found, dict) else ()
        return super().params(program, site) + [b for b in biases if b is not None]

    def rewrite(self, program: Program, site: MigrationSite) -> list[str]:
        """As for scales; the readers' biases are stored in fp32 too."""
        names = super().rewrite(program, site)
        for name in names:
            param = program.params[name]
            if len(param.shape) == 1:
                program.params[name] = replace(param, dtype=torch.float32)
        return names

    def decide(self, edge: Edge) -> Move:
        low, high = edge.stats["range"].value
        low, high = edge.reduced(low, "amin"), edge.reduced(high, "amax")
        shift = (low + high) / 2 if self.shift and edge.shifts else None
        centre = torch.zeros_like(low) if shift is None else shift
        top = torch.maximum(high - centre, centre - low)
        spread = edge.site.expand.to(top.device)
        rows = edge.stats["sample"].value - centre[spread]
        tried = [self.rounded(s, edge.stored) for s in candidates(top, self.steps)]
        ranks = [self.loss(edge, rows, s[spread], ROWS) for s in tried]
        best = min(range(len(tried)), key=lambda i: (ranks[i], i))
        base, loss = (self.loss(edge, rows, tried[i][spread], None) for i in (0, best))
        if loss >= base:
            best, loss = 0, base
        record = {"loss": loss, "loss_unscaled": base, "threshold_step": best}
        return Move(tried[best], shift, record)

    def loss(self, edge: Edge, rows: Tensor, scales: Tensor, most: int | None) -> float:
        """Squared error of the readers' outputs on rows [k, n], everything rounded.

        most: rows of each weight that count, None for all.
        """
        x = rows / scales
        total = 0.0
        for weight, planned in zip(edge.weights, edge.planned, strict=True):
            w = weight.flatten(0, -2).to(rows)
            if most is not None and len(w) > most:
                w = w[torch.linspace(0, len(w) - 1, most).round().long()]
            grid = planned.reads or InputGrid(self.bits)
            got = rounded_input(x, grid) @ on_grid(w * scales, planned.grid).t()
            total += float((got - rows @ w.t()).square().sum(dtype=torch.float64))
        return total


def candidates(top: Tensor, steps: int) -> list[Tensor]:
    """s of each t, [n_scales]: t from the largest magnitude down to the middle one; first 1."""
    most = float(top.max())
    least = max(float(top[top > 0].median()) if bool((top > 0).any()) else most, most / 1e4)
    out = []
    for i in range(steps):
        t = most * (least / most) ** (i / steps) if most > 0 else 1.0
        out.append((top / t).clamp(min=1.0) if i else torch.ones_like(top))
    return out


def rounded_input(x: Tensor, grid: InputGrid) -> Tensor:
    """Rows on an input grid; a static scale is that of these rows."""
    given: dict[str, Any] = attributes(grid, x.shape[-1])
    if grid.static:
        given["per"] = "tensor"
    return round_input(x, None, None, **given)


def on_grid(w: Tensor, grid: Grid | None) -> Tensor:
    """A weight [m, n] rounded to nearest, as it is without a grid."""
    return w if grid is None else rtn_t(w.t().contiguous(), grid)[0].t()
