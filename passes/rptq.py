"""rptq: order channels by their range, so that neighbours can share a scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compiler.analysis.dimensions import Block
from ..compiler.analysis.flow import LINEAR
from ..compiler.analysis.groups import Group
from ..compiler.analysis.permute import KINDS, permute, why_fixed
from ..compiler.analysis.ties import op_name
from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Program
from ..compiler.ir.refusal import Refusal
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Exact, Example, knob
from ..compiler.pipeline.measure import collect
from ..compiler.pipeline.structure import Choice, Context, Structural


def orderable(analysis: Analysis) -> Iterator[Group | Refusal]:
    """Pattern: every group of channels whose order nothing outside of it can see."""
    for group in analysis.groups:
        fixed = why_fixed(analysis.program, group)
        if fixed is None and not readers(analysis.program, group):
            fixed = Block(group.node, "what reads the channels is no value of the graph")
        if fixed is None:
            yield group
        elif group.kind in KINDS:
            path = analysis.path(fixed.node)
            yield Refusal("rptq", fixed.node, f"{group.id}: {fixed.reason}", "order_is_free", path)


@dataclass(frozen=True)
class Rptq(Structural):
    """x[order] @ W[:, order]ᵀ == x @ Wᵀ, the order by max|x_j| over calibration data.

    Channels with ranges alike come to lie side by side, so that a scale per group of an input's
    channels (act_group=) wastes little. The order is folded into everything that writes or reads
    the channels, through the dependency groups; nothing is moved while the model runs.
    """

    variants = {"rptq": {}}
    stage = "permute"
    effect = Exact(rtol=1e-4)
    needs = ("absmax",)
    source = "RPTQ, arXiv 2304.01089"
    pattern = orderable
    hits = (Example("llama_gqa"), Example("layer_norm"), Example("one_plus_gain"))
    misses = (Example("softmax_between", "order_is_free"), Example("moe", "order_is_free"))

    units: str = knob("neuron+hidden", "channels that are reordered, joined by +")

    def check(self) -> None:
        unknown = [u for u in self.units.split("+") if u not in KINDS]
        if unknown:
            raise UsageError(
                f"rptq:units: expected some of {', '.join(KINDS)}, found {unknown[0]!r}"
            )

    def sites(self, analysis: Analysis) -> tuple[list[Any], list[Refusal]]:
        """Groups of the kinds that were asked for."""
        found, refused = super().sites(analysis)
        return [g for g in found if g.kind in self.units.split("+")], refused

    def predict(self, analysis: Analysis, sites: list[Group]) -> Choice:
        """The order changes no size."""
        return Choice({"order": {}})

    def decide(self, context: Context, sites: list[Group]) -> Choice:
        program = context.program
        reads = {g.id: readers(program, g) for g in sites}
        wants = {value: self.needs for found in reads.values() for value, _ in found}
        stats = collect(program, context.data, wants, context.options, context.listener)
        orders: dict[str, list[int]] = {}
        records = []
        for group in sites:
            tops = [
                _per_unit(stats.get(value, "absmax"), unit_of, group.units)
                for value, unit_of in reads[group.id]
            ]
            # Each reader's ranges count alike, however loud its input is.
            size = torch.stack([t / t.mean().clamp(min=1e-30) for t in tops]).mean(0)
            orders[group.id] = size.argsort(stable=True).tolist()
            records.append({
                "site": group.id, "kind": group.kind, "units": group.units, "readers": len(tops),
                "smallest": float(size.min()), "largest": float(size.max()),
            })  # fmt: skip
        return Choice({"order": orders}, records=records)

    def apply(self, program: Program, choice: Choice) -> list[str]:
        groups = {g.id: g for g in Analysis(program).groups}
        orders = {groups[g]: torch.tensor(order) for g, order in choice.data["order"].items()}
        return permute(program, orders) if orders else []


def readers(program: Program, group: Group) -> list[tuple[str, Tensor]]:
    """(value, unit of each of its channels) of all matrices that read the group's channels."""
    out = []
    for m in group.members:
        node = program.node(m.node)
        whole = m.role == "reads" and bool((m.unit_of >= 0).all())
        # The second product of an experts node reads something inside of it.
        seen = op_name(node) == LINEAR or node.args[3:4] == (program.param_node(m.param),)
        if whole and seen:
            out.append((str(node.args[0]), m.unit_of))
    return out


def _per_unit(statistic: Any, unit_of: Tensor, units: int) -> Tensor:
    """max|x| of each unit: [units]."""
    top: Tensor = statistic.value.cpu()
    return top.new_zeros(units).scatter_reduce_(0, unit_of, top, "amax")
