"""Whether two programs compute the same: both are walked from their results, value by value.

Two values are equal where their ops, attributes and arguments are. A parameter of one side stands
for any value of the other that depends on parameters alone, so packed weights compare like dense
ones, and the walk tells which value belongs into which parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..ir.graph import Param, Program, info
from ..ir.interpret import run_nodes
from ..ir.ops import row_of
from ..ir.types import TensorType


@dataclass(frozen=True)
class Difference:
    """One thing in which the programs differ.

    Attributes:
        kind: ``size`` (two ints, or two lengths of a parameter's axis), ``number`` (two floats),
            ``bias`` (ours adds a stored one, the model adds none), ``constant`` (two values that
            are no parameters), ``param`` (a parameter that would have to be two values at once),
            ``op`` (anything else).
        ours, theirs: what each side holds.
        node, path: where, in our program.
        name: of the parameter in the model; axis: of that parameter.
        theirs_node: where, in the other program.
    """

    kind: str
    ours: Any
    theirs: Any
    node: str
    path: str = ""
    name: str = ""
    axis: int = -1
    theirs_node: str = ""


@dataclass
class Match:
    """What the walk found.

    Attributes:
        values: our value by the name of the other program's parameter.
        blank: the other program's parameters that are zero: biases that ours does not add.
    """

    values: dict[str, fx.Node] = field(default_factory=dict)
    blank: set[str] = field(default_factory=set)
    differences: list[Difference] = field(default_factory=list)


def bisimulate(theirs: Program, ours: Program, stored: set[str]) -> Match:
    """Compare ``theirs``, a freshly captured model, with ``ours``, rewritten by passes.

    Args:
        stored: names that the model's checkpoint holds; other constants must agree in value.
    """
    return _Walk(theirs, ours, stored).run()


def constant_values(program: Program) -> set[fx.Node]:
    """Values that depend on parameters alone."""
    out: set[fx.Node] = set()
    for n in program.graph.nodes:
        inputs = n.all_input_nodes
        if n.op == "get_attr" or (
            n.op == "call_function" and inputs and all(i in out for i in inputs)
        ):
            out.add(n)
    return out


def evaluate(program: Program, node: fx.Node) -> torch.Tensor:
    """A value that depends on parameters alone; a parameter itself comes in its stored dtype."""
    if node.op == "get_attr":
        return program.weights.load(str(node.target))
    needed, todo = {node}, [node]
    while todo:
        for used in todo.pop().all_input_nodes:
            if used not in needed:
                needed.add(used)
                todo.append(used)
    order = [n for n in program.graph.nodes if n in needed]
    with torch.no_grad():
        value: torch.Tensor = run_nodes(order, {}, program.fetch, keep=[node])[node]
    return value


def _bound(node: fx.Node) -> dict[str, Any]:
    """Arguments by name where the op has a schema, with its defaults, else by position."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    out: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        given = node.args[i] if i < len(node.args) else argument.default_value
        out[argument.name] = node.kwargs.get(argument.name, given)
    return out


class _Walk:
    def __init__(self, theirs: Program, ours: Program, stored: set[str]) -> None:
        self.theirs, self.ours, self.stored = theirs, ours, stored
        self.constant = constant_values(ours)
        self.found = Match()
        self.seen: set[tuple[fx.Node, fx.Node]] = set()
        self.todo: list[tuple[fx.Node, fx.Node]] = []

    def run(self) -> Match:
        self._same(self.theirs.output.args, self.ours.output.args, self.theirs.output,
                   self.ours.output, "")  # fmt: skip
        while self.todo:
            self._pair(*self.todo.pop())
        return self.found

    def _differ(
        self, kind: str, ours: Any, theirs: Any, o: fx.Node, t: fx.Node, **more: Any
    ) -> None:
        self.found.differences.append(
            Difference(kind, ours, theirs, o.name, info(o).path, theirs_node=t.name, **more)
        )

    def _pair(self, t: fx.Node, o: fx.Node) -> None:
        param = self.theirs.param_of(t)
        if param is not None:
            self._param(param, t, o)
        elif t.op != o.op or t.target != o.target:
            self._differ("op", _say(o), _say(t), o, t)
        elif t.op == "call_function":
            mine = _bound(o)
            for name, value in _bound(t).items():
                self._same(value, mine.get(name), t, o, name)

    def _same(self, theirs: Any, ours: Any, t: fx.Node, o: fx.Node, slot: str) -> None:
        if theirs is None and ours is None:
            return
        if isinstance(theirs, fx.Node) and isinstance(ours, fx.Node):
            if (theirs, ours) not in self.seen:
                self.seen.add((theirs, ours))
                self.todo.append((theirs, ours))
        elif isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)):
            if len(theirs) != len(ours):
                self._differ("op", f"{len(ours)} values", f"{len(theirs)} values", o, t)
            for a, b in zip(theirs, ours, strict=False):
                self._same(a, b, t, o, slot)
        elif _number(theirs) and _number(ours):
            whole = isinstance(theirs, int) and isinstance(ours, int)
            if not (theirs == ours or math.isclose(theirs, ours, rel_tol=1e-9)):
                self._differ("size" if whole else "number", ours, theirs, o, t)
        elif slot == "bias" and (theirs is None or ours is None):
            self._bias(theirs, ours, t, o)
        elif type(theirs) is not type(ours) or theirs != ours:
            self._differ("op", f"{slot} {_text(ours)}", f"{slot} {_text(theirs)}", o, t)

    def _bias(self, theirs: Any, ours: Any, t: fx.Node, o: fx.Node) -> None:
        """One side adds a bias and the other none: theirs may be zero, ours has no place."""
        param = self.theirs.param_of(theirs)
        if param is not None and param.trained:
            self.found.blank.add(param.name)
        elif isinstance(ours, fx.Node) and ours in self.constant:
            weight = self.theirs.param_of(_bound(t).get("weight"))
            name = weight.names[0] if weight is not None else ""
            self._differ("bias", info(ours).type, None, o, t, name=name)
        else:
            self._differ("op", f"bias {_text(ours)}", f"bias {_text(theirs)}", o, t)

    def _param(self, param: Param, t: fx.Node, o: fx.Node) -> None:
        kind = info(o).type
        if o not in self.constant or not isinstance(kind, TensorType):
            self._differ("op", _say(o), f"the parameter {_name(param)}", o, t)
            return
        if kind.rank != len(param.shape) or kind.dtype != self.theirs.param_type(param).dtype:
            self._differ("op", str(kind), str(self.theirs.param_type(param)), o, t,
                         name=_name(param))  # fmt: skip
            return
        if not self.stored.isdisjoint(param.names):
            before = self.found.values.setdefault(param.name, o)
            if before is not o:
                self._differ("param", o.name, before.name, o, t, name=_name(param))
        fits = True
        for axis, (there, here) in enumerate(zip(param.shape, kind.shape, strict=True)):
            if there != here:
                fits = False
                self._differ("size", here, there, o, t, name=_name(param), axis=axis)
        if fits and self.stored.isdisjoint(param.names):
            there_value = self.theirs.weights.load(param.name)
            here_value = evaluate(self.ours, o).to(there_value.dtype)
            if not torch.allclose(there_value, here_value, rtol=1e-6, atol=0, equal_nan=True):
                self._differ("constant", here_value, there_value, o, t, name=_name(param))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _name(param: Param) -> str:
    return param.names[0] if param.names else param.name


def _say(node: fx.Node) -> str:
    return row_of(node).name if node.op == "call_function" else f"{node.op} {node.target}"


def _text(value: Any) -> str:
    return value.name if isinstance(value, fx.Node) else str(value)
