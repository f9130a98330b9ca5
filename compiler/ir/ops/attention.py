"""Attention rows: the plain form that capture emits and the cached form of the KV rewrite."""

from __future__ import annotations

from typing import Any, Unpack

import torch

from ..dims import Dim, divide, numel, same
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, llmc_op
from .heads import (
    K_LAST,
    Q_SCALE,
    SLOPES,
    Before,
    check_last,
    check_norm,
    joined,
    norm_ties,
    ready,
    scaled,
    sloped,
    turn_of,
)

_SCHEMA_TAIL = (
    "float scale, bool causal=True, int? window=None, float? softcap=None, int dilation=1, "
    "int first=0"
)
# Largest window, dilation and number of first tokens; their products stay far inside of int64.
MOST = 1 << 30


def check_window(window: int | None = None, dilation: int = 1, first: int = 0, **rest: Any) -> None:
    """Raises ModelError unless these say which keys a query may read."""
    for name, value, least in (
        ("window", window, 1),
        ("dilation", dilation, 1),
        ("first", first, 0),
    ):
        if value is None and name == "window":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
            raise ModelError(f"expected {name} in {least}..{MOST}, found {value!r}")
    if window is None and (dilation != 1 or first):
        raise ModelError(
            f"expected dilation and first tokens beside a window, found {dilation} and {first}"
        )


def _infer(q: TensorType, k: TensorType, v: TensorType, *rest: Any, **attrs: Any) -> TensorType:
    """q [B, H, S, D], k [B, KV, T, D], v [B, KV, T, E] -> [B, S, H, E]; KV divides H."""
    check_window(**attrs)
    if not (q.rank == k.rank == v.rank == 4):
        raise ModelError(f"expected q, k, v of rank 4, found {q}, {k}, {v}")
    if not same(q.shape[3], k.shape[3]):
        raise ModelError(f"expected q and k of one head size, found {q} and {k}")
    if not (same(k.shape[1], v.shape[1]) and same(k.shape[2], v.shape[2])):
        raise ModelError(f"expected k and v of one length and head count, found {k} and {v}")
    if divide(q.shape[1], k.shape[1]) is None:
        raise ModelError(f"expected query heads divisible by key heads, found {q} and {k}")
    return q.with_shape(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def allowed(
    q_pos: torch.Tensor,
    k_pos: torch.Tensor,
    k_valid: torch.Tensor | None,
    causal: bool,
    window: int | None,
    dilation: int = 1,
    first: int = 0,
) -> torch.Tensor:
    """bool [B, 1, S, T]: which keys each query may read.

    A window of w lets a query at p read keys at p-w+1 … p (p+w-1 too when not causal); with a
    dilation d those at p, p-d, … p-(w-1)d. All may read the tokens at positions 0 … first-1, which
    may read all (that are not later than they are, when causal).
    Source: Longformer, arXiv 2004.05150 §3.1.
    """
    q, k = q_pos[:, None, :, None], k_pos[:, None, None, :]
    ok = torch.ones_like(q >= k) if not causal else q >= k
    if window is not None:
        near = q - k < window * dilation
        if not causal:
            near = near & (k - q < window * dilation)
        if dilation > 1:
            near = near & ((q - k) % dilation == 0)
        if first:
            near = near | (k < first) | (q < first)
        ok = ok & near
    if k_valid is not None:
        ok = ok & k_valid[:, None, None, :].bool()
    return ok


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_pos: torch.Tensor | None = None,
    k_pos: torch.Tensor | None = None,
    k_valid: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    dilation: int = 1,
    first: int = 0,
) -> torch.Tensor:
    """softmax(cap(q·kᵀ·scale) + bias, over allowed keys) · v; query heads share KV heads in groups.

    Args:
        q: [B, H, S, D]; k: [B, KV, T, D]; v: [B, KV, T, E], KV divides H.
        q_pos: int [B, S]; k_pos: int [B, T]; default: 0 … length-1.
        k_valid: bool [B, T], False for padding.
        bias: added to the scaled scores, broadcast to [B, H, S, T].
        sinks: [H], one extra logit per head that takes weight and gives nothing.
        causal, window, dilation, first: which keys are allowed, see :func:`allowed`.
    Returns:
        [B, S, H, E]; a query that may read no key gets zeros.
    """
    batch, heads, length, _ = q.shape
    groups = heads // k.shape[1]
    if q_pos is None:
        q_pos = torch.arange(length, device=q.device).expand(batch, length)
    if k_pos is None:
        k_pos = torch.arange(k.shape[2], device=q.device).expand(batch, k.shape[2])
    ok = allowed(q_pos, k_pos, k_valid, causal, window, dilation, first)
    if softcap is None and sinks is None:
        mask = ok if bias is None else torch.where(ok, bias.to(q.dtype), float("-inf"))
        dead = ~ok.any(-1, keepdim=True)
        mask = mask | dead if mask.dtype == torch.bool else mask.masked_fill(dead, 0.0)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=groups > 1
        )
        return out.masked_fill(dead, 0.0).transpose(1, 2)
    keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    scores = scores.to(wide).masked_fill(~ok, float("-inf"))
    if sinks is not None:
        sink = sinks.to(wide).view(1, -1, 1, 1).expand(batch, heads, length, 1)
        scores = torch.cat([scores, sink], -1)
    dead = torch.isneginf(scores).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    if sinks is not None:
        weights = weights[..., :-1]
    return (weights.to(q.dtype) @ values).transpose(1, 2)


