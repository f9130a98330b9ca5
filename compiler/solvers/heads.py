"""Sharing key and value heads: exact maps that bring heads together, groups of them, their mean.

A head is a matrix [D, n]: what makes its D channels from n inputs, a bias as the last column. Some
maps of a head leave attention as it is: a value head may be turned by any orthogonal R when the
output projection's columns take Rᵀ; a key head may be turned in each rotary pair, and scaled there,
when its query heads are turned alike and scaled inversely, for both commute with the rotation by
position. Heads are turned towards each other by orthogonal Procrustes before their mean is taken.

Sources: Ainslie et al., GQA (arXiv 2305.13245), for the mean; Gower, Generalized Procrustes
analysis, Psychometrika 40 (1975); Schönemann, Psychometrika 31 (1966).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_SWEEPS = 50
_EPS = 1e-13


@dataclass(frozen=True)
class Maps:
    """Which maps of a head are free of charge.

    Attributes:
        pairs: int64 [P, 2], channels that turn together, and only among themselves.
        free: int64 [F], channels that any orthogonal map may mix.
        scale: pairs may be scaled too.
    """

    pairs: Tensor
    free: Tensor
    scale: bool = False

    @staticmethod
    def none() -> Maps:
        """No map but the identity."""
        return Maps(torch.empty(0, 2, dtype=torch.long), torch.empty(0, dtype=torch.long))

    @staticmethod
    def orthogonal(size: int) -> Maps:
        """Every orthogonal map of ``size`` channels."""
        return Maps(torch.empty(0, 2, dtype=torch.long), torch.arange(size))

    @property
    def trivial(self) -> bool:
        return not (len(self.pairs) or len(self.free))


@dataclass(frozen=True)
class Heads:
    """One attention's heads; H query heads read KV key and value heads in order, H/KV each.

    Attributes:
        q: [H, D, n]; k: [KV, D, n]; v: [KV, E, n]; a bias is the last column.
        o: [H, E, m], what each head's output adds to the m outputs of the projection behind.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    def ordered(self, order: Tensor) -> Heads:
        """The heads in another order of the key heads, int64 [KV]; queries and columns follow."""
        repeat = len(self.q) // len(self.k)
        rows = (order[:, None] * repeat + torch.arange(repeat)).flatten()
        return Heads(self.q[rows], self.k[order], self.v[order], self.o[rows])

    def pooled(self, groups: Tensor) -> Heads:
        """In the order of groups int64 [N, KV/N], with each group's mean key and value head."""
        out = self.ordered(groups.flatten())
        return replace(out, k=self.k[groups].mean(1), v=self.v[groups].mean(1))


def metric(gram: Tensor, mean: Tensor) -> Tensor:
    """A root L of the inputs' second moments: ‖W L‖² is the mean square of W [x; 1].

    Args:
        gram: E x xᵀ [n, n]; mean: E x [n]; fp64.
    Returns:
        [n + 1, n + 1], symmetric.
    """
    whole = torch.cat([
        torch.cat([gram, mean[:, None]], 1),
        torch.cat([mean, mean.new_ones(1)])[None],
    ])  # fmt: skip
    values, vectors = torch.linalg.eigh(whole)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def scales(x: Tensor, maps: Maps) -> Tensor:
    """Factors [h, D] that give each pair one norm in all heads, their geometric mean.

    Ones where the maps may not scale, and for pairs that are zero in some head.
    """
    out = torch.ones(x.shape[:2], dtype=x.dtype)
    if maps.scale and len(maps.pairs):
        norms = x[:, maps.pairs].pow(2).sum((-2, -1)).sqrt()
        alive = (norms > 0).all(0)
        logs = norms.clamp_min(torch.finfo(x.dtype).tiny).log()
        factor = torch.where(alive, (logs.mean(0) - logs).exp(), torch.ones_like(logs))
        out[:, maps.pairs] = factor[..., None]
    return out


