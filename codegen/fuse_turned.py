"""Reading a linear whose result is rotated back: rotate(linear(x, W), scale, inverse) + bias."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from ..compiler.ir.graph import tensor_type
from ..compiler.ir.refusal import Refusal
from .fuse_nodes import Accept, constant, is_op, is_sum, only_user, refusal

if TYPE_CHECKING:
    from .fuse_chain import Core

FEATURE = "out_mixed"


def turned(core: Core) -> Core | None:
    """The same with the rotation that alone reads its result, and a stored vector added to that."""
    turn = only_user(core.result)
    if not is_op(turn, "llmc.rotate") or core.problem.bias:
        return None
    assert turn is not None
    x, scale = turn.args
    if x is not core.result or not turn.kwargs.get("inverse") or not constant(scale):
        return None
    assert isinstance(scale, fx.Node)
    parts, nodes, result = {**core.parts, "out_turn": scale}, core.nodes | {turn}, turn
    problem = replace(core.problem, out_mixed=str(core.problem.N))
    add = only_user(turn)
    if add is not None and is_sum(add):
        a, b = add.args
        other = b if a is turn else a
        assert isinstance(other, fx.Node)
        if constant(other) and tensor_type(other).shape == (core.problem.N,):
            parts, nodes, result = {**parts, "bias": other}, nodes | {add}, add
            problem = replace(problem, bias=True)
    return replace(core, result=result, nodes=nodes, parts=parts, problem=problem)


def left_out(
    chosen: Iterable[Core], read: Mapping[fx.Node, list[Core]], accept: Accept,
    features: Collection[str],
) -> list[Refusal]:  # fmt: skip
    """Rotations of results that no kernel takes in, though it takes the linear."""
    found = []
    for core in chosen:
        able = [c for c in read.get(core.linear, []) if c.problem.out_mixed]
        if FEATURE not in features or core.problem.out_mixed or not able:
            continue
        why = accept(able[0].problem)
        if why is not None:
            turn = only_user(able[0].linear) or able[0].result
            found.append(refusal(turn, f"the {FEATURE} is not fused: {why}", "kernel"))
    return found