def _ties(out: TensorType, q: TensorType, k: TensorType, v: TensorType, *rest: Any,
          **attrs: Any) -> list[Tie]:  # fmt: skip
    q_pos, k_pos, k_valid, bias, sinks = [*rest, None, None, None, None, None][:5]
    return [
        *_core_ties(q, k),
        *_token_ties(3, q_pos, 1),
        *_token_ties(4, k_pos, None),
        *_token_ties(5, k_valid, None),
        *_score_ties(6, out, bias),
        *([Tie("same", ((7, 0),), (2,))] if sinks is not None else []),
    ]


def _cached_infer(q: TensorType, k: TensorType, v: TensorType, *rest: Any,
                  **attrs: Any) -> TensorType:  # fmt: skip
    """As plain attention; with ``k_up`` [KV·D, R] the keys come as latents [B, 1, S, R]."""
    _, _, added, _, cos, sin, up, bias, *gains, slopes, last, by = [*rest, *[None] * 13][:13]
    if by is not None and not (by.rank == 4 and same(by.shape[1], 1) and same(by.shape[3], 1)):
        raise ModelError(f"expected numbers [B, 1, S, 1] that scale queries, found {by}")
    k = check_last(k, last, cos, **attrs)
    if slopes is not None and (added is not None or slopes.rank != 1):
        raise ModelError(f"expected slopes [H] and no bias beside them, found {slopes} and {added}")
    if slopes is not None and not same(slopes.shape[0], q.shape[1]):
        raise ModelError(f"expected slopes of {q.shape[1]} heads, found {slopes}")
    rotate = attrs.pop("rotate", False)
    if rotate and None in (cos, sin):
        raise ModelError("expected cosines and sines of what is to be rotated, found none")
    if attrs.get("norm") == "behind" and not rotate:
        raise ModelError("expected a rotation that a norm is behind, found none")
    if attrs.get("norm") and (up is not None or (cos is not None and not rotate)):
        raise ModelError("expected a norm of keys that are kept as they are read, found others")
    if up is not None:
        made = q.shape[3]
        if up.rank != 2 or k.rank != 4 or v.rank != 4 or q.rank != 4:
            raise ModelError(f"expected q, k, v of rank 4 and k_up of rank 2, found {up}")
        if not (same(k.shape[1], 1) and same(k.shape[3], up.shape[1])):
            raise ModelError(f"expected latents [B, 1, S, {up.shape[1]}] as keys, found {k}")
        if not same(v.shape[1] * made, up.shape[0]):
            raise ModelError(f"expected k_up with {v.shape[1]} heads of {made} rows, found {up}")
        if bias is not None and not (bias.rank == 1 and same(bias.shape[0], up.shape[0])):
            raise ModelError(f"expected a bias of {up.shape[0]}, found {bias}")
        k = k.with_shape(k.shape[0], v.shape[1], k.shape[2], made)
    elif bias is not None:
        raise ModelError(f"expected k_up beside its bias, found {bias} alone")
    out = _infer(q, k, v, *rest, **attrs)
    check_norm((q, k), gains, str(attrs.get("norm", "")))
    return out