def turns(x: Tensor, target: Tensor, maps: Maps) -> Tensor:
    """Orthogonal [h, D, D], within the maps, that bring heads x [h, D, n] to ``target`` [D, n].

    Each minimises ‖R x_h - target‖; in a pair that is a rotation by one angle.
    """
    out = torch.eye(x.shape[1], dtype=x.dtype).repeat(len(x), 1, 1)
    if len(maps.pairs):
        i, j = maps.pairs.T
        c = (_complex(target, maps)[None] * _complex(x, maps).conj()).sum(-1)
        size = c.abs()
        turn = torch.where(size > 0, c / size.clamp_min(torch.finfo(x.dtype).tiny), 1.0 + 0j)
        out[:, i, i] = out[:, j, j] = turn.real
        out[:, i, j], out[:, j, i] = -turn.imag, turn.imag
    if len(maps.free):
        f = maps.free
        u, _, v = torch.linalg.svd(target[f] @ x[:, f].mT)
        out[:, f[:, None], f[None]] = u @ v
    return out


def align(x: Tensor, maps: Maps) -> Tensor:
    """Orthogonal maps [h, D, D] that bring heads x [h, D, n] together (generalised Procrustes).

    The first head is the first target, then the mean is, until the spread no longer falls.
    """
    found = turns(x, x[0], maps)
    if maps.trivial:
        return found
    total, last = float(x.pow(2).sum()), float("inf")
    for _ in range(_SWEEPS):
        moved = found @ x
        mean = moved.mean(0)
        spread = float((moved - mean).pow(2).sum())
        if last - spread <= _EPS * total:
            break
        last, found = spread, turns(x, mean, maps)
    return found


def distances(x: Tensor, maps: Maps) -> Tensor:
    """[h, h]: ‖R x_i - x_j‖² / (‖x_i‖² + ‖x_j‖²) under the best map R of each pair of heads."""
    h, d, _ = x.shape
    both = torch.zeros(h, h, dtype=x.dtype)
    kept = torch.ones(d, dtype=torch.bool)
    kept[maps.pairs.flatten()] = False
    kept[maps.free] = False
    still = x[:, kept].flatten(1)
    both += still @ still.T
    if len(maps.pairs):
        c = _complex(x, maps)
        both += torch.einsum("hpn,gpn->hgp", c, c.conj()).abs().sum(-1)
    if len(maps.free):
        f = x[:, maps.free]
        for i in range(h - 1):
            both[i, i + 1 :] += torch.linalg.svdvals(f[i] @ f[i + 1 :].mT).sum(-1)
    both = both.triu(1)
    both = both + both.T
    own = x.pow(2).sum((1, 2))
    ends = own[:, None] + own[None]
    out = torch.where(ends > 0, (ends - 2 * both) / ends.clamp_min(1e-300), 0.0).clamp_min(0.0)
    return out.fill_diagonal_(0.0)


def _complex(x: Tensor, maps: Maps) -> Tensor:
    i, j = maps.pairs.T
    return torch.complex(x[..., i, :], x[..., j, :])


def grouped(distance: Tensor, count: int) -> Tensor:
    """Groups int64 [count, h / count] of near heads: ascending inside, ordered by their least head.

    Neighbours, and groups grown from the nearest pair, are both improved by swapping two heads as
    long as that lowers the sum of distances inside groups; the better answer is taken, neighbours
    where they tie. Deterministic.

    Args:
        distance: [h, h], symmetric, zero on the diagonal; ``count`` divides h.
    """
    starts = (adjacent(len(distance), count), _grown(distance, count))
    best = min((_swapped(distance, s, count) for s in starts), key=lambda found: found[0])[1]
    rows = sorted(torch.nonzero(best == g).flatten().tolist() for g in range(count))
    return torch.tensor(rows, dtype=torch.long)


def adjacent(heads: int, count: int) -> Tensor:
    """int64 [heads]: the group of each head when neighbours stay together."""
    return torch.arange(heads) // (heads // count)


