"""From a traced aten graph to a program: known ops, one node per stored tensor, checked types."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from ..ir.dims import Dim, dim, symbol
from ..ir.errors import CaptureError, ModelError
from ..ir.graph import Info, Param, Program
from ..ir.ops import row_for
from ..ir.ops.base import infer
from ..ir.types import SymType, TensorType, ValueType, same_type, show_type
from .provenance import module_path, source_line
from .sources import Leaf, LeafWeights

aten = torch.ops.aten

# Asserts and hints of the tracer: they compute nothing.
_DROPPED = {
    "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range",
    "sym_constrain_range_for_size",
}  # fmt: skip
# Same value in an inference graph without aliasing.
_SAME = {
    "alias",
    "detach",
    "detach_",
    "clone",
    "contiguous",
    "lift_fresh_copy",
    "lift_fresh",
    "lift",
}
_CASTS = {"_to_copy", "to", "type_as"}
_RESHAPES = {"view", "_unsafe_view", "reshape"}
_PLACEMENT = ("device", "layout", "pin_memory", "memory_format", "non_blocking", "copy")


@dataclass
class Traced:
    """What a tracer hands over.

    Attributes:
        graph: aten calls with fake values in ``meta["val"]``.
        leaves: stored tensors by placeholder or ``get_attr`` node name.
        inputs: public input names by placeholder name.
        symbols: public symbol names by the tracer's symbols.
        prefix: leading module path to drop from provenance.
    """

    graph: fx.Graph
    leaves: dict[str, Leaf]
    inputs: dict[str, str]
    symbols: dict[sympy.Symbol, str] = field(default_factory=dict)
    prefix: str = ""


def symbols_of(graph: fx.Graph, axes: Mapping[str, tuple[str | None, ...]]) -> dict[Any, str]:
    """Public symbol names by the tracer's symbols, read off the placeholders' fake shapes."""
    out: dict[Any, str] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in axes:
            for size, name in zip(node.meta["val"].shape, axes[node.name], strict=True):
                if name is not None and isinstance(size, torch.SymInt):
                    out[size.node.expr] = name
    return out


def import_graph(
    traced: Traced, facts: dict[str, Any] | None = None, compute: torch.dtype = torch.float32
) -> Program:
    """A program with the traced graph's meaning; not normalised yet.

    Args:
        facts: of the new program.
        compute: floating dtype in which the traced graph computes.
    Raises:
        CaptureError: an op without a row, a size that depends on data, or a row whose shape rule
            disagrees with what torch computed.
    """
    return _Importer(traced, facts or {}, compute).run()


class _Importer:
    def __init__(self, traced: Traced, facts: dict[str, Any], compute: torch.dtype) -> None:
        self.traced = traced
        self.weights = LeafWeights()
        self.program = Program(fx.Graph(), {}, self.weights, compute, facts=facts)
        self.graph = self.program.graph
        self.env: dict[fx.Node, Any] = {}
        self.params: dict[int, fx.Node] = {}
        self.sizes: dict[str, fx.Node] = {}
        # Sizes are read right after the inputs, the last of which this is.
        self.head: fx.Node = self.graph._root

    def run(self) -> Program:
        nodes = list(self.traced.graph.nodes)
        for node in nodes:
            if node.op == "placeholder" and node.name in self.traced.inputs:
                self._input(node)
        for node in nodes:
            match node.op:
                case "placeholder" if node in self.env:
                    continue
                case "placeholder" | "get_attr":
                    self._leaf(node)
                case "call_function":
                    self.env[node] = self._call(node)
                case "output":
                    self._output(node)
                case _:
                    raise self._error(node, f"expected calls only, found {node.op}")
        self.program.prune()
        return self.program

    # ** nodes **

    def _input(self, node: fx.Node) -> None:
        value = self._type(node, node.meta["val"])
        new = self.graph.placeholder(self.traced.inputs[node.name])
        new.meta["llmc"] = Info(value, source="input")
        self.env[node] = self.head = new
        if isinstance(value, SymType) and isinstance(value.expr, sympy.Symbol):
            self.sizes.setdefault(value.expr.name, new)

    def _leaf(self, node: fx.Node) -> None:
        if node in self.env:
            return
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            self.env[node] = SymType(self._dim(node, value))
        else:
            # None is an error only where something reads it.
            self.env[node] = self.traced.leaves.get(node.name)

    def _param(self, leaf: Leaf) -> fx.Node:
        found = self.params.get(id(leaf))
        if found is None:
            name = f"p{len(self.params)}"
            param = Param(name, leaf.shape, leaf.dtype, leaf.names, leaf.trained, leaf.keep)
            self.program.params[name] = param
            self.weights.leaves[name] = leaf
            found = self.graph.create_node("get_attr", name, name=name)
            found.meta["llmc"] = Info(self.program.param_type(param))
            self.params[id(leaf)] = found
        return found

    def _output(self, node: fx.Node) -> None:
        values = node.args[0]
        values = list(values) if isinstance(values, (tuple, list)) else [values]
        outs = [self._arg(node, v) for v in values]
        if not outs or not all(isinstance(v, fx.Node) for v in outs):
            raise self._error(node, "expected results that are tensors or sizes")
        result: Any = outs[0] if len(outs) == 1 else tuple(outs)
        out = self.graph.output(result)
        types = tuple(t.meta["llmc"].type for t in outs)
        out.meta["llmc"] = Info(types[0] if len(types) == 1 else types)

    def _call(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
            return SymType(self._dim(node, value))
        if isinstance(value, (torch.SymBool, torch.SymFloat, bool)):
            return None
        target = node.target
        if target is torch._C._set_grad_enabled:
            return None
        if isinstance(target, torch._ops.OpOverload):
            base = target.overloadpacket.__name__
            if base in _DROPPED:
                return None
            same = self._unchanged(node, base)
            if same is not None:
                return same
        elif target is not operator.getitem:
            raise self._error(node, f"expected an op that llmc knows, found {target}")
        return self._emit(node)

    def _unchanged(self, node: fx.Node, base: str) -> Any:
        """The argument that a no-op hands through, else None."""
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        first = node.args[0]
        before, after = first.meta.get("val"), node.meta.get("val")
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
            return None
        if before.dtype != after.dtype or len(before.shape) != len(after.shape):
            return None
        shapes = zip(before.shape, after.shape, strict=True)
        if not all(self._dim(node, a) == self._dim(node, b) for a, b in shapes):
            return None
        noop = (
            base in _SAME
            or base in _CASTS
            or base in _RESHAPES
            or base in ("expand", "slice")
            or (base == "dropout" and not node.args[2])
            or (base == "mul" and node.args[1] in (1, 1.0) and not isinstance(node.args[1], bool))
            or (base in ("add", "sub") and node.args[1] in (0, 0.0))
        )
        return self.env[first] if noop else None

    def _emit(self, node: fx.Node) -> fx.Node:
        target, args, kwargs = self._canonical(node)
        if row_for(target) is None:
            raise self._error(node, f"expected an op that llmc knows, found {target}")
        new = self.graph.call_function(target, args, kwargs)
        path = module_path(node, self.traced.prefix)
        new.meta["llmc"] = Info(None, path, "capture", source_line(node))
        try:
            found = infer(new)
        except ModelError as e:
            raise self._error(node, e.message) from None
        want = self._type(node, node.meta["val"])
        if not same_type(found, want):
            raise self._error(
                node, f"expected {show_type(want)}, as torch computed, found {show_type(found)}"
            )
        new.meta["llmc"] = Info(found, path, "capture", source_line(node))
        return new

    def _canonical(self, node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Target and arguments in the one spelling that passes see."""
        target: Any = node.target
        base = target.overloadpacket.__name__ if hasattr(target, "overloadpacket") else ""
        shape = getattr(node.meta["val"], "shape", ())
        if base == "copy":
            # Functional copy_: the second argument, in the place and dtype of the first.
            source = self._arg(node, node.args[1])
            return aten.expand.default, (source, [self._size(node, s) for s in shape]), {}
        if base in _RESHAPES:
            return (
                aten.reshape.default,
                (self._arg(node, node.args[0]), self._sizes(node, shape)),
                {},
            )
        if base in _CASTS:
            dtype = node.meta["val"].dtype
            return aten.to.dtype, (self._arg(node, node.args[0]), dtype), {}
        if base == "expand":
            before = node.args[0].meta["val"].shape  # type: ignore[union-attr]
            lead = len(shape) - len(before)
            old = [None] * lead + [self._dim(node, d) for d in before]
            new = [self._dim(node, d) for d in shape]
            sizes = [-1 if o == n else self._size(node, n) for o, n in zip(old, new, strict=True)]
            return target, (self._arg(node, node.args[0]), sizes), {}
        args = tuple(self._arg(node, a) for a in node.args)
        kwargs = {k: self._arg(node, v) for k, v in node.kwargs.items() if k not in _PLACEMENT}
        return target, args, kwargs

    # ** values **

    def _arg(self, node: fx.Node, value: Any) -> Any:
        if isinstance(value, fx.Node):
            found = self.env.get(value)
            if isinstance(found, Leaf):
                return self._param(found)
            if isinstance(found, SymType):
                return self._size(node, found.expr)
            if found is None:
                raise self._error(node, f"expected arguments that llmc knows, found {value.name}")
            return found
        if isinstance(value, (list, tuple)):
            return [self._arg(node, v) for v in value]
        if isinstance(value, slice):
            raise self._error(node, "expected no slice argument")
        return value

    def _sizes(self, node: fx.Node, shape: Any) -> list[Any]:
        """Sizes for a reshape: symbols by node, at most one product of symbols as -1."""
        dims = [self._dim(node, s) for s in shape]
        holes = [i for i, d in enumerate(dims) if not isinstance(d, (int, sympy.Symbol))]
        return [
            -1 if holes == [i] else self._size(node, d) for i, d in enumerate(dims)
        ]  # fmt: skip

    def _size(self, node: fx.Node, size: Any) -> Any:
        """A literal, or the node of a symbol."""
        d = size if isinstance(size, (int, sympy.Expr)) else self._dim(node, size)
        if isinstance(d, int):
            return d
        if not isinstance(d, sympy.Symbol):
            raise self._error(node, f"expected a plain size, found {d}")
        found = self.sizes.get(d.name)
        if found is not None:
            return found
        for given in self.graph.nodes:
            if given.op != "placeholder":
                continue
            t = given.meta["llmc"].type
            if isinstance(t, TensorType) and d in t.shape:
                with self.graph.inserting_after(self.head):
                    new = self.graph.call_function(aten.sym_size.int, (given, t.shape.index(d)))
                self.head = new
                new.meta["llmc"] = Info(SymType(d))
                self.sizes[d.name] = new
                return new
        raise self._error(node, f"expected the size {d} among the inputs, found none")

    def _dim(self, node: fx.Node, size: Any) -> Dim:
        if isinstance(size, int):
            return size
        expr = size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)
        return self._expr(node, expr)

    def _expr(self, node: fx.Node, expr: sympy.Expr) -> Dim:
        from torch.utils._sympy.functions import CleanDiv, FloorDiv

        known = {s: symbol(n) for s, n in self.traced.symbols.items()}
        free = expr.free_symbols - set(known)
        if free - set(known.values()):
            raise self._error(node, f"expected sizes known from the inputs, found {expr}")
        expr = expr.xreplace(known)
        for kind in (CleanDiv, FloorDiv):
            expr = expr.replace(kind, lambda a, b: sympy.floor(a / b))
        return dim(expr)

    def _type(self, node: fx.Node, value: Any) -> ValueType:
        if isinstance(value, torch.Tensor):
            shape = tuple(self._dim(node, s) for s in value.shape)
            return TensorType(shape, value.dtype)
        if isinstance(value, (torch.SymInt, int)):
            return SymType(self._dim(node, value))
        if isinstance(value, (tuple, list)):
            return tuple(self._type(node, v) for v in value)
        if value is None:
            return None
        raise self._error(node, f"expected a tensor, found {type(value).__name__}")

    def _error(self, node: fx.Node, message: str) -> CaptureError:
        path = module_path(node, self.traced.prefix)
        line = source_line(node)
        place = ", ".join(p for p in (f"node {node.name}", path, line) if p)
        return CaptureError(message, where=place)
