"""Two factors that are codes of one scheme, multiplied in one launch: y = (x · rightᵀ) · leftᵀ.

Each is packed as the row of its codes packs any weight: right with the ranks of all sections one
behind the other, left section by section, as each row has codes for the ranks of its own section
alone. A left has whole steps of ranks; those that fill up meet products that are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad

from ..compiler.ir import packing
from ..compiler.ir.errors import ModelError
from ..compiler.ir.ops.compressed import dequantize
from .problem import DTYPES, Parts, Problem

if TYPE_CHECKING:
    from .row import KernelRow

TILE = 64  # rows of a packed tile, see `row.TILE_ROWS`
RANKS = 16  # of which a section has whole ones: so its products begin at whole lines
ROLES = ("codes", "scale", "zero")
LEFT = tuple(f"left_{role}" for role in ROLES)
WEIGHT = ("codes", "plane", "scale")  # what rows of codes pack them to


class Place(NamedTuple):
    """A section of left: its rows, its ranks among all as packed, and what is packed before it.

    tiles: of 64 rows and one step of ranks. scales: words that hold scale and zero point.
    """

    row: int
    rows: int
    rank: int
    ranks: int
    tiles: int
    scales: int


def sections(problem: Problem) -> tuple[tuple[int, int], ...]:
    """Rows and rank of each section as left is packed: rows that pair lie in one, with as many
    ranks as either has."""
    if problem.spans and problem.pairs:
        return ((problem.N, max(rank for _, rank in problem.sections)),)
    return problem.sections if problem.spans else ((problem.N, problem.rank),)


def ranks(problem: Problem) -> int:
    """Rows of right as packed: of each section up to whole ones."""
    return sum(_up(rank, RANKS) for _, rank in problem.sections)


def right(problem: Problem) -> Problem:
    """The right factor [ranks as packed, K] as a weight of its own."""
    kept = ("K", "bits", "group", "x_dtype", "scale_dtype", "asym")
    return Problem(N=ranks(problem), **{name: getattr(problem, name) for name in kept})


def lefts(problem: Problem, step: int) -> tuple[Problem, ...]:
    """The sections of left as weights of their own, their ranks up to whole steps."""
    like, group = right(problem), problem.dense_group
    return tuple(
        replace(like, N=rows, K=_up(rank, step), group=group or _up(rank, step))
        for rows, rank in sections(problem)
    )


def left_groups(problem: Problem, rank: int) -> int:
    """Scales of a row of left with that many ranks: one where right has one."""
    return -(-rank // problem.dense_group) if problem.dense_group else 1


def places(problem: Problem, step: int) -> tuple[Place, ...]:
    """Where each section's rows, ranks and packed left begin; of rows that pair, both halves."""
    found, row, rank, tiles, scales = list[Place](), 0, 0, 0, 0
    for rows, own in problem.sections if problem.spans else ((problem.N, problem.rank),):
        found.append(Place(row, rows, rank, _up(own, RANKS), tiles, scales))
        row, rank = row + rows, rank + _up(own, RANKS)
        if not problem.pairs:
            blocks = -(-rows // TILE)
            tiles += blocks * -(-own // step)
            scales += blocks * TILE * _stored_groups(problem, own, step)
    return tuple(found)


def _stored_groups(problem: Problem, rank: int, step: int) -> int:
    group, ranks = problem.dense_group, _up(rank, step)
    return -(-ranks // group) if group else 1


def sizes(problem: Problem, step: int) -> dict[str, int]:
    """Elements as packed: rows of right, codes of left and words of its scales."""
    each = [(_up(rows, TILE), rank) for rows, rank in sections(problem)]
    return {
        "Rp": _up(ranks(problem), TILE),
        "Lp": sum(rows * _up(rank, step) for rows, rank in each),
        "Lg": sum(rows * _stored_groups(problem, rank, step) for rows, rank in each),
    }


def check(problem: Problem, parts: Parts) -> None:
    """ModelError unless the codes, scales and zero points of both factors fit the problem."""
    most = max(rank for _, rank in problem.sections)
    shapes = {
        "right": (problem.rank, problem.K, problem.groups),
        "left": (problem.N, most, left_groups(problem, most)),
    }
    for side, (rows, columns, groups) in shapes.items():
        wanted = {"codes": (rows, packing.packed_words(columns, problem.bits))}
        wanted["scale"] = (rows, groups)
        if problem.asym:
            wanted["zero"] = (rows, groups)
        for role in ROLES:
            found = parts.get(f"{side}_{role}")
            if (None if found is None else tuple(found.shape)) != wanted.get(role):
                told = "none" if found is None else list(found.shape)
                raise ModelError(
                    f"expected {side}_{role} of shape {wanted.get(role, 'none')}, found {told}"
                )
        dtype = parts[f"{side}_scale"].dtype
        if dtype != DTYPES.get(problem.scale_dtype):
            raise ModelError(f"expected scales of {side} in {problem.scale_dtype}, found {dtype}")


def by_rows(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One part of several linears by rows, columns filled up with zeros to the most of any."""
    most = max(t.shape[1] for t in tensors)
    return torch.cat([pad(t, (0, most - t.shape[1])) for t in tensors])


def given(
    problem: Problem, parts: Parts, side: str, rows: slice | torch.Tensor, rank: int
) -> dict[str, torch.Tensor]:
    """Codes, scale and zero of some rows of a factor: of left the ``rank`` columns they have."""
    found = {r: parts[f"{side}_{r}"][rows] for r in ROLES if f"{side}_{r}" in parts}
    if side == "left":
        found["codes"] = found["codes"][:, : packing.packed_words(rank, problem.bits)]
        groups = left_groups(problem, rank)
        found |= {r: found[r][:, :groups] for r in ROLES[1:] if r in found}
    return found


def dense(
    problem: Problem, parts: Parts, dtype: torch.dtype, *, ordered: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """left [N, rank] and right [rank, K], decoded; a row of left is 0 beside its section's ranks.

    ordered: rows that pair are in the order of `by_row.order_rows`.
    """

    def decoded(side: str, rows: slice | torch.Tensor, columns: int) -> torch.Tensor:
        own, group = given(problem, parts, side, rows, columns), problem.dense_group or columns
        how: Any = {"bits": problem.bits, "group": group, "columns": columns, "dtype": dtype}
        return dequantize(own["codes"], own["scale"], own.get("zero"), **how)

    right = decoded("right", slice(None), problem.K)
    left = right.new_zeros(problem.N, problem.rank)
    every = torch.arange(problem.N, device=left.device)
    row = rank = 0
    for at, (rows, own) in enumerate(problem.sections):
        mine = every[row : row + rows]
        if ordered and problem.spans and problem.pairs:
            mine = every[every // 8 % 2 == at]
        left[mine, rank : rank + own] = decoded("left", mine, own)
        row, rank = row + rows, rank + own
    return left, right


def pack(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """The tensors of both factors by name, each as ``row.factor`` packs it; sections of left flat,
    one behind the other. Rows of `parts` are in the order of `by_row.order_rows`."""
    inner = row.factor
    assert inner is not None
    rights = given(problem, parts, "right", slice(None), problem.K)
    cuts = [rank for _, rank in problem.sections]
    for role, tensor in rights.items():
        cut = [pad(t, (0, 0, 0, -len(t) % RANKS)) for t in tensor.split(cuts)]
        rights[role] = torch.cat(cut)
    one = inner.pack(inner, right(problem), rights)
    packed = {f"right_{name}": t for name, t in one.items()}
    flat: dict[str, list[torch.Tensor]] = {}
    at = 0
    for own, (rows, rank) in zip(lefts(problem, row.step), sections(problem), strict=True):
        some = given(problem, parts, "left", slice(at, at + rows), rank)
        q = packing.unpack(some["codes"], problem.bits, rank)
        some["codes"] = packing.pack(pad(q, (0, own.K - rank)), problem.bits)
        for role in ROLES[1:]:
            if role in some:
                some[role] = pad(some[role], (0, own.groups - some[role].shape[1]))
        for name, tensor in inner.pack(inner, own, some).items():
            flat.setdefault(f"left_{name}", []).append(tensor.flatten())
        at += rows
    return packed | {name: torch.cat(tensors) for name, tensors in flat.items()}


Decode = Callable[["KernelRow", Problem, dict[str, torch.Tensor]], torch.Tensor]
"""(row, problem, packed tensors) -> W transposed, [K, N]."""


def product(
    decode: Decode, row: KernelRow, problem: Problem, tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """y [M, rows as packed] of x [M, K]: both factors are decoded once, and torch multiplies."""
    inner = row.factor
    assert inner is not None
    names = [n.removeprefix("right_") for n in tensors if n.startswith("right_")]
    few = x @ decode(inner, right(problem), {n: tensors[f"right_{n}"] for n in names})
    stored = {n: tensors[f"left_{n}"] for n in names}
    found, at = list[torch.Tensor](), dict.fromkeys(names, 0)
    alone = lefts(problem, row.step)
    held = sum(_tiles(p, row.step) for p in alone)
    rank = 0
    for own, (_, mine) in zip(alone, sections(problem), strict=True):
        some = {}
        for name, tensor in stored.items():
            scales = -(-own.N // TILE) * TILE * _stored_groups(problem, mine, row.step)
            count = scales if name == "scale" else len(tensor) // held * _tiles(own, row.step)
            some[name] = tensor[at[name] : at[name] + count]
            at[name] += count
        w = decode(inner, own, some)
        if problem.spans and problem.pairs:
            return _in_pairs(problem, few, w)
        found.append(few[:, rank : rank + mine] @ w[:mine])
        rank += _up(mine, RANKS)
    return torch.cat(found, 1) if len(found) > 1 else found[0]


def _in_pairs(problem: Problem, few: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """y [M, N] where eight rows of the first section lie before eight of the second."""
    halves, rank, found = w.unflatten(1, (-1, 2, 8)), 0, []
    for at, (_, own) in enumerate(problem.sections):
        mine = few[:, rank : rank + own] @ halves[:own, :, at].flatten(1)
        found.append(mine.unflatten(1, (-1, 8)))
        rank += _up(own, RANKS)
    return torch.stack(found, 2).flatten(1)


def _tiles(problem: Problem, step: int) -> int:
    """Of 64 rows and one step."""
    return -(-problem.N // TILE) * (problem.K // step)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
