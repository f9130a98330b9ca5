"""Normalising: aten clusters become semantic ops by exact, declared lifts; then canonical names."""

from __future__ import annotations

from ...ir.graph import Program
from ...ir.refusal import Refusal
from . import activations, attention, constants, linears, norms, rope, tidy, tokens, views

LIFTS = (
    linears.LINEAR, norms.LAYER_NORM, norms.ATEN_RMS_NORM, norms.RMS_NORM, norms.CENTRED,
    *rope.ROPES, *activations.ACTIVATIONS, activations.GATED, attention.SDPA, attention.EAGER,
    attention.FOLDED,
)  # fmt: skip


def normalise(program: Program) -> list[Refusal]:
    """Rewrite an imported program in place.

    Returns:
        Near misses: clusters that looked like a semantic op and were left as they are.
    """
    tidy.pieces_to_slices(program)
    views.simplify_views(program)
    tidy.share_equal_calls(program)
    refusals = [r for lift in LIFTS for r in lift.run(program)]
    program.prune()
    constants.drop_idle_masks(program)
    constants.fold_tables(program)
    tokens.unflatten_tokens(program)
    views.simplify_views(program)
    tidy.share_equal_calls(program)
    tidy.rename(program)
    tidy.drop_marks(program)
    program.graph.lint()
    return refusals
