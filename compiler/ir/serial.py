"""A program as JSON, without its tensors: closed language, bounded sizes, nothing executed on load.

``to_json`` holds what the program *is* and so enters the content hash. Where its parts came from
(module paths, source lines, names in the source model) is ``provenance``, kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from . import caches, exits
from .build import Builder
from .errors import ModelError
from .graph import Info, Param, Program, Segment, State, Weights, info
from .literals import (
    MAX_DEPTH,
    MAX_LIST,
    MAX_NODES,
    MAX_RANK,
    NAMED,
    check_facts,
    check_number,
    check_text,
    is_named,
    parse_dtype,
    parse_type,
    show_value_type,
)  # fmt: skip
from .ops import row, row_of
from .types import TensorType, ValueType, short

FORMAT, VERSION = "llmc.program", 1
_OPS = ("placeholder", "get_attr", "call_function", "output")


def to_json(program: Program) -> dict[str, Any]:
    """The program as JSON values: format, dtype, nodes, params, segments, states, facts, and exits
    and caches where it has some.

    Raises:
        ModelError: an argument that has no JSON form.
    """
    out: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": short(program.dtype),
        "nodes": [_node(n) for n in program.graph.nodes],
        "params": [
            {
                "name": p.name, "shape": list(p.shape), "dtype": short(p.dtype),
                "trained": p.trained, "keep": p.keep,
            }
            for p in program.params.values()
        ],
        "segments": [
            {
                "name": s.name, "nodes": list(s.nodes),
                "live_in": list(s.live_in), "live_out": list(s.live_out),
            }
            for s in program.segments
        ],
        "states": [
            {"name": s.name, "kind": s.kind, "types": [show_value_type(t) for t in s.types]}
            for s in program.states.values()
        ],
        "facts": check_facts(program.facts),
    }  # fmt: skip
    if program.exits is not None:
        out["exits"] = program.exits.to_json()
    if program.caches:
        out["caches"] = {n: c.to_json() for n, c in program.caches.items()}
    return out


def provenance(program: Program) -> dict[str, Any]:
    """Module path and source line of each node, and the source model's names of each parameter."""
    nodes = {n.name: [info(n).path, info(n).source] for n in program.graph.nodes}
    return {
        "nodes": {name: v for name, v in nodes.items() if any(v)},
        "params": {p.name: list(p.names) for p in program.params.values() if p.names},
    }


def attach(program: Program, origin: Any) -> None:
    """Put :func:`provenance` back, in place; it changes nothing that is computed.

    Raises:
        ModelError: not such a record, or a node or parameter that the program does not have.
    """
    nodes = {n.name: n for n in program.graph.nodes}
    tables = _fields(origin, "provenance", {"nodes": dict, "params": dict})
    for name, value in tables["nodes"].items():
        where = f"provenance of node {name!r}"
        if name not in nodes or not isinstance(value, list) or len(value) != 2:
            raise ModelError("expected [path, source] of a known node", where=where)
        path, source = (check_text(v, "provenance") for v in value)
        node = nodes[name]
        node.meta["llmc"] = replace(info(node), path=path, source=source)
    for name, value in tables["params"].items():
        where = f"provenance of parameter {name!r}"
        if name not in program.params or not isinstance(value, list):
            raise ModelError("expected names of a known parameter", where=where)
        names = tuple(check_text(v, "a name") for v in value)
        program.params[name] = replace(program.params[name], names=names)


# ** writing **


def _node(node: fx.Node) -> dict[str, Any]:
    out: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "call_function":
        out["target"] = row_of(node).name
    elif node.op == "get_attr":
        out["target"] = str(node.target)
    if node.op in ("call_function", "output"):
        out["args"] = [_encode(a) for a in node.args]
        out["kwargs"] = {k: _encode(v) for k, v in node.kwargs.items()}
    record = info(node)
    return out | {"type": show_value_type(record.type), "made_by": record.made_by}


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return check_number(value)
    if isinstance(value, str):
        return check_text(value, "a text")
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": {check_text(k, "a key"): _encode(v) for k, v in value.items()}}
    if is_named(value):
        return {"torch": str(value)}
    raise ModelError(f"expected an argument with a JSON form, found {type(value).__name__}")


# ** reading **


