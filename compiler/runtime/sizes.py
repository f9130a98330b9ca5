"""What each stored tensor is for, found by who reads it, and how many bits a weight takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..analysis.flow import is_plain_move
from ..analysis.ties import WHOLE_ATTENTION
from ..ir.caches import cache_params
from ..ir.dims import numel
from ..ir.graph import Program, tensor_type
from ..ir.ops import row_of

_EXPAND = "aten.expand.default"


@dataclass(frozen=True)
class Sizes:
    """Bytes as stored.

    Attributes:
        total: of all parameters.
        by_role: by what the tensors are for.
        linear_weights: elements of the matrices that linears multiply with, the head left out;
            of a factored matrix the elements of its factors.
        linear_bytes: bytes that store them: codes, scales, positions and dense weights alike.
    """

    total: int
    by_role: dict[str, int] = field(default_factory=dict)
    linear_weights: int = 0
    linear_bytes: int = 0

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per linear weight (embedding and head left out); None without linears."""
        return 8 * self.linear_bytes / self.linear_weights if self.linear_weights else None

    def to_json(self) -> dict[str, Any]:
        return {
            "total": self.total, "by_role": dict(sorted(self.by_role.items())),
            "linear_weights": self.linear_weights, "linear_bytes": self.linear_bytes,
            "bits_per_linear_weight": self.bits_per_weight,
        }  # fmt: skip


def roles(program: Program) -> dict[str, str]:
    """Role of each parameter: the name of the argument that its first reader gives it.

    ``weight`` of a linear, ``embedding``, ``codes``, ``scale``, ``zero``, ``meta``, ``gain``, …;
    ``head`` for the dense matrix that makes the logits; ``buffer`` for what is not trained.
    """
    heads = {id(n) for n in _head(program)}
    return {
        str(node.target): _role(program, node, heads)
        for node in program.graph.nodes
        if node.op == "get_attr"
    }


def _role(program: Program, node: fx.Node, heads: set[int]) -> str:
    names = []
    for user, name in _readers(node):
        op = row_of(user).name
        if op in ("aten.embedding.default", "llmc.tt_lookup"):
            return "embedding"
        names.append("head" if id(user) in heads and name == "weight" else name)
    role = names[0] if names else "unused"
    return "buffer" if role == "operand" and not program.params[str(node.target)].trained else role


def _readers(node: fx.Node) -> Iterable[tuple[fx.Node, str]]:
    """(reader, argument name) of a value, looking through ops that only move it."""
    for user in node.users:
        if user.op != "call_function":
            continue
        if is_plain_move(user) or row_of(user).name == _EXPAND:
            yield from _readers(user)
            continue
        for i, arg in enumerate(user.args):
            if arg is node or (isinstance(arg, (list, tuple)) and node in arg):
                yield user, _argument_name(user, i)
        for key, arg in user.kwargs.items():
            if arg is node:
                yield user, key


def _argument_name(node: fx.Node, position: int) -> str:
    schema = getattr(node.target, "_schema", None)
    if schema is None or position >= len(schema.arguments):
        return "operand"
    name: str = schema.arguments[position].name
    return "operand" if name in ("self", "other", "input", "mat2") else name


def _head(program: Program) -> list[fx.Node]:
    """Linears that make the logits: reached back from the output through no other linear."""
    found: list[fx.Node] = []
    todo = list(program.output.all_input_nodes)
    seen: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if _matrices(node):
            found.append(node)
        elif row_of(node).name not in WHOLE_ATTENTION:
            todo.extend(node.all_input_nodes)
    return found


def _matrices(node: fx.Node) -> list[tuple[int, list[fx.Node]]]:
    """(elements, values that encode them) of each matrix that a node multiplies with."""
    name = row_of(node).name
    if name == "aten.linear.default":
        weight = node.args[1]
        if isinstance(weight, fx.Node) and _constant(weight):
            count = numel(tensor_type(weight).shape)
            return [(count, [weight])] if isinstance(count, int) else []
    if name == "llmc.experts":
        weights = [a for a in node.args[3:7] if isinstance(a, fx.Node)]
        return [(int(numel(tensor_type(w).shape)), [w]) for w in weights]
    return []


def _constant(node: fx.Node) -> bool:
    return node.op == "get_attr" or (
        node.op == "call_function" and all(_constant(n) for n in node.all_input_nodes)
    )


def _sources(nodes: Iterable[fx.Node]) -> set[str]:
    """Parameters that values are computed from."""
    out: set[str] = set()
    for node in nodes:
        out |= {str(node.target)} if node.op == "get_attr" else _sources(node.all_input_nodes)
    return out


def sizes(program: Program) -> Sizes:
    """Bytes by role, and what the linear weights take."""
    by_role: dict[str, int] = {}
    kinds = roles(program)
    for name, role in kinds.items():
        by_role[role] = by_role.get(role, 0) + program.params[name].bytes
    heads = set(_head(program))
    weights, stored, seen = 0, 0, set[str]()
    for node in program.calls():
        if node in heads:
            continue
        for count, parts in _matrices(node):
            names = _sources(parts)
            if names & seen:
                continue
            seen |= names
            weights += count
            stored += sum(program.params[n].bytes for n in names)
    # Rotations around weights belong to them.
    turns = {n for node in program.calls("llmc.rotate") for n in _sources(node.all_input_nodes[1:])}
    stored += sum(program.params[n].bytes for n in turns - seen)
    total = program.weight_bytes()
    if program.exits is not None and program.exits.classifies:
        by_role["classifier"] = program.exits.bytes
    kept = sum(p.bytes for p in cache_params(program).values())
    if kept:
        by_role["cache"] = kept
        total += kept
    return Sizes(total, by_role, weights, stored)
