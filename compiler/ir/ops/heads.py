"""What cached attention does to the heads of queries and keys first: norms and rotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch

from ..dims import same
from ..errors import ModelError
from ..types import TensorType
from .base import Tie
from .semantic import rms_norm, rope

# Of each head, of all heads of a token, and of each head behind its rotation.
NORMS = ("", "head", "row", "behind")
# Places of the gains of queries and of keys among the arguments of ``llmc.cached_attention``.
GAINS = (11, 12)
# Place of the slopes of a bias by distance.
SLOPES = 13
# Place of the last channels of keys, which all heads share.
K_LAST = 14
# Place of what queries are multiplied by, a number each.
Q_SCALE = 15


class Before(TypedDict, total=False):
    """Attributes of ``llmc.cached_attention`` that say what is done first."""

    interleaved: bool
    rotate: bool
    last: bool
    woven: bool
    norm: str
    eps: float
    offset: float


def ready(
    x: torch.Tensor, gain: torch.Tensor | None, cos: torch.Tensor | None,
    sin: torch.Tensor | None, *, interleaved: bool = False, rotate: bool = False, norm: str = "",
    eps: float = 0.0, offset: float = 0.0, last: bool = False, woven: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Queries or keys x [B, H, S, D] as they are read: normed where asked, then rotated.

    A norm "behind" comes after the rotation. What is first gives x's dtype before the other, as
    where the two are calls of their own.

    Raises:
        ModelError: an unknown norm; ``rotate`` without cosines.
    """
    if norm not in NORMS:
        raise ModelError(f"expected a norm of {', '.join(map(repr, NORMS))}, found {norm!r}")
    if norm == "head":
        x = rms_norm(x, gain, eps=eps, offset=offset)
    elif norm == "row":
        row = rms_norm(x.transpose(1, 2).flatten(2), gain, eps=eps, offset=offset)
        x = row.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)
    x = rotated(x, cos, sin, interleaved, last=last, woven=woven) if rotate else x
    return rms_norm(x, gain, eps=eps, offset=offset) if norm == "behind" else x


def scaled(q: torch.Tensor, by: torch.Tensor | None) -> torch.Tensor:
    """Queries [B, H, S, D] times a number each, [B, 1, S, 1], in their own dtype."""
    return q if by is None else (q * by).to(q.dtype)


def joined(k: torch.Tensor, k_last: torch.Tensor | None) -> torch.Tensor:
    """Keys [B, KV, S, D] of their own channels and the last ones [B, 1, S, R] of all heads."""
    return k if k_last is None else torch.cat([k, k_last.expand(-1, k.shape[1], -1, -1)], -1)


def rotated(
    x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, interleaved: bool,
    *, last: bool = False, woven: bool = False,
) -> torch.Tensor:  # fmt: skip
    """``llmc.rope`` of the first R channels of x [B, H, S, D], or the last; cos, sin [B, 1, S, R].

    ``woven``: those of a pair lie side by side in x, and are taken apart first.

    Raises:
        ModelError: no cosines.
    """
    if cos is None or sin is None:
        raise ModelError("expected cosines and sines of what is to be rotated, found none")
    width = cos.shape[-1]
    if last:
        stay, part = x[..., : x.shape[-1] - width], x[..., x.shape[-1] - width :]
        if woven:
            part = torch.cat([part[..., ::2], part[..., 1::2]], -1)
        return torch.cat([stay, rope(part, cos, sin, interleaved=interleaved)], -1)
    turned = rope(x[..., :width], cos, sin, interleaved=interleaved)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


def sloped(
    slopes: torch.Tensor | None, q_pos: torch.Tensor, k_pos: torch.Tensor
) -> torch.Tensor | None:
    """The bias [B, H, S, T] of slopes [H]: of how far each key is ahead of its query.

    q_pos [B, S] and k_pos [B, T] are integers; fp32, or fp64 where the slopes are.
    """
    if slopes is None:
        return None
    wide = slopes if slopes.dtype == torch.float64 else slopes.float()
    ahead = (k_pos[:, None, :] - q_pos[:, :, None]).to(wide.dtype)
    return wide[:, None, None] * ahead[:, None]


def turn_of(
    cos: torch.Tensor | None, sin: torch.Tensor | None, before: Before
) -> tuple[torch.Tensor, torch.Tensor, bool] | None:
    """What a state is told that rotates its keys when they are read; None where nothing does."""
    if cos is None or sin is None or before.get("rotate", False):
        return None
    return cos, sin, before.get("interleaved", False)


def check_norm(heads: Sequence[TensorType], gains: Sequence[TensorType | None], norm: str) -> None:
    """Raises ModelError unless gains fit the norm of queries and keys [B, H, S, D]."""
    if norm not in NORMS:
        raise ModelError(f"expected a norm of {', '.join(map(repr, NORMS))}, found {norm!r}")
    for x, gain, name in zip(heads, gains, ("queries", "keys"), strict=True):
        if gain is None:
            continue
        if not norm:
            raise ModelError(f"expected a norm beside gains of {name}, found {gain} alone")
        width = x.shape[1] * x.shape[3] if norm == "row" else x.shape[3]
        if gain.rank != 1 or not same(gain.shape[0], width):
            raise ModelError(f"expected gains [{width}] of {name}, found {gain}")


def check_last(
    k: TensorType, k_last: TensorType | None, cos: TensorType | None, **attrs: Any
) -> TensorType:
    """Keys [B, KV, S, D] of both parts; ModelError unless the last channels are all rotated."""
    if (k_last is None) == bool(attrs.get("last", False)):
        raise ModelError("expected the last channels of keys where these are rotated, not else")
    if k_last is None:
        if attrs.get("woven"):
            raise ModelError("expected woven channels to be the last ones, found others")
        return k
    if attrs.get("norm") or not attrs.get("rotate") or cos is None:
        raise ModelError("expected last channels that are rotated, and no norm")
    fits = k_last.rank == cos.rank == k.rank == 4 and same(k_last.shape[1], 1)
    if not fits or not same(k_last.shape[3], cos.shape[3]) or not same(k_last.shape[2], k.shape[2]):
        raise ModelError(f"expected last channels [B, 1, S, R] of {cos}, found {k_last}")
    return k.with_shape(*k.shape[:3], k.shape[3] + k_last.shape[3])


def norm_ties(norm: str, gains: Sequence[TensorType | None]) -> list[Tie]:
    """Ties that norms of queries and keys add to those of their attention.

    A call of its own can have its divisor kept when a channel is cut; here none may be.
    """
    if not norm:
        return []
    axes = [(0, 3), (1, 3), *(((0, 1), (1, 1)) if norm == "row" else ())]
    given = [(at, 0) for at, gain in zip(GAINS, gains, strict=True) if gain is not None]
    return [Tie("mix", (axis,)) for axis in (*axes, *given)]