def _cached_ties(out: TensorType, q: TensorType, k: TensorType, v: TensorType, *rest: Any,
                 **attrs: Any) -> list[Tie]:  # fmt: skip
    given = [*rest, *[None] * 13][:13]
    q_pos, k_valid, bias, sinks, turned, _, up, up_bias, *gains, slopes, last, by = given
    core = _core_ties(q, k if up is None else v)
    if up is not None:
        # What makes keys of latents mixes all their channels when they are read.
        core = [t for t in core if t.kind != "contract" and (1, 1) not in t.ins]
        core.append(Tie("contract", ((1, 3), (9, 1))))
        core.append(Tie("mix", ((9, 0), *([(10, 0)] if up_bias is not None else []))))
    elif turned is not None:
        # Channels of a key pair up when it is read: no channel may be moved or cut on its own.
        core = [t for t in core if t.kind != "contract"]
    if last is not None:
        core.append(Tie("mix", ((0, 3), (1, 3), (K_LAST, 2), (K_LAST, 3))))
        core.append(Tie("same", ((K_LAST, 0),), (0,)))
    return [
        *core,
        *_token_ties(3, q_pos, 1),
        *_token_ties(4, k_valid, None),
        *_score_ties(5, out, bias),
        *([Tie("same", ((6, 0),), (2,))] if sinks is not None else []),
        *([Tie("same", ((SLOPES, 0),), (2,))] if slopes is not None else []),
        *([Tie("same", ((Q_SCALE, 2),), (1,))] if by is not None else []),
        *norm_ties(str(attrs.get("norm", "")), gains),
    ]


def _core_ties(q: TensorType, k: TensorType) -> list[Tie]:
    repeat = divide(q.shape[1], k.shape[1]) or 1
    return [
        Tie("same", ((0, 0), (1, 0), (2, 0)), (0,)),
        Tie("same", ((0, 1),), (2,)),
        Tie("repeat", ((1, 1),), (2,), factor=repeat),
        Tie("repeat", ((2, 1),), (2,), factor=repeat),
        Tie("same", ((0, 2),), (1,)),
        Tie("mix", ((1, 2), (2, 2))),
        Tie("contract", ((0, 3), (1, 3))),
        Tie("same", ((2, 3),), (3,)),
    ]


def _token_ties(arg: int, part: TensorType | None, length: int | None) -> list[Tie]:
    """Ties of positions or validity [B, S] whose length is an axis of the result, or the keys'."""
    if part is None:
        return []
    along = Tie("mix", ((arg, 1),)) if length is None else Tie("same", ((arg, 1),), (length,))
    return [Tie("same", ((arg, 0),), (0,)), along]


def _score_ties(arg: int, out: TensorType, bias: TensorType | None) -> list[Tie]:
    """Ties of a bias that broadcasts to the scores [B, H, S, T]."""
    if bias is None:
        return []
    ties = [Tie("mix", ((arg, bias.rank - 1),))]
    for axis, place in enumerate((0, 2, 1)):
        at = axis - (4 - bias.rank)
        if at >= 0 and same(bias.shape[at], out.shape[place]):
            ties.append(Tie("same", ((arg, at),), (place,)))
    return ties


def _flops(
    out: TensorType, q: TensorType, k: TensorType, v: TensorType, *rest: Any, **attrs: Any
) -> Dim:
    return 2 * numel(q.shape) * k.shape[2] + 2 * numel(q.shape[:3]) * k.shape[2] * v.shape[3]


