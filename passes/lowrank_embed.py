"""lowrank_embed: an embedding table as a product of two thinner ones, shared with a tied head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compiler.analysis.tables import TableSite
from ..compiler.ir.errors import ModelError, UsageError
from ..compiler.ir.events import Event
from ..compiler.ir.graph import Program
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Example, Lossy, knob
from ..compiler.pipeline.measure import collect
from ..compiler.pipeline.structure import Choice, Context
from ..compiler.pipeline.tables import (
    Swap,
    TablePass,
    bias_of,
    found_tables,
    part_name,
    token_counts,
)
from ..compiler.solvers.factor import Root, factor, identity, whitening
from ..compiler.solvers.ranks import Part, step_of, uniform


@dataclass(frozen=True)
class LowRankEmbed(TablePass):
    """E ≈ L·R: a lookup is L[tokens]·R, a tied head (x·Rᵀ)·Lᵀ, and each factor is stored once.

    The factors are the best of their rank for ‖D (E - L·R) S‖: D² counts how often each token
    occurs, and S Sᵀ is, beside the identity, which stands for the lookup, the second moment of what
    a tied head reads, scaled to the same mean: errors of embeddings and of logits count alike.
    The rank is rounded down to a multiple where the table is large enough.
    """

    variants = {"lowrank_embed": {}}
    effect = Lossy("perplexity")
    source = "Eckart and Young 1936; GroupReduce, arXiv 1806.06950 (weights by frequency)"
    hits = (Example("llama_gqa"), Example("tied_head"))
    misses = (Example("reads_table", "looked_up_alone"),)

    remove: float = knob(0.3, "share of the table's bytes to go, at least", lo=0.0, hi=0.999)
    rank: int | None = knob(None, "instead of remove: the rank", lo=1)
    multiple: int = knob(8, "ranks are multiples of it", lo=1, hi=256)
    frequency: bool = knob(True, "tokens count as often as they occur in calibration data")
    logits: bool = knob(True, "with a tied head, errors of the logits count too")

    def check(self) -> None:
        if self.explicit("remove") and self.rank is not None:
            raise UsageError("lowrank_embed: expected one of remove and rank, found both")

    def calibrated(self) -> bool:
        return self.frequency or self.logits

    def forwards(self, sites: list[TableSite]) -> float:
        return float(self.logits and any(s.heads for s in sites))

    def predict(self, analysis: Analysis, sites: list[TableSite]) -> Choice:
        ranks = {s.id: self._rank(s) for s in sites}
        return Choice({"ranks": ranks}, records=[_record(s, ranks[s.id]) for s in sites])

    def decide(self, context: Context, sites: list[TableSite]) -> Choice:
        choice = self.predict(context.analysis, sites)
        program, device = context.program, context.options.device
        for site, record in zip(sites, choice.records, strict=True):
            context.listener(Event("tick", {"where": site.id}))
            table = program.weights.load(site.param).to(device).double()
            rows = torch.ones(site.vocab, dtype=torch.float64)
            if self.frequency:
                rows = token_counts(context.data, site.vocab).sqrt()
            rows = rows.to(device)[:, None]
            made = factor(rows * table, self._metric(context, site), record["rank"])
            left, right = made.factors.left / rows, made.factors.right
            tensors = {"left": left, "right": right if site.heads else right.t()}
            stored = program.params[site.param].dtype
            for end, tensor in tensors.items():
                held = tensor.to(stored).contiguous().cpu()
                if not bool(torch.isfinite(held).all()):
                    raise ModelError(f"expected finite factors in {stored}, found NaN or Inf",
                                     where=site.id)  # fmt: skip
                choice.tensors[part_name(program, site.param, end)] = held
            lost = (table - left @ right).square().sum() / table.square().sum().clamp_min(1e-300)
            whole = made.whole
            record |= {
                "loss": made.dropped / whole if whole > 0 else 0.0, "loss_unweighed": float(lost),
                "solver": made.solver, "fallbacks": list(made.notes),
            }  # fmt: skip
        choice.records.extend(self.told_losses(context, choice))
        return choice

    def apply(self, program: Program, choice: Choice) -> list[str]:
        sites, added = found_tables(program), list[str]()
        for name, rank in choice.data["ranks"].items():
            site = sites[name]
            swap = Swap(program, site, choice.tensors, self.called or "lowrank_embed")
            left = swap.param("left", (site.vocab, rank))
            # A head reads R as a linear's weight; without one, the lookup does, and R is stored so.
            shape = (rank, site.width) if site.heads else (site.width, rank)
            right = swap.param("right", shape)
            for node in swap.lookups:
                few = swap.call("aten.embedding.default", left, *node.args[1:], at=node)
                op = "aten.matmul.default" if site.heads else "aten.linear.default"
                swap.replace(node, swap.call(op, few, right, at=node))
            for node in swap.heads:
                few = swap.call("aten.linear.default", node.args[0], right, at=node)
                bias = bias_of(node)
                more = () if bias is None else (bias,)
                swap.replace(node, swap.call("aten.linear.default", few, left, *more, at=node))
            added += swap.added
        return added

    def _rank(self, site: TableSite) -> int:
        full = min(site.vocab, site.width)
        part = Part(
            site.id, site.vocab, site.width, site.itemsize,
            step_of(site.vocab, site.width, self.multiple),
        )  # fmt: skip
        if self.rank is not None:
            if self.rank > full:
                raise UsageError(
                    f"lowrank_embed:rank: expected at most {full}, found {self.rank}", where=site.id
                )
            self.saves(site, part.bytes(self.rank), f"rank {self.rank}")
            return self.rank
        if part.most < 1:
            raise UsageError(
                f"lowrank_embed: expected a table of which a rank of {part.step} saves, found "
                f"{site.vocab}x{site.width}", where=site.id,
            )  # fmt: skip
        return uniform([part], 1 - self.remove)[site.id]

    def _metric(self, context: Context, site: TableSite) -> Root:
        """S with S Sᵀ = I + H / (mean of H's diagonal), H of what a tied head reads."""
        if not (site.heads and self.logits):
            return identity()
        reads = dict.fromkeys(_name(context.program, n) for n in site.heads)
        found = collect(
            context.program, context.data, dict.fromkeys(reads, ("gram",)), context.options,
            context.listener,
        )  # fmt: skip
        grams: list[Any] = [found.get(r, "gram") for r in reads]
        total: Tensor = torch.stack([g.value.double() for g in grams]).sum(0)
        mean = total.diagonal().mean().clamp_min(1e-300)
        return whitening(total / mean + torch.eye(len(total), device=total.device))


def _name(program: Program, head: str) -> str:
    return str(program.node(head).args[0])


def _record(site: TableSite, rank: int) -> dict[str, Any]:
    return {
        "site": site.id, "table": f"{site.vocab}x{site.width}", "rank": rank,
        "full": min(site.vocab, site.width), "tied": bool(site.heads),
        "bytes_before": site.bytes,
        "bytes_after": rank * (site.vocab + site.width) * site.itemsize,
    }  # fmt: skip
