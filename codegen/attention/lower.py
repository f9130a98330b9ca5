"""Cached attention of a program on the rows that serve it: problems, callables, refusals."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import fx

from ...compiler.ir.caches import PLAIN, sizes_of
from ...compiler.ir.graph import Program, info, tensor_type
from ...compiler.ir.ops.attention import cached_attention
from ...compiler.ir.refusal import Refusal
from ..problem import dtype_name
from .fold import fold_inputs
from .launch import attend
from .problem import BIAS, COS, GAIN, K_LAST, Q_SCALE, QUERIES, SINKS, SLOPES, UP, AttentionProblem
from .row import AttentionRow
from .rows import choose
from .write import CODED, Gains, write

_GAIN, _SLOPES, _LAST, _SCALE = GAIN - COS, SLOPES - COS, K_LAST - COS, Q_SCALE - COS
PROMPT = f"prompts of more than {QUERIES} tokens on torch's scaled_dot_product_attention"


@dataclass(frozen=True)
class PlacedAttention:
    """One attention that a row runs; `note` says what it leaves to torch."""

    node: str
    path: str
    problem: AttentionProblem
    row: AttentionRow
    note: str = PROMPT

    def json(self, *, batch: int, tokens: int, speed: float) -> dict[str, Any]:
        """For reports: bytes of a step of one query over ``tokens``, and their floor."""
        one = replace(self.problem, queries=1)
        note = "; ".join(n for n in (self.row.note, self.note) if n)
        return {
            "node": self.node, "path": self.path, "kernel": self.row.name,
            "problem": asdict(self.problem), "tokens": tokens,
            "bytes": self.row.bytes_moved(one, batch, tokens),
            "floor_us": round(self.row.floor_us(one, batch, tokens, speed), 3), "note": note,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class CachedAttention:
    """``llmc.cached_attention`` on a row; what the row does not take runs ``otherwise``.

    That is more queries than it serves, and calls about some rows of a batch.
    """

    row: AttentionRow
    problem: AttentionProblem

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_pos: torch.Tensor,
        k_valid: torch.Tensor | None = None, bias: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None, *rest: torch.Tensor | None, state: Any, scale: float,
        otherwise: Callable[..., torch.Tensor] = cached_attention, **attrs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """q [B, H, S, D], k [B, KV, S, D], v [B, KV, S, E] -> [B, S, H, E]."""
        batch, _, queries, _ = q.shape
        problem = self.problem
        if not (0 < queries <= problem.queries and state.holds(queries)):
            return otherwise(
                q, k, v, q_pos, k_valid, bias, sinks, *rest, state=state, scale=scale, **attrs
            )
        if state.counter is not None:
            problem = _changed(problem, "counted")
        turn = _angles(*rest) if problem.turn else None
        gains: Gains = (rest[_GAIN], rest[_GAIN + 1]) if problem.gains else (None, None)
        # Codes are of changed keys, which are read as they are in this step: they need a place.
        ready_q = q.new_empty(q.shape) if problem.changed else q
        coded = problem.changed and problem.cache in CODED
        last = rest[_LAST] if problem.last else None
        by = rest[_SCALE] if problem.scaled else None
        own = (batch, k.shape[1], queries, problem.D)
        ready_k = k.new_empty(own) if coded or problem.last else k
        pos = q_pos.expand(batch, queries)
        held = state.hold(
            ready_k, v, pos, k_valid,
            lambda held, real: write(
                problem, held, q, k, v, pos, real, turn, ready_q, ready_k, gains, last, by
            ),
        )  # fmt: skip
        if held.padded:
            problem = _changed(problem, "valid")
        slopes = rest[_SLOPES] if problem.slopes else None
        return attend(self.row, problem, ready_q, held, pos, sinks, slopes, scale=scale)


@functools.lru_cache(1024)
def _changed(problem: AttentionProblem, flag: str) -> AttentionProblem:
    return replace(problem, counted=True) if flag == "counted" else replace(problem, valid=True)


def _angles(
    cos: torch.Tensor | None = None, sin: torch.Tensor | None = None, *rest: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    return None if cos is None or sin is None else (cos, sin)


def attention_implementations(
    program: Program,
) -> tuple[dict[str, CachedAttention], list[PlacedAttention], list[Refusal]]:
    """Callables by node name for all cached attention that a row serves, and why others are left.

    What queries and keys go through becomes part of it, in place: `program` is a lowering's own.
    A caller that has something better than the op's reference for what a row leaves gives it to
    the callable as ``otherwise``.
    """
    made: dict[str, CachedAttention] = {}
    placed, refused = list[PlacedAttention](), fold_inputs(program)
    for node in program.calls("llmc.cached_attention"):
        problem = problem_of(program, node)
        row, misfits = choose(problem)
        path = info(node).path
        if row is None:
            why = "; ".join(str(m) for m in misfits)
            refused.append(Refusal("lower", node.name, why, misfits[0].field, path))
            continue
        made[node.name] = CachedAttention(row, problem)
        placed.append(PlacedAttention(node.name, path, problem, row))
    return made, placed, refused


def problem_of(program: Program, node: fx.Node) -> AttentionProblem:
    """The static facts of a ``llmc.cached_attention`` node; ModelError if sizes are not fixed."""
    kv_heads, D, E = sizes_of(node)
    q = node.args[0]
    assert isinstance(q, fx.Node)
    kind = tensor_type(q)
    scheme = program.caches.get(str(node.kwargs["state"]))
    cache = PLAIN if scheme is None else scheme.kind
    places = (BIAS, SINKS, COS, UP, GAIN, SLOPES, Q_SCALE)
    given = {i: len(node.args) > i and node.args[i] is not None for i in places}
    how, rotate = node.kwargs, bool(node.kwargs.get("rotate", False))
    kept: dict[str, Any] = {}
    if scheme is not None:
        kept = {"bits": scheme.bits, "group": scheme.group or 0, "residual": scheme.residual,
                "keys": "group" if cache == "kivi" else scheme.keys}  # fmt: skip
    return AttentionProblem(
        heads=int(kind.shape[1]), kv_heads=kv_heads, D=D, E=E, queries=QUERIES,
        x_dtype=dtype_name(kind.dtype), cache=cache, causal=bool(how.get("causal", True)),
        window=_number(how.get("window")), dilation=_number(how.get("dilation", 1)),
        first=_number(how.get("first")), softcap=float(str(how.get("softcap") or 0.0)),
        bias=given[BIAS], sinks=given[SINKS], slopes=given[SLOPES],
        scaled=given[Q_SCALE],
        turned=given[COS] and not rotate, latent=given[UP], gains=given[GAIN],
        norm=str(how.get("norm", "")), eps=float(str(how.get("eps", 0.0))),
        offset=float(str(how.get("offset", 0.0))), **_turn(node, rotate), **kept,
    )  # fmt: skip


def _turn(node: fx.Node, rotate: bool) -> dict[str, Any]:
    if not rotate:
        return {}
    cos = node.args[COS]
    assert isinstance(cos, fx.Node)
    turn = "pairs" if node.kwargs.get("interleaved", False) else "half"
    where = {n: bool(node.kwargs.get(n, False)) for n in ("last", "woven")}
    return {"turn": turn, "rotary": int(tensor_type(cos).shape[3]), **where}


def _number(value: object) -> int:
    return int(str(value or 0))
