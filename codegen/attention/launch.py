"""Launch a cached attention: buffers of a state, as they are -> [B, S, H, E].

Runs of tokens are joined by the program that ends last, in the order of the runs, so results are
the same each time.
"""

from __future__ import annotations

from typing import Any

import torch

from ...compiler.ir.errors import ResourceError, UsageError
from ...compiler.ir.held import Held, HeldSide
from ..calls import compiling, on
from ..counters import counters
from ..device import interpreting, unavailable
from ..problem import dtype_name
from ..row import MAX_REGISTERS
from ..source import function
from .problem import AttentionProblem
from .render import joined, padded, render
from .row import AttentionRow, SplitConfig


def attend(
    row: AttentionRow,
    problem: AttentionProblem,
    q: torch.Tensor,
    held: Held,
    q_pos: torch.Tensor,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    *,
    scale: float,
    config: SplitConfig | None = None,
) -> torch.Tensor:
    """softmax(cap(q·kᵀ·scale), over allowed keys)·v of q [B, H, S, D] over ``held``, [B, S, H, E].

    ``q_pos`` is int [B, S]. Scores have ``slopes`` fp32 [H] times how far a key is ahead added.
    UsageError where the tensors are not what the problem says; ResourceError when there is neither
    a CUDA device nor the interpreter.
    """
    why = unavailable()
    if why:
        raise ResourceError(f"cannot launch {row.name}: {why}")
    _check(row, problem, q, held, q_pos, slopes)
    batch, heads, queries, _ = q.shape
    y = q.new_empty(batch, queries, heads, problem.E)
    if not y.numel():
        return y
    q = q if q.stride(-1) == 1 else q.contiguous()
    tokens = held.pos.shape[1] if problem.counted else held.keys.due
    config = config or row.config(problem, batch, tokens, queries)
    rows = queries * problem.repeat
    blocks = -(-rows // config.BM)
    grid = (batch * problem.kv_heads, config.splits, blocks)
    fixed = sizes(problem, config)
    # Peak, total and sums of each row of each run; a run alone leaves nothing.
    parts = grid[0] * blocks * config.splits * config.BM * (fixed["BE"] + 2)
    found = q.new_empty(0 if config.splits == 1 else parts, dtype=torch.float32)
    given: dict[str, Any] = {
        "q_ptr": q, "q_pos_ptr": q_pos.contiguous(), "k_pos_ptr": held.pos,
        "valid_ptr": None if held.valid is None else held.valid.view(torch.uint8),
        "sinks_ptr": sinks, "slopes_ptr": slopes, "y_ptr": y, "part_ptr": found,
        "count_ptr": counters("runs", grid[0] * blocks, q.device), "scale": float(scale),
        "start_ptr": held.counter,
        "END": held.tokens, "K_DUE": held.keys.due, "V_DUE": held.values.due,
        "CHUNK": config.chunk(held.values.due), "SPLITS": config.splits, "S": queries,
        "KV": problem.kv_heads, "stride_pos": held.pos.stride(0),
        "stride_valid": 0 if held.valid is None else held.valid.stride(0),
        **_strides("q", q), **_side("k", problem, held.keys), **_side("v", problem, held.values),
        **fixed,
    }  # fmt: skip
    kernel = function(render(row, problem, interpret=interpreting()))
    with compiling(kernel), on(q.device):
        kernel[grid](
            **{n: given[n] for n in kernel.arg_names},
            num_warps=config.warps, num_stages=config.stages, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return y


def sizes(problem: AttentionProblem, config: SplitConfig) -> dict[str, Any]:
    """What is compiled in: sizes, padded ones, and the tile."""
    # A product is at least 16 deep; each shift of a word gives two channels.
    least = 16 if problem.cache == "kv" else 16 * (16 // problem.bits) // joined(problem)
    return {
        "GROUP": problem.repeat, "D": problem.D, "E": problem.E,
        "BD": max(least, padded(problem.D)), "BE": max(least, padded(problem.E)),
        "K_GROUP": problem.group, "V_GROUP": problem.value_group,
        "TAIL": 32 if problem.cache == "kivi" else 16,
        "BM": config.BM, "BT": config.BT, "STAGES": config.stages, "ALONE": config.splits == 1,
    }  # fmt: skip


def _strides(name: str, x: torch.Tensor) -> dict[str, int]:
    """Strides of batch, head and query of [B, H, S, D]."""
    return {f"stride_{name}{axis}": s for axis, s in zip("bhs", x.stride(), strict=False)}


def _side(name: str, problem: AttentionProblem, side: HeldSide) -> dict[str, Any]:
    """Pointers and strides of keys or values."""
    codes, *others = side.parts
    if problem.cache == "kv":
        strides = dict(zip((f"stride_{name}{a}" for a in "bht"), codes.stride(), strict=False))
        return {f"{name}_ptr": codes, **strides}
    words = codes.view(torch.int32)
    out: dict[str, Any] = {
        f"{name}_ptr": words, f"{name}_scale_ptr": others[0], f"{name}_low_ptr": others[-1],
        f"stride_{name}b": words.stride(0), f"stride_{name}h": words.stride(1),
        f"stride_{name}t": words.stride(2),
    }  # fmt: skip
    if others[0].dim() == 4:
        out |= {f"stride_{name}sb": others[0].stride(0), f"stride_{name}sh": others[0].stride(1)}
    assert side.tail is not None
    tail = side.tail if side.tail.stride(-1) == 1 else side.tail.contiguous()
    # Tokens of the tail are at most one ring, so that they wrap around once.
    ring = tail.shape[2]
    base = side.base + (side.due - side.base) // ring * ring
    out |= {f"{name}_tail_ptr": tail, "BASE": base, "RING": ring}
    return out | dict(zip((f"stride_{name}t{a}" for a in "bht"), tail.stride(), strict=False))


def _check(
    row: AttentionRow, problem: AttentionProblem, q: torch.Tensor, held: Held, q_pos: torch.Tensor,
    slopes: torch.Tensor | None,
) -> None:  # fmt: skip
    where = f"kernel row {row.name}"
    batch, queries = q.shape[0], q.shape[2]
    expected = {
        "q": (tuple(q.shape), (batch, problem.heads, queries, problem.D)),
        "positions": (tuple(q_pos.shape), (batch, queries)),
        "kept keys": (tuple(held.keys.parts[0].shape[:2]), (batch, problem.kv_heads)),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise UsageError(f"expected {name} {list(wanted)}, found {list(found)}", where=where)
    if dtype_name(q.dtype) != problem.x_dtype:
        raise UsageError(f"expected q in {problem.x_dtype}, found {q.dtype}", where=where)
    if queries > problem.queries:
        raise UsageError(f"expected at most {problem.queries} queries, found {queries}",
                         where=where)  # fmt: skip
    if problem.slopes != (slopes is not None):
        raise UsageError(f"expected slopes={slopes is not None}, found {problem.slopes}",
                         where=where)  # fmt: skip
    if problem.valid != (held.valid is not None):
        raise UsageError(f"expected valid={held.valid is not None}, found {problem.valid}",
                         where=where)  # fmt: skip
    if held.keys.parts[0].device != q.device:
        raise UsageError(
            f"expected a cache on {q.device}, found {held.keys.parts[0].device}", where=where
        )
