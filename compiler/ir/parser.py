"""Reading the text of :mod:`.printer` back: by ``ast``, node by node, without ever running it.

Only what the printer writes is accepted: the header's literals and one function of known calls.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from . import exits
from .build import Builder, result_type
from .errors import ModelError
from .graph import DictWeights, Info, Param, Program, State
from .literals import (
    MAX_DEPTH,
    MAX_LIST,
    MAX_NODES,
    NAMED,
    check_facts,
    check_number,
    check_text,
    parse_dtype,
    parse_type,
)  # fmt: skip
from .ops import ROWS
from .ops.base import OpRow, infer
from .printer import SEGMENT, spelling
from .segments import make_segments
from .types import TensorType, ValueType

_MAX_CHARS = 1 << 26
_TABLES = ("DTYPE", "FACTS", "INPUTS", "STATES", "PARAMS")
_HEADER = (*_TABLES, "EXITS")
_IMPORTS = ("import operator", "import torch", "from llmc.compiler.ir.ops import ROWS")


def parse_python(text: str, program_like: Program | None = None) -> Program:
    """The program that the printer wrote.

    Args:
        text: output of :func:`.printer.print_python`.
        program_like: where the tensors come from; without it the program has no weights.
    Raises:
        ModelError: anything that the printer does not write; ``where`` has line and column.
    """
    if len(text) > _MAX_CHARS:
        raise ModelError(f"expected at most {_MAX_CHARS} characters, found {len(text)}")
    try:
        tree = ast.parse(text)
        comments = dict(_comments(text))
    except SyntaxError as e:
        raise ModelError(f"expected Python, found {e.msg}", where=_place(e)) from None
    except (tokenize.TokenError, ValueError, RecursionError, MemoryError) as e:
        raise ModelError(f"expected Python, found {e}") from None
    weights = program_like.weights if program_like is not None else DictWeights()
    return _Reader(comments).module(tree, Program(fx.Graph(), {}, weights))


def _comments(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _place(at: ast.stmt | ast.expr | SyntaxError) -> str:
    column = (at.offset or 1) if isinstance(at, SyntaxError) else at.col_offset + 1
    return f"line {at.lineno} column {column}"


@contextmanager
def _located(at: ast.stmt | ast.expr) -> Iterator[None]:
    """Errors from within get the line and column of ``at``, unless they have one."""
    try:
        yield
    except ModelError as e:
        if e.where is not None and e.where.startswith("line "):
            raise
        raise ModelError(e.message, where=_place(at), hint=e.hint) from None


class _Reader:
    def __init__(self, comments: dict[int, str]) -> None:
        self.comments = comments
        self.calls = {spelling(r): r for r in ROWS.values()}
        self.env: dict[str, fx.Node] = {}

    # ** file **

    def module(self, tree: ast.Module, program: Program) -> Program:
        self.program = program
        self.builder = Builder(program)
        header: dict[str, ast.expr] = {}
        functions: list[ast.FunctionDef] = []
        for item in tree.body:
            with _located(item):
                match item:
                    case ast.Import() | ast.ImportFrom() if ast.unparse(item) in _IMPORTS:
                        continue
                    case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in _HEADER:
                        if name in header:
                            raise ModelError(f"expected one {name}, found two")
                        header[name] = value
                    case ast.FunctionDef(name="forward") if not functions:
                        functions.append(item)
                    case _:
                        raise ModelError(f"expected what llmc prints, found {type(item).__name__}")
        missing = [name for name in _TABLES if name not in header]
        if missing or not functions:
            raise ModelError(f"expected {[*_TABLES, 'forward']}, found none of {missing}")
        self.header(header)
        self.function(functions[0], header["INPUTS"])
        return program

    def header(self, header: dict[str, ast.expr]) -> None:
        with _located(header["DTYPE"]):
            self.program.dtype = parse_dtype(self.literal(header["DTYPE"]))
        with _located(header["FACTS"]):
            facts = check_facts(self.literal(header["FACTS"]))
            if not isinstance(facts, dict):
                raise ModelError(f"expected a table of facts, found {facts!r}")
            self.program.facts = facts
        if "EXITS" in header:
            with _located(header["EXITS"]):
                self.program.exits = exits.from_json(self.literal(header["EXITS"]))
        for name, row, at in self.rows(header["STATES"]):
            with _located(at):
                kind, *types = self.texts(row)
                found = tuple(self.tensor(t) for t in types)
                self.program.states[name] = State(name, kind, found)
        for name, row, at in self.rows(header["PARAMS"]):
            with _located(at):
                self.program.params[name] = self.param(name, self.texts(row))

    def rows(self, table: ast.expr) -> Iterator[tuple[str, Any, ast.expr]]:
        with _located(table):
            if not isinstance(table, ast.Dict):
                raise ModelError("expected a table, found another value")
            seen: set[str] = set()
            for key, value in zip(table.keys, table.values, strict=True):
                name = check_text(self.literal(key), "a name") if key is not None else ""
                if key is None or name in seen:
                    raise ModelError(f"expected names that differ, found {name!r} twice")
                seen.add(name)
                yield name, self.literal(value), value

    def texts(self, row: Any) -> list[str]:
        if not isinstance(row, tuple) or not row or not all(isinstance(t, str) for t in row):
            raise ModelError(f"expected a row of texts, found {row!r}")
        return [check_text(t, "a text") for t in row]

    def tensor(self, text: str) -> TensorType:
        found = parse_type(text)
        if not isinstance(found, TensorType):
            raise ModelError(f"expected a tensor type, found {text!r}")
        return found

    def param(self, name: str, row: list[str]) -> Param:
        if len(row) < 2:
            raise ModelError(f"expected a type and flags, found {row}")
        stored, flags, *names = row
        found = self.tensor(stored)
        shape = tuple(d for d in found.shape if isinstance(d, int))
        words = flags.split(" ")
        if len(shape) != found.rank or words[0] not in ("trained", "buffer") or words[1:] not in (
            [], ["keep"],
        ):  # fmt: skip
            raise ModelError(f"expected a stored type and flags, found {stored!r} and {flags!r}")
        keep = len(words) == 2
        return Param(name, shape, found.dtype, tuple(names), words[0] == "trained", keep)

    # ** function **

    def function(self, f: ast.FunctionDef, inputs: ast.expr) -> None:
        types: dict[str, ValueType] = {}
        for name, text, at in self.rows(inputs):
            with _located(at):
                types[name] = parse_type(text)
        with _located(f):
            names = [a.arg for a in f.args.args]
            plain = ast.unparse(f.args) == ", ".join(names) and not f.decorator_list
            if not plain or names[1:] not in ([*types], [*types, "states"]):
                raise ModelError(
                    f"expected forward(p, {', '.join(types)}), found {ast.unparse(f.args)}"
                )
            if len(f.body) > MAX_NODES:
                raise ModelError(f"expected at most {MAX_NODES} nodes, found {len(f.body)}")
            self.table = names[0]
            for name, t in types.items():
                self.env[name] = self.builder.add("placeholder", name, name)
                self.env[name].meta["llmc"] = Info(t, source="input")
        for statement in f.body:
            with _located(statement):
                self.statement(statement)
        with _located(f):
            if not f.body or not isinstance(f.body[-1], ast.Return):
                raise ModelError("expected a return at the end, found none")
            self.segments(f)

    def statement(self, s: ast.stmt) -> None:
        last = next(iter(reversed(self.program.graph.nodes)), None)
        if last is not None and last.op == "output":
            raise ModelError("expected nothing after the return")
        match s:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript() as value):
                self.env[name] = self.get_attr(name, value)
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as value):
                self.env[name] = self.call(name, value)
            case ast.Return(value=value) if value is not None:
                result = self.literal(value)
                node = self.builder.add("output", "output", "output", (result,))
                node.meta["llmc"] = Info(result_type(result))
            case _:
                raise ModelError(f"expected one call or parameter, found {ast.unparse(s)[:60]}")
        if isinstance(s, ast.Assign):
            self.provenance(self.env[name], s)

    def get_attr(self, name: str, value: ast.Subscript) -> fx.Node:
        key = self.literal(value.slice)
        known = isinstance(value.value, ast.Name) and value.value.id == self.table
        if not known or key not in self.program.params:
            raise ModelError(f"expected a parameter of the table, found {ast.unparse(value)}")
        node = self.builder.add("get_attr", key, name)
        node.meta["llmc"] = Info(self.program.param_type(self.program.params[key]))
        return node

    def call(self, name: str, call: ast.Call) -> fx.Node:
        spelled = ast.unparse(call.func).replace("'", '"')
        row = self.calls.get(spelled)
        if row is None:
            raise ModelError(f"expected an op that llmc knows, found {spelled[:80]}")
        args = tuple(self.literal(a) for a in call.args)
        kwargs: dict[str, Any] = {}
        for k in call.keywords:
            if k.arg is None or k.arg in kwargs:
                raise ModelError("expected keyword arguments that differ")
            stateful = row.stateful and k.arg == "state"
            kwargs[k.arg] = self.state(k.value) if stateful else self.literal(k.value)
        return self.typed(row, self.builder.add("call_function", row.target, name, args, kwargs))

    def typed(self, row: OpRow, node: fx.Node) -> fx.Node:
        node.meta["llmc"] = Info(infer(node))
        return node

    def state(self, value: ast.expr) -> str:
        match value:
            case ast.Subscript(
                value=ast.Name(id="states"), slice=ast.Constant(value=str() as name)
            ):
                return name
        raise ModelError(f"expected a state, found {ast.unparse(value)[:60]}")

    def provenance(self, node: fx.Node, s: ast.stmt) -> None:
        """Maker, path and source from the comment; its type is never believed."""
        comment = self.comments.get(s.end_lineno or s.lineno, "")
        fields = [f.strip() for f in comment.removeprefix("#").split(" | ")]
        made_by, path, source = [*fields[1:4], "", "", ""][:3]
        old: Info = node.meta["llmc"]
        node.meta["llmc"] = replace(old, made_by=made_by, path=path, source=source)

    def segments(self, f: ast.FunctionDef) -> None:
        """Cut the graph at the comments that name segments."""
        lines = sorted(n for n, c in self.comments.items() if c.startswith(SEGMENT))
        if not lines:
            return
        starts = [(n, self.comments[n].removeprefix(SEGMENT)) for n in lines]
        # Inputs have no statement of their own: they lie in the segment that starts the graph.
        nodes = list(self.program.graph.nodes)
        first = len(nodes) - len(f.body)
        cuts: list[tuple[str, int]] = []
        for line, name in starts:
            at = next((i for i, s in enumerate(f.body) if s.lineno > line), len(f.body))
            cuts.append((name, 0 if not cuts else first + at))
        self.program.segments = make_segments(self.program.graph, cuts)

    # ** values **

    def literal(self, value: ast.expr, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise ModelError(f"expected at most {MAX_DEPTH} levels, found more")
        with _located(value):
            match value:
                case ast.Constant(value=None | bool() | int() | float() as v):
                    return check_number(v)
                case ast.Constant(value=str() as v):
                    return check_text(v, "a text", limit=1 << 20)
                case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as n)):
                    return check_number(-n)
                case ast.List(elts=parts) | ast.Tuple(elts=parts) if len(parts) <= MAX_LIST:
                    many = [self.literal(p, depth + 1) for p in parts]
                    return many if isinstance(value, ast.List) else tuple(many)
                case ast.Dict(keys=keys, values=values) if len(keys) <= MAX_LIST:
                    found = {}
                    for k, inner in zip(keys, values, strict=True):
                        if not isinstance(k, ast.Constant) or not isinstance(k.value, str):
                            raise ModelError("expected text keys")
                        found[k.value] = self.literal(inner, depth + 1)
                    return found
                case ast.Name(id=name) if name in self.env:
                    return self.env[name]
                case ast.Attribute(value=ast.Name(id="torch")) if ast.unparse(value) in NAMED:
                    return NAMED[ast.unparse(value)]
                case ast.Call(
                    func=ast.Name(id="float"), args=[ast.Constant(value=v)], keywords=[]
                ) if v in ("inf", "-inf", "nan"):
                    return float(v)
                case ast.Call(
                    args=[ast.Constant(value="cpu" | "cuda" | "meta" as v)], keywords=[]
                ) if ast.unparse(value.func) == "torch.device":
                    return torch.device(v)
            raise ModelError(
                f"expected a literal or an earlier value, found {ast.unparse(value)[:60]}"
            )
