"""A lowering from types alone: fused ops with kernel, bytes and floor, what is left, launches.

It reads no tensor and needs no GPU, so it tells of a model on any machine what another would run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from ..compiler.ir.errors import ModelError
from ..compiler.ir.graph import Program
from ..compiler.ir.ops import row_of
from ..compiler.ir.segments import refresh_segments
from . import cpu, made
from .attention.lower import PlacedAttention, attention_implementations
from .fuse import FEATURES, Fused, fuse
from .fuse_nodes import constants
from .gains import asked
from .kernels import choose
from .mixture.told import surveyed
from .problem import DTYPES, Problem
from .row import KernelRow
from .rows.made import MADE_INPUT
from .targets import CPU_FEATURES, TOKENS, cpu_accept, triton_accept

# Calls that only look at a tensor in another way, or ask for its size.
VIEWS = frozenset({
    "aten.reshape.default", "aten.view.default", "aten.transpose.int", "aten.permute.default",
    "aten.slice.Tensor", "aten.select.int", "aten.unsqueeze.default", "aten.squeeze.dim",
    "aten.expand.default", "aten.sym_size.int", "operator.getitem", "aten.split_with_sizes.default",
    "aten.split.Tensor", "aten.chunk.default", "aten.t.default", "aten.narrow.default",
    "aten.unflatten.int", "aten.flatten.using_ints", "aten.detach.default", "aten.alias.default",
})  # fmt: skip
Launched = tuple[KernelRow, Problem]
# New keys and values are written, then attended to; what splits a run joins it in the same launch.
ATTENTION = 2


def survey(
    program: Program, target: str, tokens: int, dtype: str, bandwidth: float
) -> dict[str, Any]:
    """How `program` is lowered, as plain values.

    Args:
        tokens: of the call whose bytes are counted. dtype: of its activations. bandwidth: bytes
            per second that floors are taken at.
    Returns:
        ``fused`` and ``attention``, a row per node with kernel, bytes and floor; ``not_fused``;
        ``blocks``, of each segment the launches of a decode step and the calls that make them;
        ``launches_per_block``, the largest of those of decoder blocks (None where there are none).
    """
    own = program.clone()

    def accept(problem: Problem) -> str | None:
        if target == "cpu":
            return cpu_accept(problem)
        return triton_accept(replace(problem, x_dtype=dtype))

    plan = fuse(own, accept, CPU_FEATURES if target == "cpu" else FEATURES)
    rows = [_row(own, f, target, tokens, dtype, bandwidth) for f in plan.fused]
    rows += [surveyed(own, m, target, tokens, dtype, bandwidth) for m in plan.mixtures]
    order = {node.name: i for i, node in enumerate(own.graph.nodes)}
    rows.sort(key=lambda r: order[r["node"]])
    refused, attended = list(plan.refused), list[PlacedAttention]()
    if target == "triton" and own.states:
        try:
            _, attended, left = attention_implementations(own)
        except ModelError:
            left = []  # its sizes are not fixed: the op's own reference runs
        refused += left
        refresh_segments(own)
    counts = {r["node"]: r["launches"] for r in rows} | {p.node: ATTENTION for p in attended}
    blocks = launches(own, counts)
    decoders = [b["launches"] for name, b in blocks.items() if name.startswith("block")]
    return {
        "target": target, "tokens": tokens, "dtype": dtype, "bandwidth": bandwidth, "fused": rows,
        "attention": [p.json(batch=1, tokens=TOKENS, speed=bandwidth) for p in attended],
        "not_fused": [r.to_json() for r in refused],
        "bytes": sum(r["bytes"] for r in rows), "floor_us": sum(r["floor_us"] for r in rows),
        "blocks": blocks, "launches_per_block": max(decoders) if decoders else None,
    }  # fmt: skip


def _row(
    program: Program, fused: Fused, target: str, tokens: int, dtype: str, bandwidth: float
) -> dict[str, Any]:
    problem, more = replace(fused.problem, x_dtype=dtype), dict[str, Any]()
    inputs: Iterable[fx.Node] = program.node(fused.node).args[0]  # type: ignore[assignment]
    stored = sum(p.bytes for n in inputs if (p := program.param_of(n)) is not None)
    starts = 1
    if target == "cpu":
        kernel, _ = cpu.choose(fused.problem)
        name = kernel.name if kernel is not None else ""
        # torch's layouts: dense codes (N:M is spread), two bf16 values per group.
        weight = problem.N * problem.K * problem.bits // 8 + 4 * problem.N * problem.groups
        moved = weight + 2 * tokens * (problem.N + problem.K)
        if kernel is not None:
            choice = cpu.ways_by_tokens(kernel, fused.problem)
            more = {"way": choice.at(tokens), "ways": str(choice), "note": kernel.note}
    else:
        problem = asked(problem)
        row, _ = choose(problem)
        assert row is not None
        name, (moved, starts) = row.name, _counted(row, problem, tokens)
    return {
        "node": fused.node, "path": fused.path, "kernel": name, "parts": list(fused.ops),
        "linears": list(fused.linears), "sections": list(fused.sections),
        "problem": asdict(problem), "bytes": moved, "stored_bytes": stored, "launches": starts,
        "floor_us": 1e6 * moved / bandwidth, **more,
    }  # fmt: skip


def _counted(row: KernelRow, problem: Problem, tokens: int) -> tuple[int, int]:
    """Bytes moved by a call of a row, and how many kernels it starts, at its untuned tile."""
    return row.bytes_moved(problem, tokens), len(launched(row, problem, tokens))


@lru_cache(4096)
def launched(
    row: KernelRow, problem: Problem, tokens: int
) -> tuple[tuple[KernelRow, Problem], ...]:
    """The kernels that a call of a row starts, in order, at its untuned tile."""
    if made.goes_before(row, problem, tokens):
        return ((MADE_INPUT, made.making(problem)), (row, made.without(problem)))
    if row.call is None:
        return ((row, problem),)
    started: list[Launched] = []
    given = {
        "x": torch.empty(tokens, problem.K, device="meta", dtype=DTYPES[problem.x_dtype]),
        "y": torch.empty(tokens, problem.outputs, device="meta", dtype=DTYPES[problem.x_dtype]),
    }
    config = row.default_config(problem, tokens)
    row.call(lambda *args, **how: started.append(args[:2]), row, problem, config, tokens, given)
    return tuple(started)


def launches(program: Program, known: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """By segment: how many kernels a step starts, and by which calls.

    Views and what hangs on parameters alone start none; another call counts as one, which is the
    least that it can be. known: how many the calls start that kernel rows run.
    """
    out: dict[str, dict[str, Any]] = {}
    still = constants(program.graph)
    for segment in program.segments:
        calls = []
        for name in segment.nodes:
            node = program.node(name)
            if node.op == "call_function" and node not in still and _starts(node):
                calls.append(name)
        out[segment.name] = {"launches": sum(known.get(c, 1) for c in calls), "calls": calls}
    return out


def _starts(node: fx.Node) -> bool:
    return row_of(node).name not in VIEWS
