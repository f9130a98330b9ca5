"""The program: an fx graph of aten and llmc ops, its parameters, segments and declared state."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx

from .caches import CacheScheme
from .errors import ModelError
from .exits import Exits
from .names import set_names
from .types import TensorType, ValueType


@dataclass(frozen=True)
class Info:
    """What a node carries beside its op: type, module path, maker and source line.

    ``path`` and ``source`` are provenance for people; nothing may decide by them.
    """

    type: ValueType
    path: str = ""
    made_by: str = "capture"
    source: str = ""


@dataclass(frozen=True)
class Param:
    """A stored tensor. ``dtype`` is how it is stored; the graph computes in ``Program.dtype``.

    Attributes:
        name: the target of its one ``get_attr`` node.
        shape: ints, as stored.
        names: every name under which the source model knows this storage (ties have several).
        trained: a parameter (False: a buffer such as rotary frequencies).
        keep: stays in its stored dtype at run time (codes, scales, integer buffers).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    names: tuple[str, ...] = ()
    trained: bool = True
    keep: bool = False

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def source(self) -> str:
        """The captured parameter that this one stores: a part is called ``<source>.<part>``."""
        return self.name.partition(".")[0]


class Weights(Protocol):
    """Where tensors come from; nothing is read before ``load``."""

    def load(self, name: str) -> torch.Tensor:
        """The stored tensor of that parameter (read-only by convention).

        Raises:
            ModelError: unknown name, or the file does not hold what its header says.
        """
        ...


@dataclass
class DictWeights:
    """Weights in memory, optionally on top of another source."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    base: Weights | None = None

    def load(self, name: str) -> torch.Tensor:
        if name in self.tensors:
            return self.tensors[name]
        if self.base is None:
            raise ModelError(f"expected a tensor named {name!r}, found none")
        return self.base.load(name)


@dataclass(frozen=True)
class Segment:
    """A contiguous run of nodes with what flows in and out (node names)."""

    name: str
    nodes: tuple[str, ...]
    live_in: tuple[str, ...]
    live_out: tuple[str, ...]


@dataclass(frozen=True)
class State:
    """Declared, explicit, rewindable state, e.g. one layer's KV cache.

    Shapes hold the symbol ``P`` for the tokens already cached.
    """

    name: str
    kind: str
    types: tuple[TensorType, ...]


def info(node: fx.Node) -> Info:
    """The node's record."""
    out: Info = node.meta["llmc"]
    return out


def tensor_type(node: fx.Node) -> TensorType:
    """The node's type where it is a tensor.

    Raises:
        ModelError: the node is not a tensor.
    """
    t = info(node).type
    if not isinstance(t, TensorType):
        raise ModelError("expected a tensor value", where=f"node {node.name}")
    return t


