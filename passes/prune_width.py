"""prune_width: whole neurons, heads, hidden channels or experts are taken out of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compiler.analysis.cut import cut
from ..compiler.analysis.groups import Group
from ..compiler.ir.errors import UsageError, nearest
from ..compiler.ir.graph import Program
from ..compiler.ir.refusal import Refusal
from ..compiler.ir.segments import refresh_segments
from ..compiler.pipeline import compensate, importance, width
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Example, Lossy, Precondition, knob
from ..compiler.pipeline.structure import Choice, Context, Structural
from ..compiler.solvers.importance import ORDERS, REDUCTIONS

_COUNTS = {"neurons": "neuron", "heads": "head", "hidden": "hidden", "experts": "expert"}


def _groups(analysis: Analysis) -> Iterator[Group]:
    """Pattern: every dependency group of a unit that can be asked for."""
    return (g for g in analysis.groups if g.kind in width.UNIT_OF)


def _free(made: Any, group: Group) -> str | None:
    if group.blocked:
        first = group.blocked[0]
        return f"{group.id} is tied at {first.node}: {first.reason}"
    return None


@dataclass(frozen=True)
class PruneWidth(Structural):
    """f(x; W) → f(x; W without the rows and columns of the units that matter least).

    Each unit takes all that must go with it: a neuron its gate row, up row and down column, a KV
    group its query heads, a hidden channel its column of the embedding and its place in every norm
    (whose divisor stays), an expert its row of the router. What is left computes exactly what the
    whole model computes with those units at zero. Sizes follow from the shapes; importance chooses
    which units go, and the matrix that reads them may make up for it.
    """

    variants = {"prune_width": {}}
    stage = "width"
    effect = Lossy("perplexity")
    needs = ("moments", "gram")
    source = "LLM-Pruner, arXiv 2305.11627; FLAP, arXiv 2312.11983; Michel et al., arXiv 1905.10650"
    pattern = _groups
    preconditions = (Precondition("group_is_free", _free),)
    hits = (Example("llama_gqa"), Example("layer_norm"), Example("with_bias"), Example("moe"))
    misses = (Example("softmax_between", "group_is_free"),)

    remove: float = knob(0.2, "share of the parameters in repeated blocks that goes, below 1")
    params: int | None = knob(
        None, "instead: parameters that the whole model keeps at most, new biases apart", lo=1
    )
    neurons: int | None = knob(None, "instead: neurons that each layer keeps", lo=1)
    heads: int | None = knob(
        None, "instead: KV heads that each layer keeps, each with its query heads", lo=1
    )
    hidden: int | None = knob(None, "instead: hidden channels that the model keeps", lo=1)
    experts: int | None = knob(None, "instead: experts that each layer keeps", lo=1)
    units: str = knob("neuron+head", "what may go: neuron, head, hidden, expert, joined by +")
    method: str = knob("flap", "how units are scored", choices=importance.METHODS)
    taylor: str = knob("first", "order of the Taylor expansion", choices=ORDERS)
    reduce: str = knob("sum", "a unit's score over its parameters", choices=REDUCTIONS)
    ranking: str = knob(
        "auto",
        "local: one share everywhere; global: layers and kinds compete (kinds alone beside "
        "uniform=true); auto: global for uniform=false",
        choices=("auto", "local", "global"),
    )
    uniform: bool | None = knob(
        None, "true: refuse unless all blocks end up equally wide, which loads anywhere"
    )
    compensate: str = knob(
        "auto",
        "what the reading matrix does: a bias for the lost mean, moved weights, both; auto is a "
        "bias for flap and weights for obs",
        choices=("auto", *compensate.KINDS),
    )
    multiple: int = knob(8, "neurons and hidden channels stay in multiples of it", lo=1, hi=4096)
    protect_first: int = knob(0, "blocks at the start that stay whole", lo=0)
    protect_last: int = knob(0, "blocks at the end that stay whole", lo=0)
    gradient_samples: int = knob(10, "windows whose gradients are taken", lo=1, hi=100_000)
    damp: float = knob(0.01, "damping relative to the mean diagonal of XᵀX", lo=0.0, hi=1.0)
    seed: int = knob(0, "of method=random", lo=0)

    # ** knobs **

    @property
    def kept(self) -> dict[str, int]:
        """Absolute counts by unit."""
        given = {unit: getattr(self, name) for name, unit in _COUNTS.items()}
        return {unit: count for unit, count in given.items() if count is not None}

    @property
    def kinds(self) -> list[str]:
        """Units that may go."""
        if self.kept and not self.explicit("units"):
            return list(self.kept)
        return [u.strip() for u in self.units.split("+")]

    @property
    def repair(self) -> str:
        """What the reading matrices do."""
        auto = {"flap": "bias", "obs": "weights"}.get(self.method, "none")
        return auto if self.compensate == "auto" else self.compensate

    def check(self) -> None:
        if not 0 < self.remove < 1:
            raise UsageError(
                f"prune_width:remove: expected a share above 0 and below 1, found {self.remove:g}",
                hint="0.2 takes a fifth of the parameters away",
            )
        for unit in self.kinds:
            if unit not in width.UNITS:
                raise UsageError(
                    f"prune_width:units: expected {', '.join(width.UNITS)} joined by +, "
                    f"found {unit!r}", hint=nearest(unit, width.UNITS),
                )  # fmt: skip
        targets = [n for n in ("remove", "params") if self.explicit(n)]
        counts = [width.plural(unit) for unit in self.kept]
        if len(targets) + bool(counts) > 1:
            found = " and ".join([*targets, *counts])
            raise UsageError(f"prune_width: expected one target, found {found}")
        idle = [width.plural(unit) for unit in self.kept if unit not in self.kinds]
        if idle:
            raise UsageError(
                f"prune_width:units: expected the unit of {idle[0]}=, found {self.units}"
            )
        if self.everywhere and counts:
            raise UsageError(
                f"prune_width: expected ranking=local beside {counts[0]}=, found ranking=global"
            )
        if self.uniform and self.protected:
            raise UsageError(
                "prune_width: expected no protected blocks beside uniform=true, found "
                f"{self.protected}", hint="protected blocks stay wider than the others",
            )  # fmt: skip

    @property
    def everywhere(self) -> bool:
        """Whether groups compete with each other."""
        free = self.uniform is False and not self.kept
        return self.ranking == "global" or (self.ranking == "auto" and free)

    @property
    def protected(self) -> int:
        """Blocks that stay whole."""
        return self.protect_first + self.protect_last

    def calibrated(self) -> bool:
        return self.method not in ("magnitude", "random") or self.repair != "none"

    def forwards(self, sites: list[Any]) -> float:
        return float(self.calibrated()) + float(self.repair != "none")

    # ** places **

    def sites(self, analysis: Analysis) -> tuple[list[Group], list[Refusal]]:
        """Groups that may be cut; those of units that nobody asked for are passed over."""
        self._needs_no_gradient_of_codes(analysis.program)
        found: list[Group] = []
        refused: list[Refusal] = []
        last = len(analysis.blocks) - self.protect_last
        inside = width.inside_blocks(analysis.program)
        shared = not self.kept and self.params is None
        for group in _groups(analysis):
            if width.UNIT_OF[group.kind] not in self.kinds:
                continue
            reason = self.test(group)
            at = analysis.block_of(group.segment)
            if reason is None and at >= 0 and (at < self.protect_first or at >= last):
                reason = Refusal("prune_width", group.node, f"block {at} is protected", "protected")
            if reason is None and shared and inside.isdisjoint(m.param for m in group.members):
                reason = Refusal(
                    "prune_width", group.node,
                    f"{group.id} has no parameter in repeated blocks, which are what remove= "
                    "counts; params= or an absolute count reaches it", "outside_blocks",
                )  # fmt: skip
            why = importance.why_not(analysis.program, group, self.method)
            if reason is None and why is not None:
                reason = Refusal("prune_width", group.node, why, "method_reads_it")
            if reason is None:
                found.append(group)
            else:
                node = group.blocked[0].node if group.blocked else group.node
                refused.append(Refusal(reason.by, node, reason.reason, reason.predicate,
                                       analysis.path(node)))  # fmt: skip
        return found, refused

    def _needs_no_gradient_of_codes(self, program: Program) -> None:
        decoded = importance.quantised(program) if self.method in importance.GRADIENTS else None
        if decoded is not None:
            raise UsageError(
                f"prune_width:method: expected a dense graph for {self.method}, which needs "
                "gradients, found packed weights", where=f"node {decoded}",
                hint="prune before quantising",
            )  # fmt: skip

    # ** decisions **

    def predict(self, analysis: Analysis, sites: list[Group]) -> Choice:
        counts = self._counts(analysis, sites)
        keep = {g.id: torch.arange(counts[g.id]) for g in sites}
        return Choice(self._data(analysis.program, sites, keep), exact=not self.everywhere)

    def decide(self, context: Context, sites: list[Group]) -> Choice:
        program = context.program
        counts = self._counts(context.analysis, sites)
        how = importance.Scoring(
            self.method, self.taylor, self.reduce, self.gradient_samples, self.damp, self.seed
        )
        tokens, options = context.tokens, context.options
        scores = importance.scores(program, sites, how, tokens, options, context.listener)
        if self.everywhere:
            ledger = self._ledger(program, sites)
            priority = self._priority(ledger, scores)
            keep = width.ranked(ledger, self._target(), priority, together=bool(self.uniform))
        else:
            keep = {g.id: width.local(scores[g.id].values, counts[g.id]) for g in sites}
        tensors: dict[str, Tensor] = {}
        if self.repair != "none":
            tensors = compensate.compensations(
                program, {g: keep[g.id] for g in sites}, self.repair, self.damp, context.data,
                options, context.listener,
            )  # fmt: skip
        choice = Choice(self._data(program, sites, keep), tensors)
        records = [_record(g, scores[g.id].values, keep[g.id]) for g in sites]
        return Choice(choice.data, tensors, records + self.told_losses(context, choice))

    def apply(self, program: Program, choice: Choice) -> list[str]:
        groups = {g.id: g for g in Analysis(program).groups}
        keep = {groups[name]: torch.tensor(units) for name, units in choice.data["keep"].items()}
        names = cut(program, keep, made_by=self.called)
        for row in choice.data["biases"]:
            bias = compensate.Bias(**row)
            compensate.add_bias(program, bias, choice.tensors.get(bias.param))
            names.append(bias.param)
        told = {row["param"] for row in choice.data["biases"]}
        for name, tensor in choice.tensors.items():
            if name not in told:
                program.set_tensor(name, tensor)
                names.append(name)
        refresh_segments(program)
        return list(dict.fromkeys(names))

    def _target(self) -> width.Target:
        if self.kept:
            return width.Target(kept=self.kept)
        return width.Target(params=self.params) if self.params else width.Target(self.remove)

    def _ledger(self, program: Program, sites: list[Group]) -> width.Ledger:
        rounding = width.Rounding(self.multiple, everywhere=self.explicit("multiple"))
        return width.Ledger(program, sites, rounding)

    def _counts(self, analysis: Analysis, sites: list[Group]) -> dict[str, int]:
        """How many units stay, by group; under a global ranking only a forecast."""
        program = analysis.program
        ledger = self._ledger(program, sites)
        if self.everywhere:
            width.check_costs(ledger)
        try:
            counts = width.counts(ledger, self._target())
        except UsageError as e:
            # What was not considered is often why a target cannot be reached.
            refused = self.sites(analysis)[1]
            raise UsageError(
                f"prune_width:{e.message}", where=e.where,
                hint=str(refused[0]) if refused else e.hint,
            ) from None  # fmt: skip
        if self.uniform:
            width.check_uniform(program, counts, sites)
        return counts

    def _priority(
        self, ledger: width.Ledger, scores: dict[str, importance.Scores]
    ) -> dict[str, Tensor]:  # fmt: skip
        """Scores that compare between groups: of the loss per parameter, or standardised."""
        if self.method in importance.ADDITIVE:
            inside = self.params is None
            return {g: s.values / ledger.cost(g, inside=inside) for g, s in scores.items()}
        return {g: s.standard() for g, s in scores.items()}

    def _data(
        self, program: Program, sites: list[Group], keep: dict[str, Tensor]
    ) -> dict[str, Any]:
        """What ``apply`` reads: kept units of the groups that lose some, and the biases."""
        lost = [g for g in sites if len(keep[g.id]) < g.units]
        made = compensate.biases(program, lost) if self.repair in ("bias", "both") else []
        return {
            "keep": {g.id: keep[g.id].tolist() for g in lost},
            "biases": [b.to_json() for b in made],
        }


def _record(group: Group, score: Tensor, keep: Tensor) -> dict[str, Any]:
    """One group's row: sizes, the scores' quantiles, the share of the importance that stays."""
    total = float(score.sum())
    points = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=score.dtype)
    return {
        "site": group.id, "kind": group.kind, "units_before": group.units,
        "units_after": len(keep), "importance": total,
        "score_quantiles": torch.quantile(score, points).tolist(),
        "importance_kept": float(score[keep].sum()) / total if total > 0 else 1.0,
    }  # fmt: skip
