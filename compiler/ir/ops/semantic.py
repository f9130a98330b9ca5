"""Rows of the semantic ops that normalising lifts out of aten clusters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..dims import Dim, numel, same
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, llmc_op
from .resize import counted


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(torch.float32, x.dtype))


def _norm_type(
    x: TensorType, gain: TensorType | None = None, bias: TensorType | None = None, **attrs: Any
) -> TensorType:
    for part, name in ((gain, "gain"), (bias, "bias")):
        if part is not None and not (part.rank == 1 and same(part.shape[0], x.shape[-1])):
            raise ModelError(f"expected {name} [{x.shape[-1]}], found {part}")
    return x


def _norm_ties(
    out: TensorType,
    x: TensorType,
    gain: TensorType | None = None,
    bias: TensorType | None = None,
    **attrs: Any,
) -> list[Tie]:
    last = out.rank - 1
    ties = [Tie("same", ((0, a),), (a,)) for a in range(last)]
    parts = (
        [(0, last)]
        + ([(1, 0)] if gain is not None else [])
        + ([(2, 0)] if bias is not None else [])
    )
    return [*ties, Tie("same", tuple(parts), (last,)), Tie("norm", ((0, last),))]


def rms_norm(
    x: torch.Tensor, gain: torch.Tensor | None = None, *, eps: float, offset: float = 0.0,
    count: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """x / sqrt(Σx²/count + eps) · (offset + gain).

    Args:
        x: [..., H]; gain: [H] or None.
        offset: 0 for a plain gain, 1 for the Gemma form 1 + g.
        count: the divisor; default H. A sliced norm keeps the old count and so equals a masked one.
    """
    h = _wide(x)
    h = h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / (count or x.shape[-1]) + eps)
    if gain is not None:
        h = h * (gain.to(h.dtype) + offset if offset else gain.to(h.dtype))
    return h.to(x.dtype)


def layer_norm(
    x: torch.Tensor, gain: torch.Tensor | None = None, bias: torch.Tensor | None = None, *,
    eps: float, count: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """(x - mean) / sqrt(var + eps) · gain + bias over the last axis; divisor ``count``, default H.

    With ``count`` above H the missing entries are zeros, so a sliced norm equals a masked one.
    """
    h, n = _wide(x), count or x.shape[-1]
    mean = h.sum(-1, keepdim=True) / n
    centred = h - mean
    missing = n - x.shape[-1]
    var = (centred.pow(2).sum(-1, keepdim=True) + missing * mean.pow(2)) / n
    h = centred * torch.rsqrt(var + eps)
    if gain is not None:
        h = h * gain.to(h.dtype)
    if bias is not None:
        h = h + bias.to(h.dtype)
    return h.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(a, b) -> (-b, a), a and b the halves of the last axis."""
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    """(a, b) -> (-b, a), a and b the even and the odd entries of the last axis, in their places."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """x·cos + rotate_half(x)·sin.

    Args:
        x: [B, H, S, D]; cos, sin: broadcast to x, e.g. [B, 1, S, D]; channel i pairs with i + D/2.
        interleaved: channel 2i pairs with 2i + 1 instead.
    """
    turned = rotate_pairs(x) if interleaved else rotate_half(x)
    return (x * cos + turned * sin).to(x.dtype)


def _rope_type(
    x: TensorType, cos: TensorType, sin: TensorType, *, interleaved: bool = False
) -> TensorType:
    for part in (cos, sin):
        if part.rank > x.rank or not same(part.shape[-1], x.shape[-1]):
            raise ModelError(f"expected cos and sin […, {x.shape[-1]}], found {part}")
    return x


def _rope_ties(
    out: TensorType, x: TensorType, cos: TensorType, sin: TensorType, *, interleaved: bool = False
) -> list[Tie]:
    last = out.rank - 1
    ties = []
    for a in range(last):
        ins = [(0, a)]
        for i, part in ((1, cos), (2, sin)):
            b = a - (out.rank - part.rank)
            if b >= 0 and same(part.shape[b], x.shape[a]):
                ins.append((i, b))
        ties.append(Tie("same", tuple(ins), (a,)))
    channels = ((0, last), (1, cos.rank - 1), (2, sin.rank - 1))
    return [*ties, Tie("pair", channels, (last,), factor=2 if interleaved else 1)]


_ACTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "relu2": lambda x: torch.nn.functional.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def activation(x: torch.Tensor, *, act: str) -> torch.Tensor:
    """One of the named activations, element by element."""
    return _ACTS[act](x)


def gated(gate: torch.Tensor, up: torch.Tensor, *, act: str) -> torch.Tensor:
    """act(gate) · up, both [..., I]; linear in ``up``, channel by channel."""
    return _ACTS[act](gate) * up


def _act_type(x: TensorType, up: TensorType | None = None, *, act: str) -> TensorType:
    if act not in _ACTS:
        raise ModelError(f"expected an activation of {sorted(_ACTS)}, found {act!r}")
    if up is not None and up.shape != x.shape:
        raise ModelError(f"expected gate and up of one shape, found {x} and {up}")
    return x


def experts(
    x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor,
    down: torch.Tensor, left: torch.Tensor | None = None, right: torch.Tensor | None = None, *,
    act: str, seen: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Σ_k weight[t, k] · down_e(right(act(gate_e x) · up_e x)), e = index[t, k].

    Args:
        x: [T, H]; index: int [T, k]; weight: [T, k].
        gate_up: [E, 2I, H], gate rows first; down: [E, O, I], mostly O = H.
        left: [2I, r], what all experts multiply gate_up [E, r, H] by from the left; right: [s, I],
            what all read through before down [E, O, s]; None: nothing is shared.
        seen: called with each expert that is chosen, what it reads and what its down reads.
    """
    linear = torch.nn.functional.linear
    out = x.new_zeros(x.shape[0], down.shape[1])
    for e in index.unique().tolist():
        token, slot = torch.where(index == e)
        both = linear(x[token], gate_up[e])
        gate, up = (both if left is None else linear(both, left)).chunk(2, -1)
        inner = _ACTS[act](gate) * up
        inner = inner if right is None else linear(inner, right)
        if seen is not None:
            seen(e, x[token], inner)
        y = linear(inner, down[e])
        out = out.index_add(0, token, y * weight[token, slot].to(y.dtype).unsqueeze(-1))
    return out


