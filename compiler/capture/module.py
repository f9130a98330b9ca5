"""Capturing live modules: plain ones by example inputs, and the graphs that Dynamo hands over."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ..ir.errors import CaptureError
from ..ir.graph import Program
from .export import trace, traced
from .importer import Traced, import_graph
from .normalise import normalise
from .sources import Leaf, LeafWeights, constant
from .twin import live_leaf, live_leaves, storage_key, weightless_copy

Axes = Mapping[str, Sequence[str | None]]


def named_inputs(
    module: torch.nn.Module, inputs: Mapping[str, torch.Tensor] | Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Example inputs by the names of ``forward``.

    Raises:
        CaptureError: they do not fit the signature, or are not tensors.
    """
    given = dict(inputs) if isinstance(inputs, Mapping) else {}
    rest = () if isinstance(inputs, Mapping) else tuple(inputs)
    try:
        bound = inspect.signature(module.forward).bind(*rest, **given).arguments
    except TypeError as e:
        raise CaptureError(
            f"expected inputs that forward takes: {e}", where=type(module).__name__
        ) from None
    if not bound or not all(isinstance(v, torch.Tensor) for v in bound.values()):
        raise CaptureError("expected example inputs that are tensors", where=type(module).__name__)
    return dict(bound)


def default_axes(inputs: Mapping[str, torch.Tensor]) -> dict[str, tuple[str | None, ...]]:
    """B for each first axis; S for the second of integer and bool inputs and of rank 3 or more."""
    return {
        name: tuple(
            "B" if i == 0
            else "S" if i == 1 and (t.ndim >= 3 or not t.is_floating_point())
            else None
            for i in range(t.ndim)
        )
        for name, t in inputs.items()
    }  # fmt: skip


def capture_module(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor] | Sequence[torch.Tensor],
    axes: Axes | None = None,
) -> Program:
    """Capture a plain module; it is not modified, and its tensors are referred to, not copied.

    Args:
        module: any module whose ``forward`` takes and returns tensors.
        inputs: example inputs, by name or in order; sizes of symbolic axes must be above 1.
        axes: per input the symbol of each axis (None: fixed); default as in :func:`default_axes`.
    Raises:
        CaptureError: it does not trace, or holds an op that llmc does not know.
    """
    examples = named_inputs(module, inputs)
    names = dict(axes) if axes is not None else default_axes(examples)
    exported = trace(weightless_copy(module), examples, names)
    user = [n for n in exported.graph_signature.user_inputs if isinstance(n, str)]
    given = traced(exported, live_leaves(module), dict(zip(user, examples, strict=True)), names)
    program = import_graph(given, empty_facts(type(module).__name__))
    program.facts["refusals"] = [r.to_json() for r in normalise(program)]
    return program


def empty_facts(name: str) -> dict[str, Any]:
    """Facts of a model that has no config."""
    return {
        "model_type": name, "architecture": name, "vocab": None, "context": None, "bos": [],
        "eos": [], "pad": [], "tokenizer": None, "config": {},
    }  # fmt: skip


@dataclass
class DynamoCapture:
    """A Dynamo graph as a program.

    Attributes:
        program: normalised; its result is one tensor or a tuple.
        order: per example input the program's input name, None for a weight or an unused size.
        sources: per parameter the example input it was, so that recompiles reuse what was solved.
    """

    program: Program
    order: list[str | None]
    sources: dict[str, torch.Tensor]


