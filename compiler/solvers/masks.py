"""Which weights are dropped: N:M and unstructured rules, scores, and exact picks.

N:M always means *n kept of m* consecutive inputs. A score is "how bad it is to drop this weight";
ties keep the earlier input.
Sources: Wanda (arXiv 2306.11695), SparseGPT (arXiv 2301.00774). The pick of a whole N:M block by
its exact
second-order cost (`BlockPick`) follows from OBS for a set of weights: dropping the set P costs
``w_P (C_PP)^-1 w_P``, with C
the inverse Hessian of everything that is still free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..ir.errors import UsageError

_CHUNK = 1 << 21  # compared pairs held at a time, times two


@dataclass(frozen=True)
class MaskRule:
    """``kind="nm"``: n kept of m consecutive inputs. ``kind="unstructured"``: the share
    ``sparsity`` of weights is dropped.

    recover: N:M only, the share of each row's inputs, best scores first, that come back where the
    mask dropped them (WRP): they stay exact beside the N:M weights. Raises UsageError for an
    impossible rule.
    """

    kind: str
    n: int = 2
    m: int = 4
    sparsity: float = 0.5
    recover: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("nm", "unstructured"):
            raise UsageError(f"mask kind: expected 'nm' or 'unstructured', found {self.kind!r}")
        if self.kind == "nm" and not 1 <= self.n <= self.m <= 32:
            raise UsageError(f"N:M mask: expected 1 <= n <= m <= 32, found {self.n}:{self.m}")
        if self.kind == "unstructured" and not 0.0 <= self.sparsity <= 1.0:
            raise UsageError(f"mask sparsity: expected 0 to 1, found {self.sparsity}")
        if not 0.0 <= self.recover <= (self.kind == "nm"):
            raise UsageError(f"recover: expected 0 to 1 of an N:M mask, found {self.recover}")

    @property
    def unit(self) -> int:
        """Inputs that must stay together when columns are permuted or cut into groups."""
        return self.m if self.kind == "nm" else 1


class ScorePick:
    """The n best of m inputs, all pairs compared at once. Ties keep the earlier input.

    like: any tensor of the scores' dtype and device.
    """

    def __init__(self, n: int, m: int, like: Tensor) -> None:
        pairs = torch.triu_indices(m, m, 1, device=like.device)
        self._first, self._later = pairs[0].contiguous(), pairs[1].contiguous()
        at = torch.arange(pairs.shape[1], device=like.device)
        # beaten_i = sum over j > i of [j wins] + sum over j < i of (1 - [i wins])
        self._beaten = like.new_zeros(m, pairs.shape[1])
        self._beaten[self._first, at] = 1
        self._beaten[self._later, at] = -1
        self._limit = (n - torch.arange(m, device=like.device))[:, None].to(like)

    def keep(self, score: Tensor) -> Tensor:
        """Keep mask, bool ``[..., m, rows]``, of score ``[..., m, rows]``."""
        later, first = score.index_select(-2, self._later), score.index_select(-2, self._first)
        return (self._beaten @ torch.gt(later, first, out=later)) < self._limit


def pick_nm(score: Tensor, n: int, m: int) -> Tensor:
    """Keep the n best of each m consecutive inputs; score ``[k, rows]`` -> bool, same shape."""
    pick = ScorePick(n, m, score)
    blocks = score.view(-1, m, score.shape[-1])
    some = max(1, _CHUNK // (m * m * blocks.shape[-1]))  # pairs take m / 2 times the room
    return torch.cat([pick.keep(part) for part in torch.split(blocks, some)]).view_as(score)


def drop_smallest(score: Tensor, count: int) -> Tensor:
    """Keep mask that drops exactly ``count`` entries of score; ties: the later goes."""
    keep = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
    if count <= 0:
        return keep.view_as(score)
    if count >= score.numel():
        return torch.zeros_like(keep).view_as(score)
    flat = score.reshape(-1)
    edge = flat.kthvalue(count).values
    keep = flat > edge
    spare = score.numel() - count - int(keep.sum())  # entries equal to the edge that stay
    if spare:
        keep[(flat == edge).nonzero().view(-1)[:spare]] = True
    return keep.view_as(score)


def drop_smallest_per_row(score: Tensor, count: int) -> Tensor:
    """As `drop_smallest` for each column of score ``[k, rows]`` by itself."""
    k = score.shape[0]
    if count <= 0 or count >= k:
        return torch.full_like(score, count <= 0, dtype=torch.bool)
    rows = score.t().contiguous()
    keep = rows > rows.kthvalue(count, dim=1, keepdim=True).values
    tied = (keep.sum(1) != k - count).nonzero().view(-1)
    if len(tied):
        order = rows[tied].sort(dim=1, descending=True, stable=True).indices[:, : k - count]
        keep[tied] = torch.zeros_like(keep[tied]).scatter_(1, order, True)
    return keep.t()


def recover_count(share: float, inputs: int) -> int:
    """Inputs of a row of that many whose scores are among the best ``share``."""
    return round(share * inputs)


def recover_bound(share: float, n: int, m: int, inputs: int, one_score: bool) -> int:
    """Most weights of one row that can come back beside an N:M mask.

    one_score: the mask ranks by the same score, so that it keeps n of the best in each block.
    """
    count = recover_count(share, inputs)
    if not one_score:
        return min(count, inputs // m * (m - n))
    return count // m * (m - n) + max(0, count % m - n)


def top_per_row(score: Tensor, share: float) -> Tensor:
    """The best ``share`` of each column of score ``[k, rows]`` by itself, bool of that shape.

    Of two shares the smaller one's choice lies inside the larger one's.
    """
    count = recover_count(share, score.shape[0])
    return drop_smallest_per_row(score, score.shape[0] - count)


def static_score(solver: str, weight_t: Tensor, diagonal: Tensor) -> Tensor:
    """Score ``[n, m]`` of dense weights ``weight_t`` [n, m] by "magnitude" or "wanda".

    diagonal: diag(H) ``[n]``.
    """
    score = weight_t.abs()
    return score * diagonal.clamp(min=0).sqrt()[:, None] if solver == "wanda" else score


def apart(score: Tensor, beside: Tensor | None, rule: MaskRule) -> Tensor:
    """The score, with weights that stay whatever the mask says where they take no other's place.

    beside: bool like score, those weights. They come last in their N:M block, so that its n kept
    are others while there are n; unstructured zeros, whose number is fixed, fall on others.
    """
    if beside is None:
        return score
    return score.masked_fill(beside, -1.0 if rule.kind == "nm" else torch.inf)


def static_mask(
    rule: MaskRule,
    solver: str,
    weight_t: Tensor,
    diagonal: Tensor,
    beside: Tensor | None = None,
) -> Tensor:
    """Keep mask ``[n, m]`` by ``solver`` ("magnitude" or "wanda") from the dense weights
    ``weight_t`` [n, m].

    diagonal: diag(H) ``[n]``. Unstructured: Wanda compares inside each output row, magnitude
    inside the whole matrix. beside: bool ``[n, m]``, see `apart`.
    """
    score = apart(static_score(solver, weight_t, diagonal), beside, rule)
    if rule.kind == "nm":
        return pick_nm(score, rule.n, rule.m)
    if solver == "wanda":
        return drop_smallest_per_row(score, _whole(rule.sparsity * score.shape[0]))
    return drop_smallest(score, _whole(rule.sparsity * score.numel()))


def _whole(count: float) -> int:
    """The whole number at or below, where a share times a size is one but for rounding."""
    return math.floor(count + 1e-6)


class BlockPick:
    """Exact choice of the kept n of m inputs, for every M-block of a sweep.

    corner: ``[blocks, m, m]``, the inverse Hessian of each block's inputs given that all
    earlier inputs are settled.
    `keep(b, w)` returns bool ``[m, rows]`` for the updated weights w of block b.
    """

    MAX_CHOICES = 256  # 6 for 2:4, 70 for 4:8

    def __init__(self, corner: Tensor, n: int, m: int) -> None:
        drops = list(combinations(range(m), m - n))
        self.n, self.m = n, m
        coefficients = corner.new_zeros(corner.shape[0], len(drops), m, m)
        kept = torch.ones(len(drops), m, dtype=torch.bool, device=corner.device)
        for i, drop in enumerate(drops):
            at = torch.tensor(drop, device=corner.device)
            inverse = torch.linalg.inv(corner[:, at[:, None], at[None, :]])
            coefficients[:, i, at[:, None], at[None, :]] = inverse
            kept[i, at] = False
        # w restricted to a choice: w - C_:P (C_PP)^-1 w_P
        self._moves = torch.eye(m).to(corner) - corner[:, None] @ coefficients
        self._coefficients = coefficients.view(corner.shape[0], len(drops), m * m)
        self._kept = kept.t().contiguous()

    @classmethod
    def affordable(cls, n: int, m: int) -> bool:
        """Whether the number of choices is small enough to list."""
        return n < m and math.comb(m, n) <= cls.MAX_CHOICES

    def keep(self, block: int, w: Tensor) -> Tensor:
        """The cheapest choice for each row; w ``[m, rows]``."""
        products = (w[:, None] * w[None]).view(self.m * self.m, -1)
        cost = self._coefficients[block] @ products
        return self._kept[:, cost.min(0).indices]

    def restrict(self, block: int, w: Tensor) -> tuple[Tensor, Tensor]:
        """The cheapest choice and w moved to its best values on it; both ``[m, rows]``."""
        m = self.m
        products = (w[:, None] * w[None]).view(m * m, -1)
        choice = (self._coefficients[block] @ products).min(0).indices  # argmin is slower
        every = (self._moves[block].view(-1, m) @ w).view(-1, m, w.shape[1])
        keep = self._kept[:, choice]
        values = every.gather(0, choice.expand(1, m, -1))[0]
        return keep, values * keep