def from_json(data: Any, weights: Weights) -> Program:
    """The program of :func:`to_json`; its tensors come from ``weights``, none is read here.

    Types are taken as recorded: :func:`.verifier.verify` proves them. Provenance is empty.
    Raises:
        ModelError: anything that :func:`to_json` does not write; ``where`` names the field.
    """
    top = _fields(
        data,
        "program",
        {
            "format": str, "version": int, "dtype": str, "nodes": list, "params": list,
            "segments": list, "states": list, "facts": dict, "exits": dict,
            "caches": dict,
        },
        optional=("exits", "caches"),
    )  # fmt: skip
    if (top["format"], top["version"]) != (FORMAT, VERSION):
        raise ModelError(
            f"expected {FORMAT} version {VERSION}, found {top['format']!r} {top['version']}",
            hint="an artefact of another version of llmc",
        )
    program = Program(fx.Graph(), {}, weights, _at("dtype", parse_dtype, top["dtype"]))
    program.facts = _at("facts", check_facts, top["facts"])
    for i, p in enumerate(_bounded(top["params"], "params", MAX_NODES)):
        param = _at(f"params[{i}]", _param, p)
        if param.name in program.params:
            raise ModelError(
                f"expected names that differ, found {param.name!r} twice", where=f"params[{i}]"
            )
        program.params[param.name] = param
    reader = _Nodes(program)
    for i, n in enumerate(_bounded(top["nodes"], "nodes", MAX_NODES)):
        _at(f"nodes[{i}]", reader.add, n)
    for i, s in enumerate(_bounded(top["states"], "states", MAX_NODES)):
        state = _at(f"states[{i}]", _state, s)
        if state.name in program.states:
            raise ModelError(
                f"expected names that differ, found {state.name!r} twice", where=f"states[{i}]"
            )
        program.states[state.name] = state
    seen: set[str] = set()
    known = set(reader.nodes)
    for i, s in enumerate(_bounded(top["segments"], "segments", MAX_NODES)):
        segment = _at(f"segments[{i}]", _segment, s, known)
        if segment.name in seen:
            raise ModelError(
                f"expected names that differ, found {segment.name!r} twice", where=f"segments[{i}]"
            )
        seen.add(segment.name)
        program.segments.append(segment)
    if "exits" in top:
        program.exits = _at("exits", exits.from_json, top["exits"])
    if "caches" in top:
        program.caches = _at("caches", caches.all_from_json, top["caches"])
    return program


def _at(where: str, f: Callable[..., Any], *args: Any) -> Any:
    try:
        return f(*args)
    except ModelError as e:
        inner = f"{where}.{e.where}" if e.where else where
        raise ModelError(e.message, where=inner, hint=e.hint) from None


def _fields(
    data: Any, what: str, kinds: dict[str, Any], optional: Sequence[str] = ()
) -> dict[str, Any]:
    """A JSON object with exactly these fields of these kinds."""
    if not isinstance(data, dict):
        raise ModelError(f"expected {what} as an object, found {type(data).__name__}")
    extra, missing = sorted(set(data) - set(kinds)), sorted(set(kinds) - set(data) - set(optional))
    if extra or missing:
        raise ModelError(
            f"expected {what} with fields {sorted(kinds)}, found extra {extra}, missing {missing}"
        )
    for name, value in data.items():
        if type(value) is not kinds[name]:
            raise ModelError(
                f"expected {kinds[name].__name__}, found {type(value).__name__}", where=name
            )
    return data


def _bounded(values: list[Any], where: str, limit: int = MAX_LIST) -> list[Any]:
    if len(values) > limit:
        raise ModelError(f"expected at most {limit} entries, found {len(values)}", where=where)
    return values


def _param(data: Any) -> Param:
    f = _fields(
        data,
        "a parameter",
        {"name": str, "shape": list, "dtype": str, "trained": bool, "keep": bool},
    )
    shape = tuple(_bounded(f["shape"], "shape", MAX_RANK))
    if not all(type(d) is int and 0 <= d < 1 << 48 for d in shape):
        raise ModelError(f"expected sizes in [0, 2**48), found {list(shape)}", where="shape")
    dtype = _at("dtype", parse_dtype, f["dtype"])
    name = _at("name", check_text, f["name"], "a name")
    return Param(name, shape, dtype, (), f["trained"], f["keep"])


def _state(data: Any) -> State:
    f = _fields(data, "a state", {"name": str, "kind": str, "types": list})
    types = [_at("types", parse_type, t) for t in _bounded(f["types"], "types", MAX_RANK)]
    if not all(isinstance(t, TensorType) for t in types):
        raise ModelError(f"expected tensor types, found {f['types']}", where="types")
    return State(check_text(f["name"], "a name"), check_text(f["kind"], "a kind"), tuple(types))