def capture_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> DynamoCapture:
    """Capture the graph that Dynamo hands a backend, at the op level of :func:`capture_module`.

    Args:
        gm: Dynamo's graph module; parameters are placeholders.
        example_inputs: real parameters, tensors and symbolic ints in placeholder order.
    Raises:
        CaptureError: gradients are needed, or an op that llmc does not know.
    """
    if torch.is_grad_enabled() and any(
        isinstance(e, torch.Tensor) and e.requires_grad for e in example_inputs
    ):
        raise CaptureError(
            "expected a graph for inference, found one that requires grad",
            hint="call under torch.no_grad() or torch.inference_mode()",
        )
    aten = _retrace(gm, example_inputs)
    places = [n for n in aten.graph.nodes if n.op == "placeholder"]
    floats = [
        e.dtype
        for e in example_inputs
        if isinstance(e, torch.nn.Parameter) and e.is_floating_point()
    ]
    compute = Counter(floats).most_common(1)[0][0] if floats else torch.float32
    leaves: dict[str, Leaf] = {}
    shared: dict[Any, Leaf] = {}
    tensors: dict[int, torch.Tensor] = {}
    inputs: dict[str, str] = {}
    for place, outer, example in zip(places, _placeholders(gm), example_inputs, strict=True):
        if isinstance(example, torch.nn.Parameter) or _is_buffer(outer, example):
            leaf = shared.setdefault(
                storage_key(example), live_leaf(outer.name, example, True, compute)
            )
            leaf.keep = leaf.keep or example.dtype != compute
            leaves[place.name] = leaf
            tensors[id(leaf)] = example
        elif isinstance(example, (torch.Tensor, torch.SymInt)):
            inputs[place.name] = f"x{len(inputs)}"
        elif not isinstance(example, int) or place.users:
            raise CaptureError(f"expected tensors and sizes, found {type(example).__name__}")
    for node in aten.graph.nodes:
        held = getattr(aten, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(held, torch.Tensor):
            leaves[node.name] = constant(str(node.target), held)
    symbols, dropped = _symbols(places, inputs)
    for name in dropped:
        del inputs[name]
    program = import_graph(
        Traced(aten.graph, leaves, inputs, symbols), empty_facts("dynamo"), compute
    )
    assert isinstance(program.weights, LeafWeights)
    before = dict(program.weights.leaves)
    program.facts["refusals"] = [r.to_json() for r in normalise(program)]
    by_names = {leaf.names: tensors[id(leaf)] for leaf in before.values() if id(leaf) in tensors}
    sources = {p.name: by_names[p.names] for p in program.params.values() if p.names in by_names}
    order = [inputs.get(place.name) for place in places]
    return DynamoCapture(program, order, sources)


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def _is_buffer(node: fx.Node, example: Any) -> bool:
    """Whether Dynamo read the placeholder off a module rather than off the call's arguments.

    Raises:
        CaptureError: a Python number that Dynamo made a tensor, whose value is not fixed.
    """
    if not isinstance(example, torch.Tensor):
        return False
    given = node.meta.get("grapharg")
    if getattr(given, "pass_arg_as_tensor", False):
        raise CaptureError(
            f"expected fixed numbers, found {node.name} as an input",
            hint="compile with dynamic=None or dynamic=False",
        )
    source = getattr(node, "_dynamo_source", None)
    kind = getattr(source, "guard_source", None)
    return kind is not None and bool(
        kind.is_unspecialized_nn_module() or kind.is_specialized_nn_module()
    )


def _retrace(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """The same graph in aten, before dispatch, on Dynamo's own fake tensors and symbols."""
    from torch._guards import TracingContext
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta, set_current_meta

    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    mode = mode if mode is not None else FakeTensorMode(allow_non_fake_inputs=True)
    fakes: list[Any] = []
    for example, node in zip(example_inputs, _placeholders(gm), strict=True):
        if isinstance(example, torch.Tensor):
            # Dynamo may have started over since it noted the example: this mode's symbols count.
            known = context.tensor_to_context.get(example) if context is not None else None
            source = known.tensor_source if known is not None else None
            fakes.append(
                mode.from_tensor(
                    example, static_shapes=False, symbolic_context=known, source=source
                )
                if known is not None
                else mode.from_tensor(example, static_shapes=True)
            )
        else:
            fakes.append(node.meta.get("example_value", example))

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            with set_current_meta(n):
                return super().run_node(n)

    def call(*args: Any) -> Any:
        return Run(gm).run(*args)

    try:
        with preserve_node_meta(), mode, torch.no_grad():
            out = make_fx(
                call, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True
            )(*fakes)
    except Exception as e:  # retracing runs arbitrary fake kernels
        text = " ".join(str(e).split())[:200]
        raise CaptureError(
            f"expected a graph that retraces, found {type(e).__name__}: {text}"
        ) from e
    _drop_empty(out)
    _guard_lengths(out)
    return out


def _drop_empty(gm: fx.GraphModule) -> None:
    """Leave tensors of shape [0] out of concatenations: torch lets them join any rank.

    An empty KV cache is such a tensor.
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        parts = [p for p in node.args[0] if tuple(p.meta["val"].shape) != (0,)]
        if 0 < len(parts) < len(node.args[0]):
            node.args = (parts, *node.args[1:])
    gm.graph.eliminate_dead_code()


def _guard_lengths(gm: fx.GraphModule) -> None:
    """Keys and values of one attention have one length: say so where Dynamo has two symbols.

    Asking the symbolic sizes makes a guard, so a call that breaks it is compiled anew.
    """
    op = torch.ops.aten.scaled_dot_product_attention.default
    for node in gm.graph.find_nodes(op="call_function", target=op):
        k, v = (n.meta["val"] for n in node.args[1:3])
        if k.shape[-2] != v.shape[-2]:
            raise CaptureError(
                f"expected k and v of one length, found {k.shape[-2]} and {v.shape[-2]}",
                where=f"node {node.name}",
            )


def _symbols(
    places: Sequence[fx.Node], inputs: Mapping[str, str]
) -> tuple[dict[sympy.Symbol, str], list[str]]:
    """Names for Dynamo's symbols, and the size inputs that a tensor's shape already tells."""
    spare = (f"D{i}" for i in itertools.count())
    out: dict[sympy.Symbol, str] = {}
    for place in places:
        value = place.meta.get("val")
        if place.name not in inputs or not isinstance(value, torch.Tensor):
            continue
        sizes: tuple[Any, ...] = tuple(value.shape)
        for axis, size in enumerate(sizes):
            known = size.node.expr if isinstance(size, torch.SymInt) else None
            if known is not None and known.is_Symbol and known not in out:
                name = ("B", "S")[axis] if axis < 2 else next(spare)
                out[known] = next(spare) if name in out.values() else name
    dropped = []
    for place in places:
        value = place.meta.get("val")
        if place.name in inputs and isinstance(value, torch.SymInt):
            if value.node.expr in out:
                dropped.append(place.name)
            elif value.node.expr.is_Symbol:
                out[value.node.expr] = next(spare)
    return out, dropped
