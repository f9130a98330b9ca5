"""Put a step's keys and values into a cache's buffers in one launch: normed, rotated, as codes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...compiler.ir.errors import ResourceError, UsageError
from ...compiler.ir.held import Held, HeldSide
from ..calls import compiling, on
from ..device import unavailable
from ..render import Rendered
from ..source import function
from .problem import AttentionProblem
from .render import render_stated

TEMPLATE = "cache_write.py.j2"
CODED = ("int8", "fp8")
# Numbers of a token that a program reads at once to norm all of it: 32 a thread.
AT_ONCE = 4096
Turn = tuple[torch.Tensor, torch.Tensor]
Gains = tuple[torch.Tensor | None, torch.Tensor | None]


@functools.lru_cache(1024)
def render_write(problem: AttentionProblem, valid: bool) -> Rendered:
    """The Triton source that writes tokens of `problem`; ``valid``: a call says which are real."""
    coded = problem.cache in CODED
    keys = problem.keys if coded else ""
    norm = f"{problem.norm}norm" if problem.norm else ""
    turn = ("woven" if problem.woven else problem.turn) + ("last" if problem.last else "")
    names = ("cache_write", problem.cache, keys, norm, turn, problem.x_dtype)
    flags = ("gains" if problem.gains else "", "scaled" if problem.scaled else "",
             "valid" if valid else "",
             "counted" if problem.counted else "")  # fmt: skip
    name = "_".join(n for n in (*names, *flags) if n)
    values = {
        "cache": problem.cache, "counted": problem.counted, "gains": problem.gains, "keys": keys,
        "last": problem.last, "name": name, "norm": problem.norm, "scaled": problem.scaled,
        "turn": problem.turn,
        "valid": valid, "woven": problem.woven, "x_dtype": problem.x_dtype,
    }  # fmt: skip
    return render_stated(TEMPLATE, "cache_write", values)


def bytes_written(problem: AttentionProblem, batch: int, tokens: int) -> int:
    """Bytes of one call of ``tokens`` new tokens a row: read once, and what is kept of them."""
    width = 4 if problem.x_dtype == "fp32" else 2
    kept = problem.kv_heads * (problem.D + problem.E)
    spared = (problem.kv_heads - 1) * problem.rotary if problem.last else 0
    read = width * (kept - spared + (2 * problem.heads * problem.D if problem.changed else 0))
    stored = kept * (1 if problem.cache in CODED else width)
    angles = 8 * problem.rotary if problem.turn else 0
    scales = 2 * problem.kv_heads * (1 + (problem.keys == "token")) if problem.keys else 0
    heads = problem.heads + problem.kv_heads if problem.norm == "row" else 2
    gains = width * heads * problem.D if problem.gains else 0
    return batch * tokens * (read + stored + angles + scales + 17) + gains


def write(
    problem: AttentionProblem, held: Held, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    q_pos: torch.Tensor, real: torch.Tensor | None, turn: Turn | None,
    q_out: torch.Tensor, k_out: torch.Tensor, gains: Gains = (None, None),
    k_last: torch.Tensor | None = None, q_scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Write k [B, KV, S, D] and v [B, KV, S, E] with positions int [B, S] into ``held``'s buffers.

    ``real`` bool [B, S] says which are no padding, None for all. ``turn``: cosines and sines that
    broadcast to [B, 1, S, R]. ``gains``: of the norm of queries and of keys. ``k_last`` [B, 1, S,
    R] are the last channels of keys of all heads, where these are rotated, ``q_scale`` [B, 1, S, 1]
    what scales queries, where the problem says so. Where the problem has
    a norm or a rotation, queries as they are read go to ``q_out`` [B, H, S, D], and keys to
    ``k_out`` [B, KV, S, D] where the cache keeps codes; both are contiguous.
    ResourceError when there is neither a CUDA device nor the interpreter; UsageError where angles,
    gains or last channels are not given as the problem says.
    """
    why = unavailable()
    if why:
        raise ResourceError(f"cannot launch cache_write: {why}")
    batch, kv_heads, new, _ = k.shape
    if (turn is None) != (not problem.turn):
        raise UsageError("expected cosines and sines where keys are rotated, and nowhere else")
    if any((gain is None) == problem.gains for gain in gains):
        raise UsageError("expected gains where the norm has some, and nowhere else")
    if (k_last is None) == problem.last:
        raise UsageError("expected last channels of keys where these are rotated, and nowhere else")
    if (q_scale is None) == problem.scaled:
        raise UsageError("expected what scales queries where they are scaled, and nowhere else")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    given: dict[str, Any] = {
        "q_ptr": q, "q_out_ptr": q_out, "k_ptr": k, "v_ptr": v, "k_out_ptr": k_out,
        "q_pos_ptr": q_pos.contiguous(), "pos_to_ptr": held.pos,
        "real_ptr": None if real is None else real.contiguous().view(torch.uint8),
        "real_to_ptr": held.real.view(torch.uint8), "start_ptr": held.counter,
        "START": held.start, "S": new,
        "stride_pos": held.pos.stride(0), "stride_real": held.real.stride(0),
        **_to("k", problem, held.keys, held.start), **_to("v", problem, held.values, held.start),
        **write_sizes(problem),
    }  # fmt: skip
    for name, x in (("q", q), ("k", k), ("v", v)):
        given |= dict(zip((f"stride_{name}{a}" for a in "bhs"), x.stride(), strict=False))
    if k_last is not None:
        k_last = k_last if k_last.stride(-1) == 1 else k_last.contiguous()
        given |= {"k_last_ptr": k_last, "stride_klb": k_last.stride(0),
                  "stride_kls": k_last.stride(2)}  # fmt: skip
    if q_scale is not None:
        by = q_scale.expand(batch, 1, new, 1)
        given |= {"by_ptr": by, "stride_bb": by.stride(0), "stride_bs": by.stride(2)}
    if turn is not None:
        cos, sin = (t.expand(batch, 1, new, problem.rotary) for t in turn)
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        given |= {"cos_ptr": cos, "sin_ptr": sin, "stride_cb": cos.stride(0),
                  "stride_cs": cos.stride(2)}  # fmt: skip
    for name, gain in zip("qk", gains, strict=True):
        given[f"{name}_gain_ptr"] = None if gain is None else gain.contiguous()
    kernel = function(render_write(problem, real is not None))
    heads = 2 * kv_heads + (problem.heads if problem.changed else 0)
    with compiling(kernel), on(k.device):
        kernel[heads, new, batch](
            **{n: given[n] for n in kernel.arg_names}, num_warps=write_warps(problem)
        )


