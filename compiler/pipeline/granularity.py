"""group=auto: how many inputs share a scale, chosen for each weight before its round begins.

Source: FineQuant (arXiv 2308.09723): from one scale per row, groups are halved while that pays.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, fx

from ..ir.graph import Program
from ..ir.ops.base import row_of
from ..ir.scheme import Codes, Mask
from ..solvers.grid import rtn_t
from .coding import halvings
from .griding import grid_of
from .plan import Decision, Plan, Stage
from .solving import Work

_GROUPED = ("llmc.dequantize", "llmc.lookup")


def chosen_group(weight: Tensor, codes: Codes, fall: float, unit: int = 1) -> int:
    """The group of weight [m, n]: halved while its rounding error falls by more than that share."""
    wt = weight.t().contiguous()
    best, least = 0, float("inf")
    for group in halvings(len(wt), unit):
        grid = grid_of(replace(codes, group=group), {})
        assert grid is not None
        error = float((rtn_t(wt, grid)[0] - wt).double().square().sum())
        if best and error >= (1 - fall) * least:
            break
        best, least = group, error
    return best


def choose_groups(plan: Plan, stage: Stage, work: Work) -> None:
    """Set the group of each decision of the stage that left it open, in plan and graph."""
    for key, d in stage.decisions.items():
        codes = d.scheme.codes
        if "fall" not in d.options or codes is None:
            continue
        mask = d.scheme.mask
        unit = mask.m if mask is not None and mask.structured else 1
        weight = work.weight(d.site.param).flatten(0, -2)
        group = chosen_group(weight, codes, d.options["fall"], unit)
        new = replace(codes, group=None if group >= d.site.in_features else group)
        stage.decisions[key] = replace(d, scheme=replace(d.scheme, codes=new))
        scheme = plan.schemes[d.site.param]
        plan.schemes[d.site.param] = replace(scheme, codes=new)
        _regroup(plan.program, d, group, mask)


def _regroup(program: Program, d: Decision, group: int, mask: Mask | None) -> None:
    """Let the decode step of a weight count that many inputs, of which a mask keeps its share."""
    step = program.node(d.site.node).args[d.site.slot]
    while isinstance(step, fx.Node) and row_of(step).name not in _GROUPED:
        step = step.args[0]
    assert isinstance(step, fx.Node)
    if mask is not None and mask.structured:
        group = group // mask.m * mask.n
    step.kwargs = {**step.kwargs, "group": group}
    scale = step.args[1]
    if isinstance(scale, fx.Node) and scale.op == "call_function":
        columns = int(str(step.kwargs["columns"]))
        scale.kwargs = {**scale.kwargs, "columns": -(-columns // group)}