def _experts_type(
    x: TensorType, index: TensorType, weight: TensorType, gate_up: TensorType, down: TensorType,
    left: TensorType | None = None, right: TensorType | None = None, *, act: str,
) -> TensorType:  # fmt: skip
    if x.rank != 2 or gate_up.rank != 3 or down.rank != 3:
        raise ModelError(
            f"expected x[T, H] and expert weights of rank 3, found {x}, {gate_up}, {down}"
        )
    if not (same(gate_up.shape[2], x.shape[1]) and same(gate_up.shape[0], down.shape[0])):
        raise ModelError(f"expected expert weights that fit {x}, found {gate_up}, {down}")
    rows, columns = gate_up.shape[1], down.shape[2]
    if left is not None:
        if left.rank != 2 or not same(left.shape[1], rows):
            raise ModelError(f"expected a left factor [2I, {rows}], found {left}")
        rows = left.shape[0]
    if right is not None:
        if right.rank != 2 or not same(right.shape[0], columns):
            raise ModelError(f"expected a right factor [{columns}, I], found {right}")
        columns = right.shape[1]
    if not same(rows, 2 * columns):
        raise ModelError(f"expected gate and up with 2·{columns} rows together, found {rows}")
    _act_type(x, act=act)
    return x.with_shape(x.shape[0], down.shape[1])


def _experts_ties(out: TensorType, *types: Any, **attrs: Any) -> list[Tie]:
    left, right = (*types[5:], None, None)[:2]
    ties = [
        Tie("same", ((0, 0), (1, 0), (2, 0)), (0,)),
        Tie("contract", ((0, 1), (3, 2))),
        Tie("same", ((4, 1),), (1,)),
        Tie("same", ((3, 0), (4, 0))),
        Tie("pick", ((3, 0),), offset=1),
        Tie("mix", ((1, 1), (2, 1))),
    ]
    if left is None and right is None:
        return [*ties, Tie("twice", ((4, 2), (3, 1)))]
    shared = [(i, a) for i, t in ((5, left), (6, right)) if t is not None for a in (0, 1)]
    return [*ties, Tie("mix", ((3, 1), (4, 2), *shared))]


