"""Tracing a module with torch.export: non-strict, symbolic sizes, no decompositions."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ir.errors import CaptureError, LlmcError
from .importer import Traced, symbols_of
from .sources import Leaf, constant

# Two unlike sizes above 1, so that neither is specialised nor taken for the other.
TRACE_BATCH, TRACE_SEQ = 2, 12


def trace(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    axes: Mapping[str, Sequence[str | None]],
    limits: Mapping[str, int] | None = None,
) -> torch.export.ExportedProgram:
    """Export a module, with ``linear``, ``embedding`` and attention kept whole.

    Args:
        module: in evaluation mode; its parameters may be fake.
        inputs: keyword arguments of ``forward``.
        axes: per input the symbol of each axis, None for a fixed one.
        limits: largest value of a symbol, where the module bounds it.
    Raises:
        CaptureError: the module cannot be traced with symbolic sizes.
    """
    limits = limits or {}

    def dynamic(name: str) -> Any:
        return torch.export.Dim.DYNAMIC(min=1 if name == "B" else 2, max=limits.get(name))

    shapes = {
        key: {i: dynamic(n) for i, n in enumerate(axes.get(key, ())) if n is not None}
        for key in inputs
    }
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                module, (), dict(inputs), dynamic_shapes=shapes, strict=False
            )
            return _functional(program)
    except LlmcError:
        raise
    except Exception as e:  # torch.export raises dozens of unrelated types; all mean the same here
        cause: BaseException | None = e
        while cause is not None:
            if isinstance(cause, LlmcError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        text = " ".join(str(e).split())[:300]
        raise CaptureError(
            f"expected a module that exports with symbolic sizes, found {type(e).__name__}: {text}",
            where=type(module).__name__,
        ) from e


def _functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without in-place ops; rewriting costs as much as tracing, so only if needed."""
    plain = all(n.op != "call_function" or _is_pure(n) for n in program.graph.nodes)
    return program if plain else program.run_decompositions({})


def _is_pure(node: Any) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    sizes = (torch.SymInt, torch.SymBool, torch.SymFloat, int)
    return node.target is operator.getitem or isinstance(node.meta.get("val"), sizes)


def traced(
    exported: torch.export.ExportedProgram,
    leaves: Mapping[str, Leaf],
    names: Mapping[str, str],
    axes: Mapping[str, Sequence[str | None]],
    prefix: str = "",
) -> Traced:
    """The exported graph with its placeholders told apart.

    Args:
        leaves: by the exported module's parameter and buffer names, without ``prefix``.
        names: public input names by placeholder name.
        axes: as in :func:`trace`, by public name.
    Raises:
        CaptureError: the module writes to its buffers or inputs.
    """
    signature = exported.graph_signature
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if written:
        raise CaptureError(
            f"expected a module that writes nothing, found it writing {written[0]!r}"
        )
    by_node: dict[str, Leaf] = {}
    start = prefix + "." if prefix else ""
    for table in (signature.inputs_to_parameters, signature.inputs_to_buffers):
        for node, name in table.items():
            by_node[node] = leaves[name.removeprefix(start)]
    for node, name in signature.inputs_to_lifted_tensor_constants.items():
        value = exported.constants[name]
        if type(value) is not torch.Tensor:
            raise CaptureError(
                f"expected a constant tensor, found {type(value).__name__}", where=name
            )
        by_node[node] = constant(name, value)
    shapes = {node: tuple(axes[name]) for node, name in names.items() if name in axes}
    symbols = symbols_of(exported.graph, shapes)
    return Traced(exported.graph, by_node, dict(names), symbols, prefix)
