"""The laws of the IR, each a rule that recomputes what it checks and believes no record.

``verify`` runs after every pass. It reads no tensor; ``verify_tensors`` does, for what was packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import sympy
import torch
from torch import fx

from .build import result_type
from .caches import caches_law
from .dims import PAST, Dim, same
from .errors import ModelError, VerifierError
from .exits import check_exits
from .graph import DictWeights, Info, Program, info
from .ops import row_for, row_of
from .ops.base import infer
from .segments import segment_of
from .tensors import TENSOR_RULES
from .types import SymType, TensorType, ValueType, same_type, show_type

_KINDS = ("placeholder", "get_attr", "call_function", "output")
_COMPUTE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _fail(rule: str, message: str, node: fx.Node | None = None) -> NoReturn:
    raise VerifierError(rule, message, node=node.name if node is not None else None)


# ** the graph itself **


def _lint(program: Program) -> None:
    """Values are defined once, before use, by nodes of the four kinds of this graph."""
    seen: set[fx.Node] = set()
    names: set[str] = set()
    for node in program.graph.nodes:
        if node.op not in _KINDS:
            _fail("lint", f"expected a node of {_KINDS}, found {node.op}", node)
        if node.name in names:
            _fail("lint", "expected names that differ, found one twice", node)
        for used in node.all_input_nodes:
            if used not in seen:
                _fail(
                    "lint", f"expected {used.name} before its use, found it after or nowhere", node
                )
        if node.op in ("placeholder", "get_attr") and (node.args or node.kwargs):
            _fail("lint", f"expected no arguments of a {node.op}", node)
        seen.add(node)
        names.add(node.name)


def _users(program: Program) -> None:
    """The users that a node lists are exactly the nodes that read it."""
    readers: dict[fx.Node, set[fx.Node]] = {n: set() for n in program.graph.nodes}
    for node in program.graph.nodes:
        found: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), found.append)
        for used in found:
            readers[used].add(node)
    for node, want in readers.items():
        stale, missing = set(node.users) - want, want - set(node.users)
        if stale:
            _fail("users", f"expected users that read it, found stale {min(map(str, stale))}", node)
        if missing:
            _fail(
                "users",
                f"expected {min(map(str, missing))} among the users, found it missing",
                node,
            )


def _record(program: Program) -> None:
    """Every node carries its record."""
    for node in program.graph.nodes:
        if not isinstance(node.meta.get("llmc"), Info):
            _fail("record", "expected a record of type and maker, found none", node)
        value = info(node).type
        if value is None and node.op != "output":
            _fail("record", "expected a type, found none", node)


def _rows(program: Program) -> None:
    """Every call has an op row."""
    for node in program.graph.nodes:
        if node.op == "call_function" and row_for(node.target) is None:
            _fail("row", f"expected an op with a row, found {node.target}", node)


def _output(program: Program) -> None:
    """One output, the last node, made of values."""
    outputs = [n for n in program.graph.nodes if n.op == "output"]
    if len(outputs) != 1 or next(iter(reversed(program.graph.nodes))) is not outputs[0]:
        _fail("output", f"expected one output at the end, found {len(outputs)}")
    node = outputs[0]
    if len(node.args) != 1 or node.kwargs:
        _fail("output", f"expected one result, found {len(node.args)}", node)
    try:
        found = result_type(node.args[0])
    except ModelError as e:
        _fail("output", e.message, node)
    if not _same_result(found, info(node).type):
        _fail("output", f"expected {show_type(found)}, found {show_type(info(node).type)}", node)


def _same_result(a: ValueType, b: ValueType) -> bool:
    # A single result may be recorded bare or as a tuple of one.
    if isinstance(a, tuple) and len(a) == 1 and not isinstance(b, tuple):
        return same_type(a[0], b)
    if isinstance(b, tuple) and len(b) == 1 and not isinstance(a, tuple):
        return same_type(a, b[0])
    return same_type(a, b)


# ** parameters **


def _params(program: Program) -> None:
    """Parameters and ``get_attr`` nodes match one to one, in shape and dtype."""
    nodes: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if name in nodes:
            _fail("params", f"expected one node per parameter, found two of {name!r}", node)
        if name not in program.params:
            _fail("params", f"expected a parameter of the table, found {name!r}", node)
        nodes[name] = node
        want = program.param_type(program.params[name])
        if not same_type(want, info(node).type):
            _fail("params", f"expected {want}, found {show_type(info(node).type)}", node)
    for name, param in program.params.items():
        if name != param.name:
            _fail("params", f"expected parameter {name!r} under its name, found {param.name!r}")
        if name not in nodes:
            _fail("params", f"expected a node for parameter {name!r}, found none")
        if not all(type(d) is int and d >= 0 for d in param.shape):
            _fail("params", f"expected a stored shape of ints, found {param.shape}", nodes[name])


def _ties(program: Program) -> None:
    """One storage is one parameter: ties are shared nodes, never two names of one tensor."""
    if isinstance(program.weights, DictWeights):
        owners: dict[tuple[object, ...], str] = {}
        for name in program.params:
            t = program.weights.tensors.get(name)
            if t is None or not t.numel() or t.device.type == "meta":
                continue
            key = (t.data_ptr(), tuple(t.shape), tuple(t.stride()), t.dtype)
            other = owners.setdefault(key, name)
            if other != name:
                _fail("tie", f"expected one parameter per storage, found {other!r} and {name!r}")
    known: dict[tuple[object, ...], str] = {}
    for param in program.params.values():
        for source in param.names:
            # Parts of one weight (codes, scales) share its name but neither shape nor dtype.
            other = known.setdefault((source, param.shape, param.dtype), param.name)
            if other != param.name:
                _fail(
                    "tie",
                    f"expected {source!r} to be one parameter, found {other!r} and {param.name!r}",
                )


# ** types **


def _types(program: Program) -> None:
    """Each recorded type is the one that the op's shape rule gives."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            found = infer(node)
        except ModelError as e:
            _fail("type", e.message, node)
        if not same_type(found, info(node).type):
            _fail("type", f"expected {show_type(found)}, found {show_type(info(node).type)}", node)