def _segment(data: Any, known: set[str]) -> Segment:
    f = _fields(data, "a segment", {"name": str, "nodes": list, "live_in": list, "live_out": list})
    lists = []
    for field in ("nodes", "live_in", "live_out"):
        names = _bounded(f[field], field, MAX_NODES)
        unknown = [n for n in names if not isinstance(n, str) or n not in known]
        if unknown:
            raise ModelError(f"expected names of nodes, found {unknown[0]!r}", where=field)
        lists.append(tuple(names))
    return Segment(check_text(f["name"], "a name"), *lists)


def _float(text: str) -> float:
    try:
        found = float.fromhex(text)
    except (ValueError, OverflowError):
        raise ModelError(f"expected a float in hex, found {text!r}") from None
    if found.hex() != text:
        raise ModelError(f"expected the one spelling {found.hex()!r} of a float, found {text!r}")
    return found


class _Nodes:
    """Reads nodes in order; a reference to a node that is not there yet is refused."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.builder = Builder(program)
        self.nodes: dict[str, fx.Node] = {}
        self.attrs: set[str] = set()

    def add(self, data: Any) -> None:
        f = _fields(
            data,
            "a node",
            {
                "name": str, "op": str, "target": str, "args": list, "kwargs": dict, "type": str,
                "made_by": str,
            },
            ("target", "args", "kwargs"),
        )  # fmt: skip
        op, name = f["op"], check_text(f["name"], "a name")
        if op not in _OPS:
            raise ModelError(f"expected one of {_OPS}, found {op[:40]!r}", where="op")
        needs = {
            "placeholder": set(), "get_attr": {"target"}, "output": {"args", "kwargs"},
            "call_function": {"target", "args", "kwargs"},
        }[op]  # fmt: skip
        if needs != {"target", "args", "kwargs"} & set(f):
            raise ModelError(f"expected fields {sorted(needs)} for {op}, found {sorted(f)}")
        if self.nodes and next(reversed(self.nodes.values())).op == "output":
            raise ModelError("expected the output last, found more nodes")
        args = tuple(_at("args", self.decode, a) for a in _bounded(f.get("args", []), "args"))
        kwargs = {
            check_text(k, "an argument name"): _at("kwargs", self.decode, v)
            for k, v in f.get("kwargs", {}).items()
        }
        node = self.builder.add(op, self.target(f), name, args, kwargs)
        found: ValueType = _at("type", parse_type, f["type"])
        node.meta["llmc"] = Info(found, made_by=check_text(f["made_by"], "a maker"))
        self.nodes[name] = node

    def target(self, f: dict[str, Any]) -> Any:
        if f["op"] == "call_function":
            return _at("target", row, f["target"]).target
        if f["op"] != "get_attr":
            return f["name"] if f["op"] == "placeholder" else "output"
        name = f["target"]
        if name not in self.program.params:
            raise ModelError(
                f"expected a parameter of the table, found {name[:80]!r}", where="target"
            )
        if name in self.attrs:
            raise ModelError(
                f"expected one node per parameter, found two of {name!r}", where="target"
            )
        self.attrs.add(name)
        return name

    def decode(self, value: Any, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise ModelError(f"expected at most {MAX_DEPTH} levels, found more")
        if value is None or isinstance(value, (bool, int)):
            return check_number(value)
        if isinstance(value, str):
            return check_text(value, "a text")
        if isinstance(value, list):
            return [self.decode(v, depth + 1) for v in _bounded(value, "list")]
        if not isinstance(value, dict) or len(value) != 1:
            raise ModelError(f"expected an encoded value, found {type(value).__name__}")
        kind, inner = next(iter(value.items()))
        match kind, inner:
            case "node", str():
                if inner not in self.nodes:
                    raise ModelError(f"expected an earlier node, found {inner[:80]!r}")
                return self.nodes[inner]
            case "float", str() if len(inner) <= 40:
                return _float(inner)
            case "tuple", list():
                return tuple(self.decode(v, depth + 1) for v in _bounded(inner, "tuple"))
            case "dict", dict() if len(inner) <= MAX_LIST:
                return {check_text(k, "a key"): self.decode(v, depth + 1) for k, v in inner.items()}
            case "torch", str() if inner in NAMED:
                return NAMED[inner]
        raise ModelError(f"expected an encoded value, found {kind[:40]!r}")


def same_program(a: Program, b: Program) -> bool:
    """Whether two programs are the same but for provenance and tensors."""
    return to_json(a) == to_json(b)


__all__ = ["FORMAT", "VERSION", "attach", "from_json", "provenance", "same_program", "to_json"]