def _experts_flops(
    out: TensorType, x: TensorType, index: TensorType, w: Any, gate_up: TensorType,
    down: TensorType, *shared: TensorType | None, **a: Any,
) -> Dim:  # fmt: skip
    one = numel(gate_up.shape[1:]) + numel(down.shape[1:])
    per_pair = 2 * (one + sum(numel(t.shape) for t in shared if t is not None))
    return numel(index.shape) * per_pair


def _randn(*shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _elementwise_ties(out: TensorType, *types: Any, **attrs: Any) -> list[Tie]:
    n = sum(isinstance(t, TensorType) for t in types)
    return [Tie("same", tuple((i, a) for i in range(n)), (a,)) for a in range(out.rank)]


llmc_op(
    "rms_norm",
    "(Tensor x, Tensor? gain=None, *, float eps, float offset=0.0, int? count=None) -> Tensor",
    _norm_type,
    rms_norm,
    ties=_norm_ties,
    flops=lambda out, *t, **a: 4 * numel(out.shape),
    resize=counted,
    samples=lambda: [
        ((_randn(2, 5), _randn(5)), {"eps": 1e-5}),
        ((_randn(2, 5), _randn(5)), {"eps": 1e-5, "offset": 1.0, "count": 7}),
        ((_randn(2, 5),), {"eps": 1e-5}),
    ],
)
llmc_op(
    "layer_norm",
    "(Tensor x, Tensor? gain=None, Tensor? bias=None, *, float eps, int? count=None) -> Tensor",
    _norm_type,
    layer_norm,
    ties=_norm_ties,
    flops=lambda out, *t, **a: 7 * numel(out.shape),
    resize=counted,
    samples=lambda: [
        ((_randn(2, 5), _randn(5), _randn(5)), {"eps": 1e-5}),
        ((_randn(2, 5), None, None), {"eps": 1e-5, "count": 7}),
    ],
)
llmc_op(
    "rope",
    "(Tensor x, Tensor cos, Tensor sin, *, bool interleaved=False) -> Tensor",
    _rope_type,
    rope,
    ties=_rope_ties,
    flops=lambda out, *t, **a: 3 * numel(out.shape),
    samples=lambda: [
        ((_randn(2, 2, 3, 4), _randn(2, 1, 3, 4), _randn(2, 1, 3, 4)), attrs)
        for attrs in ({}, {"interleaved": True})
    ],
)
llmc_op(
    "activation",
    "(Tensor x, *, str act) -> Tensor",
    _act_type,
    activation,
    ties=_elementwise_ties,
    flops=lambda out, *t, **a: 4 * numel(out.shape),
    samples=lambda: [((_randn(2, 5),), {"act": act}) for act in _ACTS],
)
llmc_op(
    "gated",
    "(Tensor gate, Tensor up, *, str act) -> Tensor",
    _act_type,
    gated,
    ties=_elementwise_ties,
    flops=lambda out, *t, **a: 5 * numel(out.shape),
    samples=lambda: [((_randn(2, 5), _randn(2, 5)), {"act": act}) for act in ("silu", "gelu_tanh")],
)
llmc_op(
    "experts",
    "(Tensor x, Tensor index, Tensor weight, Tensor gate_up, Tensor down, Tensor? left=None, "
    "Tensor? right=None, *, str act) -> Tensor",
    _experts_type,
    experts,
    ties=_experts_ties,
    flops=_experts_flops,
    samples=lambda: [
        (
            (_randn(3, 4), torch.tensor([[0, 1], [1, 2], [2, 0]]), _randn(3, 2), *weights),
            {"act": "silu"},
        )
        for weights in (
            (_randn(3, 6, 4), _randn(3, 4, 3)),
            (_randn(3, 2, 4), _randn(3, 5, 2), _randn(6, 2), _randn(2, 3)),
            (_randn(3, 6, 4), _randn(3, 4, 2), None, _randn(2, 3)),
        )
    ],
)