@dataclass
class Program:
    """A captured or rewritten model.

    Attributes:
        graph: the fx graph; every node has ``meta["llmc"]``, an :class:`Info`.
        params: by name; one ``get_attr`` node per parameter.
        weights: where the parameters' tensors come from (lazy).
        dtype: floating dtype in which the graph computes.
        segments: ordered ranges of the graph; empty until analysed.
        states: declared state by name.
        facts: small JSON-able facts about the model (vocabulary, context length, special tokens).
        exits: where a token may leave early, between segments; None where it may not.
        caches: how keys and values are kept, by attention node, or by state where there are
            states; as they come where an attention has no record.
    """

    graph: fx.Graph
    params: dict[str, Param]
    weights: Weights
    dtype: torch.dtype = torch.float32
    segments: list[Segment] = field(default_factory=list)
    states: dict[str, State] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    exits: Exits | None = None
    caches: dict[str, CacheScheme] = field(default_factory=dict)
    _known: dict[str, fx.Node] = field(default_factory=dict, init=False, repr=False, compare=False)

    # ** looking **

    @property
    def inputs(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        return next(n for n in reversed(self.graph.nodes) if n.op == "output")

    def node(self, name: str) -> fx.Node:
        """The node of that name.

        Raises:
            ModelError: no such node.
        """
        # A node may have been renamed or erased since it was seen, so what is kept is only a hint.
        found = self._known.get(name)
        if found is None or found.name != name or found._erased or found.graph is not self.graph:
            self._known = {n.name: n for n in self.graph.nodes}
            found = self._known.get(name)
        if found is None:
            raise ModelError(f"expected a node named {name!r}, found none")
        return found

    def calls(self, op: str | None = None) -> Iterator[fx.Node]:
        """Call nodes in order, optionally only those of one op row's name."""
        from .ops.base import row_of

        for n in self.graph.nodes:
            if n.op == "call_function" and (op is None or row_of(n).name == op):
                yield n

    def param_node(self, name: str) -> fx.Node:
        """The one ``get_attr`` node of a parameter."""
        for n in self.graph.find_nodes(op="get_attr", target=name):
            return n
        raise ModelError(f"expected parameter {name!r} in the graph, found none")

    def param_of(self, node: object) -> Param | None:
        """The parameter that a ``get_attr`` node reads, else None."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.params[str(node.target)]
        return None

    def stored_bytes(self) -> dict[str, int]:
        """Bytes by parameter of the source, which may be stored in parts (see ``Param.source``)."""
        out: dict[str, int] = {}
        for p in self.params.values():
            out[p.source] = out.get(p.source, 0) + p.bytes
        return out

    def weight_bytes(self) -> int:
        """Bytes of all parameters as stored, and of the classifier of early exits."""
        held = sum(p.bytes for p in self.params.values())
        return held + (self.exits.bytes if self.exits is not None else 0)

    # ** changing **

    def emit(
        self,
        op: str,
        *args: Any,
        before: fx.Node,
        made_by: str,
        like: fx.Node | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Insert a call of op row ``op`` before a node, typed by the row's own shape rule.

        ``like`` gives the module path and source line for provenance.
        Raises:
            ModelError: unknown op, or arguments that the shape rule refuses.
        """
        from .ops.base import infer, row

        target = row(op).target
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        origin = info(like) if like is not None else Info(None)
        node.meta["llmc"] = Info(infer(node), origin.path, made_by, origin.source)
        return node

    def add_param(
        self, param: Param, tensor: torch.Tensor | None, *, before: fx.Node,
        made_by: str = "param", like: fx.Node | None = None,
    ) -> fx.Node:  # fmt: skip
        """Declare a new parameter, with its tensor in memory, and return its ``get_attr`` node.

        ``like`` gives the module path and source line for provenance.
        """
        if param.name in self.params:
            raise ModelError(f"expected a new parameter name, found {param.name!r} twice")
        self.params[param.name] = param
        if tensor is not None:
            self.set_tensor(param.name, tensor)
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", param.name)
        origin = info(like) if like is not None else Info(None)
        node.meta["llmc"] = Info(self.param_type(param), origin.path, made_by, origin.source)
        return node

    def param_type(self, param: Param) -> TensorType:
        """Type of the parameter as the graph sees it."""
        floating = param.dtype.is_floating_point and not param.keep
        return TensorType(param.shape, self.dtype if floating else param.dtype)

    def set_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Overlay a tensor; the model that the weights came from is never touched."""
        if not isinstance(self.weights, DictWeights):
            self.weights = DictWeights({}, self.weights)
        self.weights.tensors[name] = tensor
        old = self.params[name]
        self.params[name] = replace(old, shape=tuple(tensor.shape), dtype=tensor.dtype)

    def prune(self, *only: fx.Node) -> list[str]:
        """Erase nodes without users and parameters without nodes; return the nodes' names.

        Given nodes, only they and what nobody but them reads are looked at: a rewrite of one site
        costs no walk over the whole graph.
        """
        todo = list(only or self.graph.nodes)
        gone: list[fx.Node] = []
        while todo:
            node = todo.pop()
            if node.op in ("call_function", "get_attr") and not node.users and not node._erased:
                todo += node.all_input_nodes
                gone.append(node)
                self.graph.erase_node(node)
        lost = {str(n.target) for n in gone if n.op == "get_attr"}
        if not only:
            read = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
            lost = set(self.params) - read
        for name in lost:
            del self.params[name]
            if isinstance(self.weights, DictWeights):
                self.weights.tensors.pop(name, None)
        return [n.name for n in gone]

    def clone(self) -> Program:
        """A program that can be rewritten without touching this one; tensors are shared."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            new = graph.node_copy(node, lambda n: mapping[n])
            new.meta = dict(node.meta)
            mapping[node] = new
        set_names(graph, {new: old.name for old, new in mapping.items()})
        weights = (
            DictWeights(dict(self.weights.tensors), self.weights.base)
            if isinstance(self.weights, DictWeights)
            else self.weights
        )
        return Program(
            graph, dict(self.params), weights, self.dtype,
            list(self.segments), dict(self.states), copy.deepcopy(self.facts), self.exits,
            dict(self.caches),
        )  # fmt: skip

    def fetch(self, name: str) -> torch.Tensor:
        """The parameter's tensor in the dtype in which the graph computes."""
        param = self.params[name]
        return self.weights.load(name).to(self.param_type(param).dtype)

    def print_python(self, title: str = "") -> str:
        """The graph as runnable Python (see :mod:`.printer`)."""
        from .printer import print_python

        return print_python(self, title)


def sizes(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Values of the input symbols for given input tensors."""
    out: dict[str, int] = {}
    for node in program.inputs:
        for d, n in zip(tensor_type(node).shape, inputs[node.name].shape, strict=True):
            if not isinstance(d, int) and d.is_Symbol:
                out[d.name] = n
    return out
