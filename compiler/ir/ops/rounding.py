"""The row of input grids: what a linear reads, rounded to few bits and back, in one step.

Sources: LLM.int8 (arXiv 2208.07339) for absmax scales per token, SmoothQuant (arXiv 2211.10438) for
scales per tensor, ZeroQuant (arXiv 2206.01861) for groups, ZeroQuant-FP (arXiv 2307.09782) for
small floats and scales that are powers of two, OliVe (arXiv 2304.07493) for outlier-victim pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dims import numel, same
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, llmc_op
from .compressed import groups_of
from .pairs import USUAL, round_pairs

FLOATS = {"e2m1": (4, 2, 1), "e4m3": (8, 4, 3), "e5m2": (8, 5, 2)}
"""Bits, exponent bits and mantissa bits of the small floats."""
_TOPS = {"e2m1": 6.0, "e4m3": 448.0, "e5m2": 57344.0}
KINDS = ("int", *FLOATS, "pairs")
SCALES = ("token", "tensor", "static")
"""One scale per token, per call, or stored."""


def grid_top(kind: str, bits: int) -> float:
    """The largest value of the grid in units of its scale; of pairs, the largest usual one.

    Raises:
        ModelError: a kind that cannot have so many bits.
    """
    if kind in FLOATS and bits == FLOATS[kind][0]:
        return _TOPS[kind]
    if (kind == "int" and 2 <= bits <= 8) or (kind == "pairs" and bits in (4, 8)):
        return float((1 << (bits - 1)) - 1)
    raise ModelError(f"expected an input grid of {', '.join(KINDS)}, found {kind!r} of {bits} bits")


def round_float(x: Tensor, kind: str) -> Tensor:
    """The nearest value of a small float, ties to even, ends saturated; exact in any wide dtype."""
    _, exponent, mantissa = FLOATS[kind]
    lowest = 2 - (1 << (exponent - 1))
    power = torch.frexp(x.detach()).exponent - 1
    step = torch.ldexp(torch.ones_like(x), power.clamp(min=lowest) - mantissa)
    return (torch.round(x / step) * step).clamp(-_TOPS[kind], _TOPS[kind])


def snap(x: Tensor, kind: str, bits: int) -> Tensor:
    """Values in units of the scale to the grid, half a step to even."""
    if kind == "int":
        top = grid_top(kind, bits)
        return x.round().clamp(-top, top)
    return round_pairs(x, bits) if kind == "pairs" else round_float(x, kind)


def scale_of(size: Tensor, kind: str, bits: int, power: bool) -> Tensor:
    """The scale with which ``size`` meets the end of the grid; 1 where there is nothing to scale.

    power: the next power of two that is not below.
    """
    scale = size / grid_top(kind, bits)
    if power:
        mantissa, exponent = torch.frexp(scale.detach())
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return torch.where((scale > 0) & (size > 0), scale, torch.ones_like(scale))


def _fold(x: Tensor, group: int) -> Tensor:
    """[..., n] -> [..., G, group], zeros behind a last group that is shorter."""
    width = group or x.shape[-1]
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))


def _dynamic(x: Tensor, kind: str, bits: int, per: str, power: bool) -> Tensor:
    """Scales [..., G, 1] of x [..., G, g], or [G, 1] for all tokens, by max |x|.

    Pairs take the reach of usual values instead where that costs less: they never lose to integers.
    """

    def over_tokens(part: Tensor, by: str) -> Tensor:
        if per != "tensor":
            return part
        part = part.reshape(-1, part.shape[-1])
        return part.amax(0) if by == "max" else part.sum(0)

    top = over_tokens(x.abs().amax(-1), "max")
    unit = scale_of(top, kind, bits, power).unsqueeze(-1)
    if kind != "pairs":
        return unit
    mean = over_tokens(x.abs().sum(-1), "sum") / (x.numel() // max(1, top.numel()))
    size = torch.minimum(top, USUAL * mean)
    short = scale_of(size, kind, bits, power).unsqueeze(-1)
    lost = [
        over_tokens((snap(x / u, kind, bits) * u - x).square().sum(-1), "sum").unsqueeze(-1)
        for u in (unit, short)
    ]
    return torch.where(lost[1] < lost[0], short, unit)


def round_input(
    x: Tensor, scale: Tensor | None = None, columns: Tensor | None = None, *, kind: str, bits: int,
    per: str, group: int = 0, power: bool = False, limit: float = 0.0,
) -> Tensor:  # fmt: skip
    """x on a grid: the nearest code times the scale. A new tensor; x is never changed.

    Args:
        x: [..., n]. scale: [G], where ``per`` is static; G groups of ``group`` channels, 0 = all.
        columns: int [c], channels that are 0 in the result: something else carries them.
        kind, bits: int is symmetric, from -(2**(bits-1) - 1); floats are e2m1, e4m3 and e5m2;
            pairs are `round_pairs`.
        per: token, one scale for each; tensor, one for all tokens of the call; or static.
        limit: where positive, a token that holds a larger magnitude outside of ``columns`` than was
            seen in calibration is not rounded.
    """
    if not x.numel():
        return x.clone()
    wide = x.to(torch.promote_types(torch.float32, x.dtype))
    if columns is not None:
        wide = wide.index_fill(-1, columns.long(), 0.0)
    folded = _fold(wide, group)
    if scale is None:
        unit = _dynamic(folded, kind, bits, per, power)
    else:
        unit = scale.to(wide.dtype).unsqueeze(-1)
    out = (snap(folded / unit, kind, bits) * unit).flatten(-2)[..., : x.shape[-1]]
    if limit > 0:
        out = torch.where((wide.abs() > limit).any(-1, keepdim=True), wide, out)
    return out.to(x.dtype)


def _type(
    x: TensorType, scale: TensorType | None = None, columns: TensorType | None = None, *, kind: str,
    bits: int, per: str, group: int = 0, power: bool = False, limit: float = 0.0,
) -> TensorType:  # fmt: skip
    grid_top(kind, bits)
    width = x.shape[-1] if x.rank else None
    if not isinstance(width, int) or not x.dtype.is_floating_point:
        raise ModelError(f"expected floats […, n] to round, found {x}")
    if per not in SCALES or (per == "static") != (scale is not None):
        raise ModelError(f"expected per token or tensor, or static and a scale, found {per!r}")
    if group < 0 or group > width or not limit >= 0:
        raise ModelError(f"expected group 0..{width} and limit >= 0, found {group}, {limit}")
    groups = groups_of(width, group or width) if width else 0
    if kind == "pairs" and (width % 2 or group % 2):
        raise ModelError(f"expected an even width and group for pairs, found {width}, {group}")
    if scale is not None and not (scale.rank == 1 and same(scale.shape[0], groups)):
        raise ModelError(f"expected scale [{groups}] for {width} channels, found {scale}")
    if columns is not None and (columns.rank != 1 or columns.dtype.is_floating_point):
        raise ModelError(f"expected columns int[c], found {columns}")
    return x


def _ties(
    out: TensorType, x: TensorType, scale: Any = None, columns: Any = None, **attrs: Any
) -> list[Tie]:
    last, per = out.rank - 1, attrs["per"]
    whole = per == "tensor"
    ties = [Tie("mix" if whole else "same", ((0, a),), (a,)) for a in range(last)]
    alone = per == "static" and columns is None and not attrs.get("group") and not whole
    alone = alone and attrs["kind"] != "pairs" and not attrs.get("limit")
    ties.append(Tie("same" if alone else "mix", ((0, last),), (last,)))
    return ties + [Tie("mix", ((i, 0),)) for i, t in ((1, scale), (2, columns)) if t is not None]


def _samples() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 6, generator=g, dtype=torch.float64)
    scale = torch.rand(1, generator=g, dtype=torch.float64) + 0.5
    scales = torch.rand(2, generator=g, dtype=torch.float64) + 0.5
    columns = torch.tensor([1, 4])
    eight = {"kind": "int", "bits": 8}
    return [
        ((x,), eight | {"per": "token"}),
        ((x,), eight | {"per": "tensor"}),
        ((x,), {"kind": "int", "bits": 4, "per": "token", "group": 4}),
        ((x, scale), {"kind": "int", "bits": 3, "per": "static"}),
        ((x, scales), {"kind": "e4m3", "bits": 8, "per": "static", "group": 4}),
        ((x,), {"kind": "e5m2", "bits": 8, "per": "token"}),
        ((x,), {"kind": "e2m1", "bits": 4, "per": "token", "power": True}),
        ((x,), {"kind": "pairs", "bits": 4, "per": "token"}),
        ((x, None, columns), eight | {"per": "token", "limit": 1.0}),
    ]  # fmt: skip


llmc_op(
    "round_input",
    "(Tensor x, Tensor? scale=None, Tensor? columns=None, *, str kind, int bits, str per, "
    "int group=0, bool power=False, float limit=0.0) -> Tensor",
    _type,
    round_input,
    ties=_ties,
    flops=lambda out, *t, **a: 4 * numel(out.shape),
    samples=_samples,
)
