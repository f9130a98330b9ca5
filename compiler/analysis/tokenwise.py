"""Proof that a program works token by token: attention alone mixes along the sequence.

Every axis whose length holds the sequence symbol is followed through the ties of the op rows. It
may be renamed, moved, or merged with the batch, and nothing else. The proof is what allows a KV
cache, and calibration on batches of other lengths than the captured one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx

from ..ir.dims import BATCH, SEQ, Dim
from ..ir.graph import Program, info
from ..ir.refusal import Refusal
from ..ir.types import SymType
from .ties import ATTENTION, Axis, is_element, is_sequence, op_name, parts_of, shape_of, ties_of

# Ops that repeat one value for every token: what they make holds the same for each of them.
_SPREAD = frozenset({
    "aten.expand.default", "aten.full.default", "aten.zeros.default", "aten.ones.default",
    "aten.new_zeros.default", "aten.new_ones.default", "aten.new_full.default",
    "aten.zeros_like.default", "aten.ones_like.default", "aten.full_like.default",
    "aten.scalar_tensor.default",
})  # fmt: skip

_BIAS = {"llmc.attention": 6, "llmc.cached_attention": 5}


def _axes(node: fx.Node) -> list[Axis]:
    found = []
    for part in range(parts_of(node)):
        for a, d in enumerate(shape_of(node, part) or ()):
            if is_sequence(d):
                found.append(Axis(node, a, part))
    return found


def _token_run(dims: Iterable[Dim]) -> bool:
    """Whether axes of these lengths are batch and sequence alone: merging keeps tokens whole."""
    return all(not isinstance(d, int) and d.free_symbols <= {BATCH, SEQ} for d in dims if d != 1)


def _dim(a: Axis) -> Dim:
    shape = shape_of(a.node, a.part)
    assert shape is not None
    return shape[a.axis]


def _attention(
    node: fx.Node, name: str, outs: list[Axis], without: Collection[fx.Node]
) -> tuple[str, str] | None:
    """Attention is token-wise in q by its definition; only q's length may reach its result."""
    place = _BIAS[name]
    bias = node.args[place] if len(node.args) > place else node.kwargs.get("bias")
    if isinstance(bias, fx.Node) and bias not in without and _axes(bias):
        return "bias_free_of_sequence", f"{name} adds a bias that depends on the sequence"
    query = node.args[0]
    if not isinstance(query, fx.Node) or [a.axis for a in _axes(query)] != [2]:
        return "sequence_kept", f"{name} reads a query without the sequence on axis 2"
    if [a.axis for a in outs] != [1]:
        return "sequence_kept", f"{name} gives the sequence on another axis than 1"
    return None


def _check(node: fx.Node, without: Collection[fx.Node]) -> tuple[str, str] | None:
    """(predicate, reason) why a call is not token-wise, or None."""
    name = op_name(node)
    if isinstance(info(node).type, SymType):
        return None  # A length is no value of a token; what is made from it is checked where it is.
    ins = [a for n in node.all_input_nodes for a in _axes(n)]
    outs = _axes(node)
    if not ins and not outs:
        return None
    if name in ATTENTION:
        return _attention(node, name, outs, without)
    for part in range(parts_of(node)):
        if sum(a.part == part for a in outs) > 1:
            return "one_sequence_axis", f"{name} pairs tokens with tokens in one value"
    if is_element(node):
        ins = [a for a in ins if a.part == node.args[1]]
    ties = ties_of(node)
    if ties is None:
        return "has_ties", f"{name} has no rule for how its axes are tied"
    kept: set[Axis] = set()
    made: set[Axis] = set()
    for tie in ties:
        mine = [a for a in tie.ins if is_sequence(_dim(a))]
        theirs = [a for a in tie.outs if is_sequence(_dim(a))]
        if tie.kind == "same" and theirs:
            kept.update(mine)
            made.update(theirs if mine else ())
        elif (
            tie.kind in ("split", "merge")
            and _token_run(_dim(a) for a in tie.ins)
            and _token_run(_dim(a) for a in tie.outs)
        ):
            kept.update(mine)
            made.update(theirs)
        elif mine:
            what = {"contract": "sums over", "norm": "normalises over", "mix": "mixes"}.get(
                tie.kind, f"applies {tie.kind} to"
            )
            return (
                "point_wise",
                f"{name} {what} axis {mine[0].axis} of {mine[0].node.name}, the sequence",
            )
    for a in ins:
        if a not in kept:
            return "sequence_kept", f"{name} drops the sequence axis {a.axis} of {a.node.name}"
    for a in outs:
        if a not in made and name not in _SPREAD:
            return "sequence_given", f"{name} makes values that depend on the sequence length"
    return None


def prove_tokenwise(program: Program, without: Collection[fx.Node] = ()) -> list[Refusal]:
    """Culprits that stand in the way of token-wise execution; an empty list is the proof.

    Every refusal names one node and the failing condition. Calls ``without`` are those that will
    be taken away.
    """
    out = []
    for node in program.graph.nodes:
        if node.op != "call_function" or node in without:
            continue
        found = _check(node, without)
        if found is not None:
            out.append(Refusal("tokenwise", node.name, found[1], found[0], info(node).path))
    return out