def _dtypes(program: Program) -> None:
    """The program computes in a floating dtype; integers among the parameters are never cast."""
    if program.dtype not in _COMPUTE:
        _fail("dtype", f"expected a floating dtype to compute in, found {program.dtype}")
    for node in program.inputs:
        t = info(node).type
        if not isinstance(t, (TensorType, SymType)):
            _fail("dtype", f"expected a tensor or a size as input, found {show_type(t)}", node)


def _free(value: ValueType) -> set[sympy.Symbol]:
    if isinstance(value, tuple):
        return set().union(*(_free(v) for v in value))
    dims: tuple[Dim, ...] = ()
    if isinstance(value, TensorType):
        dims = value.shape
    elif isinstance(value, SymType):
        dims = (value.expr,)
    return set().union(*(d.free_symbols for d in dims if not isinstance(d, int)))


def _symbols(program: Program) -> None:
    """Every symbol is the size of an axis of an input; nothing depends on data."""
    known: set[sympy.Symbol] = set()
    for node in program.inputs:
        t = info(node).type
        dims = t.shape if isinstance(t, TensorType) else (t.expr,) if isinstance(t, SymType) else ()
        known |= {d for d in dims if isinstance(d, sympy.Symbol)}
    for node in program.graph.nodes:
        unknown = _free(info(node).type) - known
        if unknown:
            _fail(
                "symbols", f"expected symbols of the inputs, found {min(map(str, unknown))}", node
            )


# ** segments and state **


def _segments(program: Program) -> None:
    """Segments are runs that cover the graph once; what flows in and out is recomputed."""
    if not program.segments:
        return
    order = list(program.graph.nodes)
    names = [s.name for s in program.segments]
    if len(set(names)) != len(names):
        _fail("segments", f"expected names that differ, found {sorted(names)}")
    covered = [n for s in program.segments for n in s.nodes]
    if covered != [n.name for n in order]:
        lost = {n.name for n in order} ^ set(covered)
        detail = f"{min(lost)!r} lost or unknown" if lost else "another order or a node twice"
        _fail("segments", f"expected every node once in graph order, found {detail}")
    at, rank = 0, {n: i for i, n in enumerate(order)}
    for s in program.segments:
        want = segment_of(s.name, order[at : at + len(s.nodes)], rank)
        at += len(s.nodes)
        for what in ("live_in", "live_out"):
            have, need = set(getattr(s, what)), set(getattr(want, what))
            if have != need:
                odd = min(have ^ need)
                _fail(
                    "segments", f"expected {what} of {s.name!r} recomputed, found {odd!r} to differ"
                )


