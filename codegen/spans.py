"""Sections of rows with products of low rank of their own: "4096x512 1024x128 1024x128".

Linears of one input that are joined by rows keep their factors apart. Their rights lie one behind
the other, each with its ranks padded to whole steps; of their lefts, which stand on a diagonal,
nothing but the blocks is stored and read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ..compiler.ir.errors import ModelError
from .problem import Parts, Problem
from .row import RANK_STEP, TILE_ROWS


class Place(NamedTuple):
    """Where a section lies: its first row and rank, its ranks as packed, and its left's offset."""

    row: int
    rank: int
    ranks: int
    left: int


def ranks(problem: Problem) -> int:
    """Rows of right as packed."""
    return sum(-(-rank // RANK_STEP) * RANK_STEP for _, rank in problem.sections)


def places(problem: Problem) -> tuple[Place, ...]:
    """The sections of a problem that says them; none of another."""
    found: list[Place] = []
    at = Place(0, 0, 0, 0)
    for rows, rank in problem.sections if problem.spans else ():
        found.append(at := at._replace(ranks=-(-rank // RANK_STEP) * RANK_STEP))
        step = tile_rows(problem)
        left = at.left + -(-rows // step) * step * at.ranks
        at = Place(at.row + rows, at.rank + at.ranks, 0, left)
    return tuple(found)


def tile_rows(problem: Problem) -> int:
    """Rows of one section in a tile: where rows pair, two sections share it."""
    return TILE_ROWS // 2 if problem.pairs else TILE_ROWS


def blocks(problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """left flat, each section's [rows up to whole tiles, ranks] behind the other's, and right
    [ranks of all, K up to whole 128s].

    left [N, sum of ranks] and right [sum of ranks, K] of `parts` are in the order of
    `by_row.order_rows`. ModelError where a row of left has values outside its section's ranks.
    """
    left, right = parts["left"], parts["right"]
    halves = left.unflatten(0, (-1, 2, 8)) if problem.pairs else left
    lefts, rights, row, rank = [], [], 0, 0
    for at, (rows, own) in enumerate(problem.sections):
        mine = halves[:, at].flatten(0, 1) if problem.pairs else left[row : row + rows]
        block = mine[:, rank : rank + own]
        if int(mine.count_nonzero()) != int(block.count_nonzero()):
            raise ModelError(f"expected left in blocks of {problem.spans}, found values beside one")
        short = -block.shape[0] % tile_rows(problem)
        lefts.append(pad(block, (0, -own % RANK_STEP, 0, short)).flatten())
        rights.append(pad(right[rank : rank + own], (0, -problem.K % 128, 0, -own % RANK_STEP)))
        row, rank = row + rows, rank + own
    return {"left": torch.cat(lefts), "right": torch.cat(rights)}


def multiplied(problem: Problem, few: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """y [M, N] of few [M, ranks as packed] and left as packed: one product for each section."""
    y = few.new_empty(few.shape[0], problem.N)
    for place, (rows, _) in zip(places(problem), problem.sections, strict=True):
        block = left[place.left : place.left + rows * place.ranks].view(rows, place.ranks)
        mine = few[:, place.rank : place.rank + place.ranks]
        torch.mm(mine, block.to(few.dtype).T, out=y[:, place.row : place.row + rows])
    return y
