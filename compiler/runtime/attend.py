"""Cached attention for speed: masks made once per step for all layers, none where none is needed.

The same function as the op row's reference. Lowered targets use it; the reference target does not.
Keys that no query of a step may read, because they have left its window, are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.graph import Program
from ..ir.ops.attention import allowed, attention
from .cache import Step


@dataclass
class _Mask:
    """What one step's attention needs, for one window: ``mask`` bool [B, 1, S, R] or None.

    ``step`` is the step that it was made in, ``given`` the arguments that it was made from.

    ``dead`` marks queries that may read nothing; ``causal`` says that a plain triangle will do.
    ``read`` are the R keys that somebody may read: a run of them, their indices, or None for all.
    """

    step: Step | None
    given: tuple[Any, ...]
    mask: torch.Tensor | None
    dead: torch.Tensor | None
    causal: bool
    read: slice | torch.Tensor | None = None

    def of(self, kept: torch.Tensor) -> torch.Tensor:
        """The keys or values [B, KV, T, D] that are read, [B, KV, R, D]."""
        if self.read is None:
            return kept
        if isinstance(self.read, slice):
            return kept[:, :, self.read]
        return kept.index_select(2, self.read)


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
        *,
        scale: float,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        dilation: int = 1,
        first: int = 0,
        interleaved: bool = False,
        state: Any,
    ) -> torch.Tensor:
        """See ``llmc.cached_attention``: q [B, H, S, D], k and v [B, KV, S, D] -> [B, S, H, D]."""
        how: dict[str, Any] = {} if k_cos is None else {"turn": (k_cos, k_sin, interleaved)}
        if k_up is not None:
            how["up"] = (k_up, k_up_bias)
        keys, values, k_pos, valid = state.append(k, v, q_pos, k_valid, **how)
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
        out = torch.nn.functional.scaled_dot_product_attention(
            q, made.of(keys), made.of(values), attn_mask=made.mask, is_causal=made.causal,
            scale=scale, enable_gqa=q.shape[1] != keys.shape[1],
        )  # fmt: skip
        if made.dead is not None:
            out = out.masked_fill(made.dead, 0.0)
        return out.transpose(1, 2)


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
    ok = allowed(given[0], k_pos, valid, True, window, dilation, first)
    # The tests wait for the device, but once per step, not once per layer.
    read = None if window is None else _readable(ok)
    if read is not None:
        ok = ok[..., read]
    if bool(ok.all()):
        return _Mask(step, given, None, None, False, read)
    if (
        read is None
        and ok.shape[-2] == ok.shape[-1]
        and bool((ok == torch.ones_like(ok[:1]).tril()).all())
    ):
        return _Mask(step, given, None, None, True)
    dead = ~ok.any(-1, keepdim=True)
    return _Mask(step, given, ok | dead, dead if bool(dead.any()) else None, False, read)


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
