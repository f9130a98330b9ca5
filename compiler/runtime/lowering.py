"""From a program to a runner for a target: compute dtype, cache, kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import fx

from ..ir.build import result_type
from ..ir.errors import ModelError, UsageError
from ..ir.graph import Program, info, tensor_type
from ..ir.ops import fused, infer, row_of
from ..ir.segments import refresh_segments
from ..ir.types import TensorType, short
from .attend import attention_implementations
from .cache import add_cache
from .executor import Runner
from .exits import ExitRunner

if TYPE_CHECKING:
    from ...codegen.targets import Lowered

_COMPUTE = (torch.float32, torch.bfloat16, torch.float16)
_DECODES = ("llmc.dequantize", "llmc.lookup", "llmc.sum_signs", "llmc.decode_pairs")
# Ops whose floating arguments must have one dtype.
_ONE_DTYPE = {
    "aten.linear.default", "aten.matmul.default", "aten.mm.default", "aten.bmm.default",
    "aten.addmm.default", "aten.baddbmm.default", "llmc.attention", "llmc.cached_attention",
    "llmc.add_csr", "llmc.csr_linear", "llmc.experts", "llmc.tt_linear",
    "aten.cat.default", "aten.index_add.default",
}  # fmt: skip
_KEPT_ARGUMENTS = {
    "llmc.cached_attention": {"k_cos", "k_sin", "q_gain", "k_gain", "slopes", "q_scale"},
}


def runner_for(
    program: Program,
    target: str = "reference",
    *,
    cached: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    resident: Literal["packed", "dense"] = "packed",
    exits: bool = True,
    compiled: bool = False,
) -> Runner:
    """A runner of a program, which stays as it is.

    Args:
        target: ``reference`` runs every op's own definition; ``cpu`` and ``triton`` use kernels.
        cached: give it a KV cache first.
        device: default: ``cuda`` for ``triton`` where there is one, else ``cpu``.
        dtype: compute in another floating dtype than the program's own.
        exits: take the program's early exits, where it has some and a KV cache.
        compiled: compile the CPU's int4 products for this machine first; they are cached.
    Raises:
        UsageError: an unknown target. ResourceError: one that this machine cannot run.
        ModelError: a program that cannot have a cache, or cannot compute in ``dtype``.
    """
    done = lowered(
        program, target, cached=cached, device=device, dtype=dtype, resident=resident,
        compiled=compiled,
    )  # fmt: skip
    return runner_of(done, device=device, resident=resident, exits=exits)


def lowered(
    program: Program,
    target: str,
    *,
    cached: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    resident: Literal["packed", "dense"] = "packed",
    compiled: bool = False,
) -> Lowered:
    """The lowering alone, for ``llmc kernels``; see :func:`runner_for`."""
    from ...codegen.targets import lower

    if cached:
        program = add_cache(program)
    if dtype is not None and dtype != program.dtype:
        program = recast(program, dtype)
    return lower(
        program, target, device=device or default_device(target), compiled=compiled,
        dense=resident == "dense",
    )  # fmt: skip


def runner_of(
    done: Lowered,
    *,
    device: torch.device | str | None = None,
    resident: Literal["packed", "dense"] = "packed",
    exits: bool = True,
) -> Runner:
    """A runner of a lowered program; with ``exits`` it takes those that the program has."""
    given = dict(done.implementations)
    if done.target != "reference":
        for name, plain in attention_implementations(done.program).items():
            # A kernel leaves prompts, and what else it does not take, to torch.
            kernel = given.get(name)
            given[name] = plain if kernel is None else partial(kernel, otherwise=plain)
    leaves = exits and done.program.exits is not None and done.program.states
    kind = ExitRunner if leaves else Runner
    return kind(
        done.program, given, resident=resident, device=device or default_device(done.target)
    )


def default_device(target: str) -> torch.device:
    """Where a target runs when nobody says."""
    return torch.device("cuda" if target == "triton" and torch.cuda.is_available() else "cpu")


def recast(program: Program, dtype: torch.dtype) -> Program:
    """A clone that computes in ``dtype``: parameters, decoded weights and what flows from them.

    Casts that the graph itself makes stay; where they leave an op with two floating dtypes, a cast
    to ``dtype`` is put before it.
    Raises:
        UsageError: not a compute dtype. ModelError: an op that refuses the new types.
    """
    if dtype not in _COMPUTE:
        raise UsageError(
            f"expected a compute dtype of {[short(d) for d in _COMPUTE]}, found {dtype}"
        )
    out = program.clone()
    old, out.dtype = out.dtype, dtype
    for node in list(out.graph.nodes):
        if node.op == "get_attr":
            kind = out.param_type(out.params[str(node.target)])
            node.meta["llmc"] = replace(info(node), type=kind)
        elif node.op == "call_function":
            if row_of(node).name in _DECODES and node.kwargs.get("dtype", old) == old:
                node.kwargs = {**node.kwargs, "dtype": dtype}
            if row_of(node).name == fused.NAME:
                node.kwargs = {"body": fused.recast(str(node.kwargs["body"]), dtype)}
            _unify(out, node, dtype)
            node.meta["llmc"] = replace(info(node), type=infer(node))
    result = out.output
    result.meta["llmc"] = replace(info(result), type=result_type(result.args[0]))
    for node in out.calls():
        if row_of(node).stateful:
            _recast_state(out, node)
    refresh_segments(out)
    return out


def _recast_state(program: Program, node: fx.Node) -> None:
    state = program.states[str(node.kwargs["state"])]
    kept = [tensor_type(v).dtype for v in node.args[1:3] if isinstance(v, fx.Node)]
    types = tuple(t.with_dtype(d) for t, d in zip(state.types, kept, strict=True))
    program.states[state.name] = replace(state, types=types)


def _unify(program: Program, node: fx.Node, dtype: torch.dtype) -> None:
    name = row_of(node).name
    if name not in _ONE_DTYPE:
        return
    kept = _KEPT_ARGUMENTS.get(name, set())
    skip = {
        a for a, part in zip(node.args, _schema(node), strict=False)
        if part in kept and isinstance(a, fx.Node)
    }  # fmt: skip

    found = {n: _floating(n) for n in node.all_input_nodes if n not in skip}
    # Ops on one dtype stay as they are: positions times frequencies need their 32 bits.
    if len({d for d in found.values() if d is not None}) < 2:
        return

    def one(value: fx.Node) -> fx.Node:
        if found.get(value) in (None, dtype):
            return value
        return program.emit("aten.to.dtype", value, dtype, before=node, made_by="recast", like=node)

    node.args = fx.map_arg(node.args, one)
    node.kwargs = fx.map_arg(dict(node.kwargs), one)


def _floating(node: fx.Node) -> torch.dtype | None:
    t = info(node).type
    return t.dtype if isinstance(t, TensorType) and t.dtype.is_floating_point else None


def _schema(node: fx.Node) -> list[str]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        raise ModelError(f"expected an op with a schema, found {row_of(node).name}")
    return [a.name for a in schema.arguments]