def write_warps(problem: AttentionProblem) -> int:
    """Warps of a program: one for a head, more where it reads all heads of its token."""
    return 4 if problem.norm == "row" else 1


def write_sizes(problem: AttentionProblem) -> dict[str, float]:
    """What is compiled in: heads, sizes and padded ones, and how many heads are read at once."""
    sizes = {"D": problem.D, "E": problem.E}
    padded = {f"B{n}": 1 << (s - 1).bit_length() for n, s in sizes.items()}
    heads = {"H": problem.heads, "KV": problem.kv_heads, "R": problem.rotary}
    most = max(1, AT_ONCE // padded["BD"])
    blocks = {
        f"{name}_BLOCK": min(most, 1 << (count - 1).bit_length())
        for name, count in (("Q", problem.heads), ("K", problem.kv_heads))
    }
    return {**heads, **sizes, **padded, **blocks, "EPS": problem.eps, "OFFSET": problem.offset}


def _to(name: str, problem: AttentionProblem, side: HeldSide, start: int) -> dict[str, Any]:
    """Where keys or values of a step go: token, pointers and strides."""
    codes = side.parts[0]
    if problem.cache not in CODED:
        kept = codes if side.tail is None else side.tail
        slots = kept.shape[2]
        out = {f"{name}_to_ptr": kept, "SLOT": (start - side.base) % slots, "RING": slots}
        return out | _strides(f"stride_{name}t", kept, "bht")
    scale = side.parts[-1] if name == "k" else side.parts[1]
    raw = codes if problem.cache == "int8" else codes.view(torch.uint8)
    out = {f"{name}_to_ptr": raw, f"{name}_scale_ptr": scale, "SLOT": start,
           "RING": raw.shape[2]}  # fmt: skip
    out |= _strides(f"stride_{name}t", raw, "bht")
    return out | (_strides(f"stride_{name}s", scale, "bh") if scale.dim() == 4 else {})


def _strides(name: str, x: torch.Tensor, axes: str) -> dict[str, int]:
    return {f"{name}{a}": s for a, s in zip(axes, x.stride(), strict=False)}