def _samples() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    g = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = make(2, 4, 3, 4), make(2, 2, 3, 4), make(2, 2, 3, 4)
    pos = torch.tensor([[0, 1, 2], [0, 0, 1]])
    valid = torch.tensor([[True, True, True], [False, True, True]])
    return [
        ((q, k, v), {"scale": 0.5}),
        ((q, k, v, pos, pos, valid), {"scale": 0.5, "window": 2}),
        ((q, k, v, pos, pos, valid), {"scale": 0.5, "softcap": 2.0}),
        ((q, k, v), {"scale": 0.5, "window": 1, "dilation": 2, "first": 1}),
        ((q, k, v, pos, pos, None, make(1, 4, 3, 3), make(4)), {"scale": 0.5, "causal": False}),
    ]


llmc_op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? q_pos=None, Tensor? k_pos=None, Tensor? k_valid=None, "
    f"Tensor? bias=None, Tensor? sinks=None, *, {_SCHEMA_TAIL}) -> Tensor",
    _infer,
    attention,
    ties=_ties,
    flops=_flops,
    samples=_samples,
)


def cached_attention(
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
    """Append k, v [B, KV, S, D] to ``state`` and attend to all that it holds.

    ``state.append(k, v, pos, valid)`` gives (keys, values, positions, valid) of all tokens so far.
    Tokens that have left a window are kept: the cache grows as without one.
    With k_cos and k_sin, broadcast to [B, 1, S, D], ``k`` comes before its rotation (``llmc.rope``,
    of that ``interleaved``): the state keeps it so and gives rotated keys. With ``rotate`` too,
    queries come before theirs as well, both are rotated first, and the state keeps rotated keys;
    cosines of R channels, fewer than D, leave the others as they are.
    With ``norm`` queries and keys are normed before that (``llmc.rms_norm`` of ``eps`` and
    ``offset``): "head" each head by itself, with gains [D], "row" all heads of a token together,
    with q_gain [H·D] and k_gain [KV·D]; "behind" each head as "head", but after its rotation.
    With k_up [KV·D, R] ``k`` is a latent [B, 1, S, R]: the state keeps it so, and keys are
    k_up · latent + k_up_bias when they are read.
    With slopes [H] a score has its head's slope times how far its key is ahead of its query added,
    behind the soft cap (ALiBi, arXiv 2108.12409 §3); then there is no ``bias``.
    With k_last [B, 1, S, R] keys have these channels behind their own D - R, the same for all
    heads, and with ``last`` the last R channels are rotated, ``woven`` ones taken apart first.
    With q_scale [B, 1, S, 1] queries are multiplied by it once they are normed and rotated.
    """
    if isinstance(state, str):
        raise ModelError(f"expected the executor to resolve state {state!r}, found a bare call")
    k = joined(k, k_last)
    q, k = (ready(x, g, k_cos, k_sin, **before) for x, g in ((q, q_gain), (k, k_gain)))
    q = scaled(q, q_scale)
    turn = turn_of(k_cos, k_sin, before)
    made: dict[str, Any] = {} if turn is None else {"turn": turn}
    if k_up is not None:
        made["up"] = (k_up, k_up_bias)
    keys, values, k_pos, valid = state.append(k, v, q_pos, k_valid, **made)
    bias = bias if slopes is None else sloped(slopes, q_pos, k_pos)
    return attention(
        q, keys, values, q_pos, k_pos, valid, bias, sinks,
        scale=scale, causal=causal, window=window, softcap=softcap, dilation=dilation, first=first,
    )  # fmt: skip


llmc_op(
    "cached_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor q_pos, Tensor? k_valid=None, Tensor? bias=None, "
    f"Tensor? sinks=None, Tensor? k_cos=None, Tensor? k_sin=None, Tensor? k_up=None, "
    f"Tensor? k_up_bias=None, Tensor? q_gain=None, Tensor? k_gain=None, "
    f"Tensor? slopes=None, Tensor? k_last=None, Tensor? q_scale=None, *, {_SCHEMA_TAIL}, "
    'bool interleaved=False, bool rotate=False, str norm="", float eps=0.0, float offset=0.0, '
    "bool last=False, bool woven=False, str state) -> Tensor",
    _cached_infer,
    cached_attention,
    ties=_cached_ties,
    flops=_flops,
    stateful=True,
)
