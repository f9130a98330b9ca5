"""What carrying a plan out takes: bytes of the result, memory and operations of calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..analysis.cost import CostModel
from ..ir.graph import Program
from .measure import LOGITS

if TYPE_CHECKING:
    from .plan import Plan


def predictions(plan: Plan, tokens: int, length: int) -> dict[str, Any]:
    """Bytes of the artefact's weights, peak RAM and operations of the calibration.

    ``exact`` says whether the bytes are those that compiling gives; else they are a bound, or
    what each weight stores on average.
    Args:
        tokens: of all calibration windows together; length: of one.
    """
    widest = max(_widest(p) for p in (plan.source, plan.captured if plan.steps else plan.source))
    windows = tokens // length if length else 0
    flops, stream = _forward(plan.source, windows, length) if windows else (0, 0)
    held, swept = _sweeps(plan, windows)
    deciding = [s.held for s in plan.steps]
    solving = 3 * _grams(plan) + _stacks(plan)
    # Deciding about blocks keeps the stream in up to five places, and looks at logits.
    logits = min(LOGITS, 8 * tokens * (plan.source.facts.get("vocab") or LOGITS))
    more = 3 * stream + logits if windows and any(s.forwards for s in plan.steps) else 0
    forwards = 2 * len(plan.stages) + 3 * swept
    return {
        "bytes_before": plan.captured.weight_bytes(),
        "bytes_after": plan.program.weight_bytes(),
        "exact": plan.exact,
        "ram_bound": widest + max(solving, held, *deciding) + 2 * stream + more,
        "calibration_flops": int(forwards * flops) + _measuring(plan, windows, length),
        "calibration_tokens": tokens,
    }


def _widest(program: Program) -> int:
    """fp32 bytes of the parameters of the segment that has most."""
    out = 0
    for segment in program.segments:
        nodes = [program.node(n) for n in segment.nodes]
        held = [p for n in nodes if (p := program.param_of(n)) is not None]
        out = max(out, sum(4 * p.bytes // p.dtype.itemsize for p in held))
    return out


def _grams(plan: Plan) -> int:
    """fp32 bytes of the Hessians of the block that has most."""
    out = 0
    for stage in plan.stages:
        by_block: dict[str, dict[str, int]] = {}
        for d in stage.decisions.values():
            if d.needs_gram:
                size = 4 * d.site.experts * d.site.in_features**2
                by_block.setdefault(d.site.segment, {})[d.site.reads] = size
        out = max([out, *(sum(v.values()) for v in by_block.values())])
    return out


def _stacks(plan: Plan) -> int:
    """Bytes of the solved experts of one stacked weight, apart and joined: values and codes."""
    found = (d.site for s in plan.stages for d in s.decisions.values() if d.site.stacked)
    return max((12 * s.in_features * s.out_features for s in found), default=0)


def _sweeps(plan: Plan, windows: int) -> tuple[int, float]:
    """Reverse sweeps: (fp32 bytes of the information of all weights, sweeps over all windows)."""
    held, share = 0, 0.0
    for stage in plan.stages:
        found = [d for d in stage.decisions.values() if d.swept]
        held = max(held, sum(4 * d.site.in_features * d.site.out_features for d in found))
        most = max((int(d.options["samples"]) for d in found), default=0)
        share += min(most, windows) / max(windows, 1)
    # The gradients of one window stand beside what was summed so far.
    return 2 * held, share


def _forward(program: Program, windows: int, length: int) -> tuple[int, int]:
    """(operations of one forward over all windows, bytes that flow between two blocks)."""
    costs = CostModel(program, windows, length)
    between = program.segments[1].live_in if len(program.segments) > 1 else ()
    stream = sum(costs.bytes_of(program.node(n)) for n in between)
    return costs.table()["total"]["flops"], stream


def _measuring(plan: Plan, windows: int, length: int) -> int:
    """Operations that deciding the structural steps takes, as if on the captured program."""
    forwards = sum(s.forwards for s in plan.steps)
    if not (forwards and windows):
        return 0
    return int(forwards * CostModel(plan.captured, windows, length).table()["total"]["flops"])
