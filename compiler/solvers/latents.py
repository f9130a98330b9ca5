"""Narrower heads: the fewest channels that say most of what attention does with keys and values.

What a value head V [E, n] gives is seen through the output projection alone, and a key head K
through its queries alone. Both products are cut to their leading directions and parted again, so
the channels that stay are chosen by what is seen of them; with all channels nothing changes.

Source: Eckart and Young, Psychometrika 1 (1936), of the products; DeepSeek-V2 (arXiv 2405.04434)
for latents in the cache.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .heads import Heads


def narrow_values(heads: Heads, rank: int, root: Tensor) -> tuple[Heads, Tensor]:
    """Value heads of ``rank`` leading channels, the others zero; columns behind follow.

    Args:
        heads: fp64, see :class:`.heads.Heads`; root: [n + 1, n + 1], of what values are made of
            (see :func:`.heads.metric`).
    Returns:
        The heads, and fp64 [KV, 2]: squared error and squared norm of what each value head adds
        behind the output projection, all its query heads alike.
    """
    repeat, v, o = len(heads.q) // len(heads.k), heads.v.clone(), heads.o.clone()
    told = []
    for h in range(len(v)):
        mine = slice(h * repeat, (h + 1) * repeat)
        behind = heads.o[mine].transpose(1, 2).flatten(0, 1)  # [repeat · m, E]
        basis, triangle = torch.linalg.qr(behind)
        left, values, _ = torch.linalg.svd(triangle @ heads.v[h] @ root, full_matrices=False)
        kept = left[:, :rank]
        v[h] = 0
        v[h, : kept.shape[1]] = kept.t() @ triangle @ heads.v[h]
        o[mine] = 0
        new = (basis @ kept).unflatten(0, (repeat, -1)).transpose(1, 2)
        o[mine, : kept.shape[1]] = new
        told.append(_lost(values, rank))
    return replace(heads, v=v, o=o), torch.stack(told)


def narrow_keys(
    heads: Heads, rank: int, query_root: Tensor, key_root: Tensor
) -> tuple[Heads, Tensor]:  # fmt: skip
    """Key and query heads of ``rank`` leading channels of their scores, the others zero.

    Only for channels that no rotation pairs and no norm sees. Returns as :func:`narrow_values`, of
    the scores.
    """
    repeat, q, k = len(heads.q) // len(heads.k), heads.q.clone(), heads.k.clone()
    told = []
    for h in range(len(k)):
        mine = slice(h * repeat, (h + 1) * repeat)
        asks = _triangle((heads.q[mine] @ query_root).transpose(0, 1).flatten(1))
        told_by = _triangle(heads.k[h] @ key_root)
        left, values, right = torch.linalg.svd(asks.t() @ told_by)
        size = values[:rank].sqrt()[:, None]
        # Both maps together are the identity at full rank.
        to_q = size * (left[:, :rank].t() @ torch.linalg.pinv(asks))
        to_k = size * (right[:rank] @ torch.linalg.pinv(told_by))
        q[mine] = 0
        q[mine, : len(size)] = to_q @ heads.q[mine]
        k[h] = 0
        k[h, : len(size)] = to_k @ heads.k[h]
        told.append(_lost(values, rank))
    return replace(heads, q=q, k=k), torch.stack(told)


def _triangle(x: Tensor) -> Tensor:
    """T [D, D] with x = T Qᵀ for x [D, n], Q orthonormal; zero columns where n is below D."""
    factor = torch.linalg.qr(x.t()).R
    missing = len(x) - len(factor)
    return torch.nn.functional.pad(factor, (0, 0, 0, missing)).t() if missing else factor.t()


def _lost(values: Tensor, rank: int) -> Tensor:
    squares = values.square()
    return torch.stack([squares[rank:].sum(), squares.sum()])
