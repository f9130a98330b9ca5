"""The row of a fused op: one call that means a few calls of other rows, its body.

    v0 = llmc.rms_norm(a0, a1, eps=1e-05); v1 = llmc.dequantize(a2, a3, bits=4, …); …

Inputs are ``a0``, ``a1`` …; the last statement is the result. A body is read by ``ast`` and never
run: every call must be an op that llmc knows, every argument a literal or an earlier value. Its
meaning, type and cost are composed of those rows, so a kernel for it is judged by nothing else.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..dims import Dim, dim, numel
from ..errors import ModelError
from ..literals import MAX_LIST, NAMED, check_number, check_text, is_named, show_float
from ..types import TensorType, ValueType
from .base import ROWS, OpRow, llmc_op

NAME = "llmc.fused"
MAX_STEPS = 256
_MAX_CHARS = 1 << 16


@dataclass(frozen=True)
class Ref:
    """A value of a body: an input or an earlier step."""

    name: str


@dataclass(frozen=True)
class Step:
    """One call of a body; ``args`` and ``kwargs`` hold literals and :class:`Ref`."""

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def row(self) -> OpRow:
        return ROWS[self.op]


def inputs_of(count: int) -> tuple[str, ...]:
    """The names of so many inputs."""
    return tuple(f"a{i}" for i in range(count))


# ** text **


def write(steps: Sequence[Step]) -> str:
    """The text of a body.

    Raises:
        ModelError: an argument that has no spelling.
    """
    lines = []
    for step in steps:
        given = [*map(_show, step.args), *(f"{k}={_show(v)}" for k, v in step.kwargs.items())]
        lines.append(f"{step.name} = {step.op}({', '.join(given)})")
    return "; ".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, Ref):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_show, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
    if isinstance(value, float):
        return show_float(value)
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    if is_named(value):
        return str(value)
    raise ModelError(f"expected an argument that can be written, found {type(value).__name__}")


@functools.lru_cache(1 << 12)
def read(body: str) -> tuple[Step, ...]:
    """The steps of a body.

    Raises:
        ModelError: anything but assignments of calls of known ops that keep no state.
    """
    if len(body) > _MAX_CHARS:
        raise ModelError(f"expected a body of at most {_MAX_CHARS} characters, found {len(body)}")
    try:
        found = ast.parse(body).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise ModelError(f"expected a body of calls, found {body[:60]!r} ({e})") from None
    if not 1 <= len(found) <= MAX_STEPS:
        raise ModelError(f"expected 1 to {MAX_STEPS} steps in a body, found {len(found)}")
    steps: list[Step] = []
    made: set[str] = set()
    for statement in found:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as call):
                steps.append(_step(name, call, made))
                made.add(name)
            case _:
                raise ModelError(f"expected one call, found {ast.unparse(statement)[:60]!r}")
    return tuple(steps)


def _step(name: str, call: ast.Call, made: set[str]) -> Step:
    op = ast.unparse(call.func)
    row = ROWS.get(op)
    if row is None or row.stateful or op == NAME:
        raise ModelError(f"expected an op that a body may hold, found {op[:60]!r}")
    if name in made or _is_input(name):
        raise ModelError(f"expected a new name in a body, found {name!r} twice")
    kwargs = {}
    for k in call.keywords:
        if k.arg is None or k.arg in kwargs:
            raise ModelError("expected keyword arguments that differ")
        kwargs[k.arg] = _literal(k.value, made)
    return Step(name, op, tuple(_literal(a, made) for a in call.args), kwargs)


def _is_input(name: str) -> bool:
    return name[:1] == "a" and name[1:].isdecimal()


def _literal(value: ast.expr, made: set[str]) -> Any:
    match value:
        case ast.Constant(value=None | bool() | int() | float() as v):
            return check_number(v)
        case ast.Constant(value=str() as v):
            return check_text(v, "a text")
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as n)):
            return check_number(-n)
        case ast.List(elts=parts) | ast.Tuple(elts=parts) if len(parts) <= MAX_LIST:
            many = [_literal(p, made) for p in parts]
            return many if isinstance(value, ast.List) else tuple(many)
        case ast.Name(id=name) if name in made or _is_input(name):
            return Ref(name)
        case ast.Attribute() if ast.unparse(value) in NAMED:
            return NAMED[ast.unparse(value)]
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=v)], keywords=[]) if (
            v in ("inf", "-inf", "nan")
        ):
            return float(v)
    raise ModelError(f"expected a literal or an earlier value, found {ast.unparse(value)[:60]!r}")


# ** meaning **


def evaluate(
    steps: Sequence[Step], inputs: Sequence[Any], call: Callable[[OpRow, Any, Any], Any]
) -> dict[str, Any]:
    """Every value by name; ``call(row, args, kwargs)`` says what a step gives.

    Raises:
        ModelError: a step reads an input that is not there.
    """
    env = dict(zip(inputs_of(len(inputs)), inputs, strict=True))

    def one(value: Any) -> Any:
        if isinstance(value, Ref):
            if value.name not in env:
                raise ModelError(f"expected {len(inputs)} inputs of a body, found {value.name}")
            return env[value.name]
        if isinstance(value, (list, tuple)):
            return type(value)(one(v) for v in value)
        return value

    for step in steps:
        kwargs = {k: one(v) for k, v in step.kwargs.items()}
        env[step.name] = call(step.row, [one(a) for a in step.args], kwargs)
    return env


def values_of(body: str, inputs: Sequence[Any], wanted: Sequence[str]) -> dict[str, Any]:
    """Values of a body by name, inputs among them; only the steps that they need are run.

    inputs: tensors, None where nothing wanted depends on one.
    """
    steps, needed = [], set(wanted)
    for step in reversed(read(body)):
        if step.name in needed:
            needed |= references(step)
            steps.append(step)
    found = evaluate(steps[::-1], inputs, lambda row, args, kw: row.reference(*args, **kw))
    return {name: found[name] for name in wanted}


def references(step: Step) -> set[str]:
    """Names of the values that a step reads."""
    found: set[str] = set()

    def look(value: Any) -> None:
        if isinstance(value, Ref):
            found.add(value.name)
        elif isinstance(value, (list, tuple)):
            for v in value:
                look(v)

    for value in (*step.args, *step.kwargs.values()):
        look(value)
    return found


def recast(body: str, dtype: torch.dtype) -> str:
    """A body whose decoded weights have another dtype."""
    return write([
        replace(s, kwargs={**s.kwargs, "dtype": dtype}) if "dtype" in s.kwargs else s
        for s in read(body)
    ])  # fmt: skip


def fused(inputs: Sequence[torch.Tensor], *, body: str) -> torch.Tensor:
    """The last value of ``body`` over ``inputs``, by the references of its rows.

    Raises:
        ModelError: a text that is no body, or that reads an input that is not there.
    """
    last = read(body)[-1].name
    out: torch.Tensor = values_of(body, inputs, [last])[last]
    return out


def _type(inputs: Sequence[TensorType], *, body: str) -> ValueType:
    steps = read(body)
    found = evaluate(steps, inputs, lambda row, args, kw: row.infer(*args, **kw))
    out: ValueType = found[steps[-1].name]
    return out


def _flops(out: TensorType, inputs: Sequence[TensorType], *, body: str) -> Dim:
    total: Dim = 0

    def call(row: OpRow, args: Any, kwargs: Any) -> Any:
        nonlocal total
        made = row.infer(*args, **kwargs)
        if row.flops is not None:
            total = total + row.flops(made, *args, **kwargs)
        elif isinstance(made, TensorType):
            total = total + numel(made.shape)
        return made

    evaluate(read(body), inputs, call)
    return dim(total)


def _samples() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    g = torch.Generator().manual_seed(0)
    x, gain, w, r = (
        torch.randn(*s, generator=g, dtype=torch.float64) for s in ((2, 6), (6,), (3, 6), (2, 3))
    )
    body = (
        "v0 = llmc.rms_norm(a0, a1, eps=1e-05); v1 = aten.linear.default(v0, a2); "
        "v2 = aten.add.Tensor(a3, v1)"
    )
    return [(([x, gain, w, r],), {"body": body})]


# Its inputs are tied as its rows tie them; nothing cuts a lowered graph, so no dim of it is free.
llmc_op(
    "fused",
    "(Tensor[] inputs, *, str body) -> Tensor",
    _type,
    fused,
    flops=_flops,
    samples=_samples,
)
