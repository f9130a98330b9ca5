"""Carrying a plan out: structural passes first, then the rounds, then what needs the result.

Each structural pass is measured on the program that the one before it left. What follows is planned
anew on the program that they decided.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..ir.errors import UsageError
from ..ir.events import Event, Listener, heard_by, silent, tell
from ..ir.graph import Program
from .analysis import Analysis
from .measure import Options
from .plan import Plan, add_late, lay_out
from .recipe import Call
from .rounds import run_rounds
from .structure import Choice, Context, Structural


@dataclass
class Compiled:
    """A solved plan: the final program with tensors, and records of what was done.

    Attributes:
        records: one row per weight; folds: one per migrated scale.
        structure: one row per structural pass, with what it decided and measured.
    """

    program: Program
    plan: Plan
    records: list[dict[str, Any]] = field(default_factory=list)
    folds: list[dict[str, Any]] = field(default_factory=list)
    structure: list[dict[str, Any]] = field(default_factory=list)

    @property
    def fallbacks(self) -> list[dict[str, Any]]:
        """Every weight whose solve fell back, with the reasons."""
        return [
            {"site": r["site"], "reasons": r["fallbacks"]} for r in self.records if r["fallbacks"]
        ]


def compile_plan(
    plan: Plan,
    tokens: Tensor | None,
    options: Options | None = None,
    listener: Listener = silent,
) -> Compiled:
    """Carry a plan out.

    Args:
        tokens: int64 [samples, length] for calibration; None when no pass needs any.
    Returns:
        The result with the plan that it follows: the given one, or, where structural passes
        measured, a new one on what they decided.
    Raises:
        UsageError: a pass needs calibration data and none is given.
        ModelError: a weight or an activation is not finite.
    """
    options, listener = options or Options(), heard_by(listener)
    if plan.needing and tokens is None:
        raise UsageError(f"expected calibration data for {', '.join(plan.needing)}, found none")
    rounds = len(plan.stages) * len(plan.source.segments)
    listener(Event("start", {"steps": len(plan.steps) + rounds}))

    def decide(call: Call, analysis: Analysis, sites: list[Any]) -> Choice:
        listener(Event("structure", {"pass": call.name}))
        assert isinstance(call.made, Structural)
        context = Context(analysis.program, analysis, tokens, options, listener)
        return call.made.decide(context, sites)

    if plan.steps:
        plan = replace(lay_out(plan.captured, plan.recipe, decide), mixing=plan.mixing)
        tell(Event("laid", {"plan": plan, "decided": True}))
    solved = run_rounds(plan, tokens, options, listener)
    if add_late(plan, decide):
        tell(Event("laid", {"plan": plan, "decided": True}))
    listener(Event("end", {"records": len(solved.records)}))
    structure = [s.to_json(full=True) for s in plan.steps]
    return Compiled(plan.program, plan, solved.records, solved.folds, structure)