def _states(program: Program) -> None:
    """Each state belongs to one stateful node and has that node's key and value types."""
    owners: dict[str, fx.Node] = {}
    for node in program.calls():
        if not row_of(node).stateful:
            continue
        name = node.kwargs.get("state")
        if not isinstance(name, str) or name not in program.states:
            _fail("states", f"expected a declared state, found {name!r}", node)
        if name in owners:
            _fail("states", f"expected one node per state, found {owners[name]} too", node)
        owners[name] = node
        want = tuple(info(v).type for v in node.args[1:3] if isinstance(v, fx.Node))
        have = program.states[name].types
        if len(want) != 2 or len(have) != 2 or not all(map(_kept, want, have)):
            shown = ", ".join(map(str, have))
            _fail("states", f"expected types of k and v with P tokens, found {shown}", node)
    for name, state in program.states.items():
        if name != state.name or name not in owners:
            _fail("states", f"expected a node for state {name!r}, found none")


def _kept(value: ValueType, stored: TensorType) -> bool:
    if not isinstance(value, TensorType) or value.rank != 4 or stored.rank != 4:
        return False
    if not same(stored.shape[2], PAST):
        return False
    return all(same(value.shape[a], stored.shape[a]) for a in (0, 1, 3))


def _exits(program: Program) -> None:
    """Exits lie after segments that exist, in their order."""
    try:
        check_exits(program)
    except ModelError as e:
        _fail("exits", e.message)


RULES: list[tuple[str, Callable[[Program], None]]] = [
    ("lint", _lint),
    ("users", _users),
    ("record", _record),
    ("row", _rows),
    ("output", _output),
    ("params", _params),
    ("tie", _ties),
    ("dtype", _dtypes),
    ("type", _types),
    ("symbols", _symbols),
    ("segments", _segments),
    ("states", _states),
    ("exits", _exits),
    ("caches", caches_law),
]
"""The laws, in an order in which each may build on those before it."""


def verify(program: Program) -> None:
    """Check every law of :data:`RULES`.

    Raises:
        VerifierError: the first broken law, with its name and the culprit node.
    """
    for _, rule in RULES:
        rule(program)


def verify_tensors(program: Program) -> None:
    """Load what compressed ops read and check it: sizes, code ranges, mask counts, finite scales.

    Raises:
        VerifierError: the first broken law of :data:`.tensors.TENSOR_RULES`.
    """
    for _, rule in TENSOR_RULES:
        rule(program)


def verify_interface(before: Program, after: Program) -> None:
    """A rewrite keeps the inputs and every batch or sequence expression of the result.

    A literal size of the result (a vocabulary) may change; an expression of symbols may not.
    Raises:
        VerifierError: rule ``interface``.
    """
    old, new = before.inputs, after.inputs
    if [n.name for n in old] != [n.name for n in new]:
        names = [n.name for n in old]
        _fail("interface", f"expected inputs {names}, found {[n.name for n in new]}")
    for a, b in zip(old, new, strict=True):
        if not same_type(info(a).type, info(b).type):
            shown = show_type(info(a).type)
            _fail("interface", f"expected {shown}, found {show_type(info(b).type)}", b)
    want, have = info(before.output).type, info(after.output).type
    if not _same_interface(want, have):
        found = f"expected a result {show_type(want)}, found {show_type(have)}"
        _fail("interface", found, after.output)


def _same_interface(a: ValueType, b: ValueType) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same_interface, a, b))
    if isinstance(a, TensorType) and isinstance(b, TensorType):
        if a.dtype != b.dtype or a.rank != b.rank:
            return False
        pairs = zip(a.shape, b.shape, strict=True)
        return all((isinstance(x, int) and isinstance(y, int)) or same(x, y) for x, y in pairs)
    return same_type(a, b)
