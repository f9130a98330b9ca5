"""Linears that serving engines fuse into one: those that read one value and meet in one op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import partial

from torch import fx

from ...analysis.flow import LINEAR, forward
from ...analysis.ties import ATTENTION, constants, op_name
from ...ir.errors import UsageError
from ...ir.graph import Program
from .codes import Coded

_MEETS = {*ATTENTION, "llmc.gated"}


def fused(program: Program) -> list[list[str]]:
    """Parameters of linears that engines stack: query, key and value; gate and up.

    Found by data flow: linears of one value whose results first meet in one attention or gate.

    Returns:
        Names of parameters, in graph order, in groups of at least two.
    """
    fixed = constants(program.graph)
    rank = {n: i for i, n in enumerate(program.graph.nodes)}
    out: dict[tuple[fx.Node, fx.Node], list[str]] = {}
    for node in program.calls(LINEAR):
        param = program.param_of(node.args[1])
        x = node.args[0]
        if param is None or not isinstance(x, fx.Node):
            continue
        for user, _ in forward(node, rank, partial(_ends, fixed)):
            if op_name(user) in _MEETS:
                out.setdefault((x, user), []).append(param.name)
                break
    return [list(dict.fromkeys(g)) for g in out.values() if len(set(g)) > 1]


def _ends(fixed: Set[fx.Node], user: fx.Node, reached: set[fx.Node]) -> bool:
    """Whether a walk ends: where linears meet, at the next one, or at a sum with another value."""
    name = op_name(user)
    if name == "aten.add.Tensor":
        return any(v not in reached and v not in fixed for v in user.all_input_nodes)
    return name in _MEETS or name == LINEAR or user.op == "output"


def check_fused(program: Program, weights: Sequence[Coded], paths: Mapping[str, str]) -> None:
    """Raises UsageError where linears that engines fuse have different schemes.

    Args:
        program: the captured model. paths: module by parameter.
    """
    found = {w.name: w for w in weights}
    for group in fused(program):
        kinds: dict[object, tuple[str, list[str]]] = {}
        for name in group:
            weight = found.get(name)
            key, text = (weight.scheme, weight.short) if weight else (None, "dense")
            kinds.setdefault(key, (text, []))[1].append(paths[name])
        if len(kinds) > 1:
            told = "; ".join(f"{', '.join(names)}: {text}" for text, names in kinds.values())
            raise UsageError(
                "scheme: expected one for linears that serving engines fuse, found " + told,
                hint="give all of them the same bits, group and grid, or leave all of them dense",
            )
