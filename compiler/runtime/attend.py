"""Cached attention for speed: masks made once per step for all layers, none where none is needed.

The same function as the op row's reference. Lowered targets use it; the reference target does not.
Keys that no query of a step may read, because they have left its window, are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch

from ..ir.graph import Program
from ..ir.ops.attention import allowed, attention
from ..ir.ops.heads import Before, joined, ready, scaled, sloped, turn_of
from .rows import Step

# Queries of a window that are attended at once: together they read what each of them may.
TOGETHER = 256


@dataclass(frozen=True)
class _Part:
    """What some queries of a step need, for one window: ``mask`` bool [B, 1, S, R] or None.

    ``rows`` are the queries. ``dead`` marks those that may read nothing; ``causal`` says that a
    plain triangle will do. ``read`` are the R keys that some query may read: a run of them, their
    indices, or None for all.
    """

    rows: slice
    mask: torch.Tensor | None
    dead: torch.Tensor | None
    causal: bool
    read: slice | torch.Tensor | None = None

    def __call__(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """[B, H, S, D] of all queries -> [B, H, rows, E] of these."""
        out = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, self.rows], self._of(keys), self._of(values), attn_mask=self.mask,
            is_causal=self.causal, scale=scale, enable_gqa=q.shape[1] != keys.shape[1],
        )  # fmt: skip
        return out if self.dead is None else out.masked_fill(self.dead, 0.0)

    def _of(self, kept: torch.Tensor) -> torch.Tensor:
        """The keys or values [B, KV, T, D] that are read, [B, KV, R, D]."""
        if self.read is None:
            return kept
        if isinstance(self.read, slice):
            return kept[:, :, self.read]
        return kept.index_select(2, self.read)


@dataclass(frozen=True)
class _Mask:
    """One window's parts in one step: ``given`` are the arguments that they were made from."""

    step: Step | None
    given: tuple[Any, ...]
    parts: tuple[_Part, ...]


class Attend:
    """The callable for every cached attention of one program; layers share the masks of a step."""

    def __init__(self) -> None:
        self._masks: dict[tuple[int | None, int, int], _Mask] = {}

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_pos: torch.Tensor,
        k_valid: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        k_cos: torch.Tensor | None = None,
        k_sin: torch.Tensor | None = None,
        k_up: torch.Tensor | None = None,
        k_up_bias: torch.Tensor | None = None,
        q_gain: torch.Tensor | None = None,
        k_gain: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
        k_last: torch.Tensor | None = None,
        q_scale: torch.Tensor | None = None,
        *,
        scale: float,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        dilation: int = 1,
        first: int = 0,
        state: Any,
        **before: Unpack[Before],
    ) -> torch.Tensor:
        """See ``llmc.cached_attention``: q [B, H, S, D], k and v [B, KV, S, D] -> [B, S, H, D]."""
        k = joined(k, k_last)
        q, k = (ready(x, g, k_cos, k_sin, **before) for x, g in ((q, q_gain), (k, k_gain)))
        q = scaled(q, q_scale)
        turn = turn_of(k_cos, k_sin, before)
        how: dict[str, Any] = {} if turn is None else {"turn": turn}
        if k_up is not None:
            how["up"] = (k_up, k_up_bias)
        keys, values, k_pos, valid = state.append(k, v, q_pos, k_valid, **how)
        bias = bias if slopes is None else sloped(slopes, q_pos, k_pos)
        if softcap is not None or sinks is not None or bias is not None or not causal:
            return attention(
                q, keys, values, q_pos, k_pos, valid, bias, sinks,
                scale=scale, causal=causal, window=window, softcap=softcap, dilation=dilation,
                first=first,
            )  # fmt: skip
        given, pattern = (q_pos, k_valid), (window, dilation, first)
        made = self._masks.get(pattern)
        # All layers of a step hold the same tokens, so they share one mask.
        step = state.step
        if step is None or made is None or made.step is not step or not _same(made.given, given):
            made = self._masks[pattern] = _make(step, given, k_pos, valid, *pattern)
        done = [part(q, keys, values, scale) for part in made.parts]
        return (done[0] if len(done) == 1 else torch.cat(done, 2)).transpose(1, 2)


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(x is y for x, y in zip(a, b, strict=True))


def _make(
    step: Step | None,
    given: tuple[torch.Tensor, torch.Tensor | None],
    k_pos: torch.Tensor,
    valid: torch.Tensor | None,
    window: int | None,
    dilation: int,
    first: int,
) -> _Mask:
    q_pos, most = given[0], TOGETHER if window is not None else given[0].shape[1]
    parts = []
    for start in range(0, q_pos.shape[1], most):
        rows = slice(start, start + most)
        ok = allowed(q_pos[:, rows], k_pos, valid, True, window, dilation, first)
        parts.append(_part(rows, ok, window is not None))
    return _Mask(step, given, tuple(parts))


def _part(rows: slice, ok: torch.Tensor, windowed: bool) -> _Part:
    # The tests wait for the device, but once per step, not once per layer.
    read = _readable(ok) if windowed else None
    if read is not None:
        ok = ok[..., read]
    if bool(ok.all()):
        return _Part(rows, None, None, False, read)
    square = ok.shape[-2] == ok.shape[-1]
    if square and bool((ok == torch.ones_like(ok[:1]).tril()).all()):
        return _Part(rows, None, None, True, read)
    dead = ~ok.any(-1, keepdim=True)
    return _Part(rows, ok | dead, dead if bool(dead.any()) else None, False, read)


def _readable(ok: torch.Tensor) -> slice | torch.Tensor | None:
    """The keys that some query may read, of a mask [B, 1, S, T]; None where that spares little."""
    found = ok.any(2).any(0)[0].nonzero()[:, 0]
    total, count = ok.shape[-1], len(found)
    if not count or count == total:
        return None
    start, stop = int(found[0]), int(found[-1]) + 1
    if 2 * count <= stop - start:
        # Scattered keys are copied, which pays where most between them are not read.
        return found
    return slice(start, stop) if stop - start < total else None


def attention_implementations(program: Program) -> dict[str, Callable[..., Any]]:
    """One shared callable for all cached attention, by node name, for a ``Runner``."""
    shared = Attend()
    return {node.name: shared for node in program.calls("llmc.cached_attention")}