def _grown(distance: Tensor, count: int) -> Tensor:
    """The group of each head: seeded by the nearest pair left, grown by the nearest head left."""
    h = len(distance)
    label = torch.full((h,), -1)
    for g in range(count):
        left = torch.nonzero(label < 0).flatten()
        if h == count:
            label[left[0]] = g
            continue
        near = distance[left][:, left].clone().fill_diagonal_(float("inf"))
        pair = int(near.argmin())
        label[left[pair // len(left)]] = label[left[pair % len(left)]] = g
        for _ in range(h // count - 2):
            left = torch.nonzero(label < 0).flatten()
            label[left[distance[left][:, label == g].sum(1).argmin()]] = g
    return label


def _swapped(distance: Tensor, label: Tensor, count: int) -> tuple[float, Tensor]:
    """(sum of distances inside groups, group of each head) after every swap that lowers the sum."""
    label, h = label.clone(), len(label)
    rows = torch.arange(h)
    for _ in range(10 * h):
        member = torch.nn.functional.one_hot(label, count).to(distance.dtype)
        to = distance @ member
        own = to[rows, label]
        other = to[:, label]  # [a, b]: distance of a to b's group
        change = other + other.T - 2 * distance - own[:, None] - own[None]
        change.masked_fill_(label[:, None] == label[None], 0.0)
        at = int(change.argmin())
        if float(change.flatten()[at]) >= -1e-12:
            break
        a, b = at // h, at % h
        label[a], label[b] = int(label[b]), int(label[a])
    member = torch.nn.functional.one_hot(label, count).to(distance.dtype)
    return round(float((distance @ member)[rows, label].sum()) / 2, 12), label


@dataclass(frozen=True)
class Shared:
    """What came of sharing one attention's heads.

    Attributes:
        heads: q and o in their new order, k and v pooled.
        groups: int64 [N, KV/N], the old key heads of each new one.
        aligned: the same heads, turned but neither ordered nor pooled: the function is unchanged.
        errors: of k and v, Σ‖x - mean‖² / Σ‖x‖² inside groups, with and without the turns.
    """

    heads: Heads
    groups: Tensor
    aligned: Heads
    errors: dict[str, tuple[float, float]]


def share(
    heads: Heads, count: int, keys: Maps, values: Maps, *, key_root: Tensor | None = None,
    value_root: Tensor | None = None, similar: bool = True,
) -> Shared:  # fmt: skip
    """Align, group and pool to ``count`` key heads.

    Args:
        heads: fp64; ``count`` divides their number of key heads.
        keys, values: what alignment may do; ``Maps.none()`` for nothing.
        key_root, value_root: of what keys and values are made of, see :func:`metric`; None
            measures the weights themselves.
        similar: group by distance after the best map; False keeps neighbours.
    """
    sizes = scales(_seen(heads.k, key_root), keys)
    repeat = len(heads.q) // len(heads.k)
    wide = sizes.repeat_interleave(repeat, 0)
    even = replace(heads, k=heads.k * sizes[..., None], q=heads.q / wide[..., None])
    k, v = _seen(even.k, key_root), _seen(even.v, value_root)
    if similar:
        groups = grouped(distances(k, keys) + distances(v, values), count)
    else:
        groups = torch.arange(len(k)).reshape(count, -1)
    turn_k = torch.stack([align(k[g], keys) for g in groups])
    turn_v = torch.stack([align(v[g], values) for g in groups])
    back = torch.argsort(groups.flatten())
    a, b = turn_k.flatten(0, 1)[back], turn_v.flatten(0, 1)[back]
    aligned = Heads(
        a.repeat_interleave(repeat, 0) @ even.q, a @ even.k, b @ even.v,
        b.repeat_interleave(repeat, 0) @ even.o,
    )  # fmt: skip
    errors = {
        what: (spread(_seen(after, root), groups), spread(_seen(before, root), groups))
        for what, after, before, root in (
            ("k", aligned.k, heads.k, key_root), ("v", aligned.v, heads.v, value_root),
        )
    }  # fmt: skip
    return Shared(aligned.pooled(groups), groups, aligned, errors)


def spread(x: Tensor, groups: Tensor) -> float:
    """Σ‖x - mean of its group‖² / Σ‖x‖² of heads x [h, D, n]; 0 for heads that are zero."""
    total = float(x.pow(2).sum())
    apart = x[groups] - x[groups].mean(1, keepdim=True)
    return float(apart.pow(2).sum()) / total if total else 0.0


def _seen(x: Tensor, root: Tensor | None) -> Tensor:
    return x if root is None else x @ root
