"""Nodes of a graph as rows, and queries over them such as ``op=linear,input.users>1``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from ..ir.errors import UsageError, nearest
from ..ir.graph import Program, info
from ..ir.literals import show_value_type
from ..ir.ops import row_of
from ..ir.types import TensorType, short, total_bytes
from .text import Table, size

Row = dict[str, Any]
FIELDS = ("name", "op", "type", "dtype", "rank", "bytes", "users", "inputs", "made_by", "path",
          "source", "segment", "text")  # fmt: skip
_NUMBERS = {"rank", "bytes", "users", "inputs"}
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "=": operator.eq, "!=": operator.ne, ">": operator.gt, ">=": operator.ge,
    "<": operator.lt, "<=": operator.le,
}  # fmt: skip
_TERM = re.compile(r"\s*(input\.)?([a-z_]+)\s*(!=|>=|<=|=|~|>|<)\s*(.+?)\s*")


def segment_map(program: Program) -> dict[str, str]:
    """Segment of each node; a node that no segment lists belongs where its first reader does."""
    known = {n: s.name for s in program.segments for n in s.nodes}
    for node in reversed(list(program.graph.nodes)):
        if node.name not in known:
            reader = next((u.name for u in node.users if u.name in known), None)
            known[node.name] = known[reader] if reader is not None else ""
    return known


def node_row(program: Program, node: fx.Node, segment: str = "") -> Row:
    """What a reader wants to know of one node."""
    about = info(node)
    kind = about.type
    dense = kind if isinstance(kind, TensorType) else None
    param = program.param_of(node)
    count = param.bytes if param is not None else total_bytes(kind)
    return {
        "name": node.name,
        "op": op_of(node),
        "type": show_value_type(kind),
        "dtype": None if dense is None else short(param.dtype if param else dense.dtype),
        "rank": None if dense is None else len(dense.shape),
        "bytes": count if isinstance(count, int) else str(count),
        "users": len(node.users),
        "inputs": len(node.all_input_nodes),
        "made_by": about.made_by,
        "path": about.path,
        "source": about.source,
        "segment": segment,
        "text": call_text(node),
    }


def op_of(node: fx.Node) -> str:
    """The op row's name without its overload, or what kind of node it is."""
    if node.op != "call_function":
        return {"placeholder": "input", "get_attr": "param"}.get(node.op, node.op)
    return row_of(node).name.removesuffix(".default")


def call_text(node: fx.Node, name: Callable[[fx.Node], str] = lambda n: n.name) -> str:
    """``op(args, key=value)``; values are told by ``name``."""
    if node.op == "output":
        return f"output({_text(node.args[0], name)})"
    if node.op != "call_function":
        return f"{op_of(node)}({node.target})"
    parts = [_text(a, name) for a in node.args]
    parts += [f"{k}={_text(v, name)}" for k, v in node.kwargs.items()]
    return f"{op_of(node)}({', '.join(parts)})"


def _text(value: Any, name: Callable[[fx.Node], str]) -> str:
    if isinstance(value, fx.Node):
        return name(value)
    if isinstance(value, list):
        return f"[{', '.join(_text(v, name) for v in value)}]"
    if isinstance(value, tuple):
        return f"({', '.join(_text(v, name) for v in value)})"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).removeprefix("torch.")


def rows(program: Program) -> list[Row]:
    """One row per node, in graph order."""
    where = segment_map(program)
    return [node_row(program, n, where[n.name]) for n in program.graph.nodes]


def query(program: Program, text: str) -> list[Row]:
    """Rows that meet every term of ``field OP value, …``; ``input.field`` asks any value it reads.

    ``=`` and ``!=`` compare, ``~`` looks for a part of the text, ``> >= < <=`` compare numbers. An
    op may be written without its namespace.
    Raises:
        UsageError: a term that cannot be read, or an unknown field.
    """
    terms = [_term(t) for t in text.split(",")]
    all_rows = {r["name"]: r for r in rows(program)}
    nodes = {n.name: n for n in program.graph.nodes}

    def meets(name: str) -> bool:
        for of_input, test in terms:
            if of_input:
                given = [
                    all_rows[i.name] for i in nodes[name].all_input_nodes if i.op != "get_attr"
                ]
                if not any(test(r) for r in given):
                    return False
            elif not test(all_rows[name]):
                return False
        return True

    return [r for name, r in all_rows.items() if meets(name)]


def _term(text: str) -> tuple[bool, Callable[[Row], bool]]:
    match = _TERM.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--where: expected field=value, found {text.strip()!r}",
            hint=f"fields: {', '.join(FIELDS)}; input.FIELD asks what a node reads",
        )
    of_input, field, sign, value = match.groups()
    if field not in FIELDS:
        raise UsageError(
            f"--where: expected a field of {', '.join(FIELDS)}, found {field!r}",
            hint=nearest(field, FIELDS),
        )
    if field in _NUMBERS or sign in (">", ">=", "<", "<="):
        return bool(of_input), _numeric(field, sign, value)
    return bool(of_input), _textual(field, sign, value)


def _numeric(field: str, sign: str, value: str) -> Callable[[Row], bool]:
    try:
        wanted = float(value)
    except ValueError:
        raise UsageError(f"--where: expected a number for {field}, found {value!r}") from None
    if field not in _NUMBERS or sign == "~":
        raise UsageError(f"--where: expected = or ~ or a number field, found {field}{sign}{value}")

    def test(row: Row) -> bool:
        found = row[field]
        if not isinstance(found, (int, float)):
            return sign == "!="
        return _COMPARE[sign](found, wanted)

    return test


def _textual(field: str, sign: str, value: str) -> Callable[[Row], bool]:
    def test(row: Row) -> bool:
        found = str(row[field] or "")
        if sign == "~":
            return value in found
        same = found == value
        if field == "op":
            same = same or found.split(".", 1)[-1].split(".")[0] == value
        return same if sign == "=" else not same

    return test


def nodes_table(found: Iterable[Row], title: str = "") -> Table:
    """Rows as a table."""
    head = ("node", "call", "type", "bytes", "users", "made by", "path")
    table = Table(title, head, right=("bytes", "users"))
    for r in found:
        count = size(r["bytes"]) if isinstance(r["bytes"], int) else r["bytes"]
        table.rows.append(
            (r["name"], r["text"], r["type"], count, str(r["users"]), r["made_by"], r["path"])
        )
    return table
