"""A program as a Python file: readable, runnable, and read back by :mod:`.parser` without running.

The file has a header of literals (dtype, inputs, states, parameters, facts) and one function
``forward(p, …)``: one statement per node, with type, maker, module path and source as a comment.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from .errors import ModelError
from .graph import Info, Param, Program, info
from .literals import check_facts, is_named, show_float, show_value_type
from .ops import row_of
from .ops.base import OpRow
from .types import short

HEADER = "# llmc program"
_IMPORTS = ("import operator", "", "import torch", "", "from llmc.compiler.ir.ops import ROWS", "")
SEGMENT = "# segment "
RESERVED = frozenset({"torch", "operator", "ROWS", "float", "states", "None", "True", "False"})


def print_python(program: Program, title: str = "") -> str:
    """The program as Python source.

    Running it defines ``forward(p, *inputs)``, ``p`` mapping parameter names to tensors in the
    dtype in which the graph computes; a program with state takes ``states`` last.

    Args:
        title: what made the program, e.g. ``w4,prune24``; the first line says it.
    Raises:
        ModelError: an argument that has no spelling, or a node name that Python reserves.
    """
    names = {n.name for n in program.graph.nodes}
    clash = sorted(names & RESERVED)
    if clash:
        raise ModelError(f"expected node names that are free in Python, found {clash}")
    head = f"{HEADER} made by {_line(title)}" if title else HEADER
    lines = [
        head, *_IMPORTS,
        f'DTYPE = "{short(program.dtype)}"', f"FACTS = {_fact(check_facts(program.facts))}",
    ]  # fmt: skip
    if program.exits is not None:
        lines.append(f"EXITS = {_fact(program.exits.to_json())}")
    lines += _table("INPUTS", ((n.name, _quote(_type_text(n))) for n in program.inputs))
    lines += _table("STATES", ((s.name, _state(s)) for s in program.states.values()))
    lines += _table("PARAMS", ((p.name, _param(p)) for p in program.params.values()))
    lines += ["", "", _signature(program, names), *_body(program, table_name(names))]
    return "\n".join(lines) + "\n"


def table_name(names: Iterable[str]) -> str:
    """Name of the argument that holds the parameters: ``p``, or the first free ``p_``, ``p__`` …"""
    taken, name = set(names), "p"
    while name in taken:
        name += "_"
    return name


# ** header **


def _table(name: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    body = [f"    {_quote(key)}: {value}," for key, value in rows]
    return [f"{name} = {{", *body, "}"] if body else [f"{name} = {{}}"]


def _param(param: Param) -> str:
    stored = f"{short(param.dtype)}[{', '.join(map(str, param.shape))}]"
    if not param.shape:
        stored = short(param.dtype)
    flags = "trained" if param.trained else "buffer"
    if param.keep:
        flags += " keep"
    return "(" + ", ".join(_quote(t) for t in (stored, flags, *param.names)) + ")"


def _state(state: Any) -> str:
    types = (show_value_type(t) for t in state.types)
    return "(" + ", ".join(_quote(t) for t in (state.kind, *types)) + ")"


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quote(k)}: {_fact(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_fact(v) for v in value) + "]"
    if isinstance(value, float):
        return show_float(value)
    return _quote(value) if isinstance(value, str) else repr(value)


def _quote(text: str) -> str:
    """A string literal on one line; JSON's escapes are Python's too."""
    return json.dumps(text, ensure_ascii=False)


def _line(text: str) -> str:
    return " ".join(text.split())


# ** body **


def _type_text(node: fx.Node) -> str:
    return show_value_type(info(node).type)


def _signature(program: Program, names: set[str]) -> str:
    args = [table_name(names), *(n.name for n in program.inputs)]
    if any(row_of(n).stateful for n in program.calls()):
        args.append("states")
    return f"def forward({', '.join(args)}):"


def _body(program: Program, table: str) -> list[str]:
    starts = segment_starts(program)
    lines: list[str] = []
    for node in program.graph.nodes:
        for name in starts.get(node.name, ()):
            lines.append(f"    {SEGMENT}{name}")
        if node.op == "get_attr":
            lines.append(f"    {node.name} = {table}[{_quote(str(node.target))}]{_comment(node)}")
        elif node.op == "call_function":
            lines.append(f"    {node.name} = {_call(node)}{_comment(node)}")
        elif node.op == "output":
            lines.append(f"    return {show(node.args[0])}")
        elif node.op != "placeholder":
            raise ModelError(f"expected calls only, found {node.op}", where=f"node {node.name}")
    return lines


def segment_starts(program: Program) -> dict[str, list[str]]:
    """Segment names by the node at which they start.

    Raises:
        ModelError: the segments are not runs of the graph, one after another.
    """
    order = [n.name for n in program.graph.nodes]
    out: dict[str, list[str]] = {}
    at = 0
    for s in program.segments:
        if list(s.nodes) != order[at : at + len(s.nodes)] or not s.nodes:
            raise ModelError(f"expected segments in graph order, found {s.name!r} out of place")
        out.setdefault(order[at], []).append(s.name)
        at += len(s.nodes)
    if program.segments and at != len(order):
        raise ModelError(f"expected segments over all {len(order)} nodes, found {at}")
    return out


def _comment(node: fx.Node) -> str:
    record: Info = info(node)
    fields = (_type_text(node), record.made_by, record.path, record.source)
    text = " | ".join(_line(f).replace("|", "/") for f in fields)
    return f"  # {text.rstrip(' |')}"


def spelling(row: OpRow) -> str:
    """How the file calls a row's op."""
    if row.name.startswith("operator."):
        return row.name
    if row.stateful:
        return f'ROWS["{row.name}"].reference'
    packet = row.name if row.name.startswith("aten.") else f"{row.name}.default"
    return f"torch.ops.{packet}"


def _call(node: fx.Node) -> str:
    row = row_of(node)
    kwargs = dict(node.kwargs)
    parts = [show(a) for a in node.args]
    if row.stateful:
        name = kwargs.pop("state")
        kwargs_text = [f"{k}={show(v)}" for k, v in kwargs.items()]
        parts += [*kwargs_text, f"state=states[{_quote(str(name))}]"]
    else:
        parts += [f"{k}={show(v)}" for k, v in kwargs.items()]
    return f"{spelling(row)}({', '.join(parts)})"


def show(value: Any) -> str:
    """Python source of an argument.

    Raises:
        ModelError: a value that has no spelling.
    """
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(show(v) for v in value)
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quote(str(k))}: {show(v)}" for k, v in value.items()) + "}"
    if value is None or isinstance(value, (bool, int)):
        return repr(value)
    if isinstance(value, float):
        return show_float(value)
    if isinstance(value, str):
        return _quote(value)
    if is_named(value):
        return str(value)
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    raise ModelError(f"expected an argument that can be written, found {type(value).__name__}")
